//! How far each stage is from what the machine can do at most: the most that ONNX Runtime's own kernels come to, measured in the same run,
//! beside what the graphs cost.
//!
//! The least time of a stage is that of its products at the highest rate of their type, or that of its bytes at the rate at which memory
//! is read, whichever is longer. What fits in caches may come from there, so bytes count at the rate of a buffer that is no larger.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::cost::Cost;
use super::figures::Figures;
use crate::bundle::Precision;
use crate::runtime::{GraphError, Runtime, Trial};

/// What the machine can do at most, and how near each stage comes to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// What the processor's kernels are written for; where graphs run elsewhere, the provider.
    pub instruction_set: String,
    /// What was measured.
    pub peaks: Peaks,
    /// Each stage, in order; the floor is absent where nothing says what it costs.
    pub stages: Vec<StageLimit>,
}

/// The most that was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Peaks {
    /// Reading buffers, the smallest first; the last is larger than caches.
    pub memory: Vec<Bandwidth>,
    /// Multiplications and additions a second in products of many rows, by what they are computed in; without those that the provider has
    /// no kernel for.
    pub operations_per_second: BTreeMap<Precision, f64>,
}

/// How fast a buffer is read.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Its size.
    pub buffer_bytes: u64,
    /// The rate.
    pub bytes_per_second: f64,
}

/// One stage beside its floor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageLimit {
    /// The stage.
    pub stage: String,
    /// Its median, in milliseconds.
    pub median_ms: f64,
    /// What a run costs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost>,
    /// The least that this takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<Floor>,
    /// The median divided by the floor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub achieved: Option<f64>,
}

/// The least time of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// In milliseconds: the longer of the two below.
    pub ms: f64,
    /// Of the products.
    pub compute_ms: f64,
    /// Of the bytes.
    pub memory_ms: f64,
    /// Which of them it is.
    pub bound: Bound,
}

/// What a stage cannot be faster than.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Products.
    Compute,
    /// Reading and writing.
    Memory,
}

/// Sizes of buffers up to one that caches of most processors do not hold.
const BUFFERS: [u64; 4] = [1 << 20, 8 << 20, 64 << 20, 512 << 20];
/// Products of a ViT on one picture and on several, and larger ones: rows, depth and width. The fastest counts.
const PRODUCTS: [[usize; 3]; 3] = [[257, 1024, 4096], [1024, 1024, 4096], [2048, 2048, 2048]];
/// Runs of a trial, whatever time they take: the first finds nothing in caches.
const RUNS: usize = 2;

impl Peaks {
    /// Tries kernels of these precisions and buffers, for about so long in all. What the provider cannot do or memory does not hold is left
    /// out.
    pub fn measure(runtime: &Runtime, precisions: &[Precision], time: Duration) -> Self {
        let room = runtime.room_for_trials();
        let n_trials = PRODUCTS.len() * precisions.len() + BUFFERS.len();
        let each = time / n_trials as u32;
        let read = |bytes: &u64| {
            let trial = || runtime.reading_trial(*bytes as usize);
            let bytes_per_second = (2 * *bytes <= room).then(|| rate(trial, each)).flatten()?;
            Some(Bandwidth { buffer_bytes: *bytes, bytes_per_second })
        };
        let multiply = |precision: &Precision| {
            let rates = PRODUCTS.iter().filter_map(|sizes| rate(|| runtime.product_trial(*precision, *sizes), each));
            Some((*precision, rates.reduce(f64::max)?))
        };
        Self {
            memory: BUFFERS.iter().filter_map(read).collect(),
            operations_per_second: precisions.iter().filter_map(multiply).collect(),
        }
    }

    /// The higher of each.
    #[must_use]
    pub fn or(mut self, other: &Self) -> Self {
        for (mine, others) in self.memory.iter_mut().zip(&other.memory).filter(|(a, b)| a.buffer_bytes == b.buffer_bytes) {
            mine.bytes_per_second = mine.bytes_per_second.max(others.bytes_per_second);
        }
        for (precision, rate) in &other.operations_per_second {
            let mine = self.operations_per_second.entry(*precision).or_insert(*rate);
            *mine = mine.max(*rate);
        }
        self
    }

    /// The least that this takes; nothing where no rate says anything. Products of a type that was not measured count as nothing.
    pub fn floor(&self, cost: &Cost) -> Option<Floor> {
        let multiplied =
            cost.operations.iter().filter_map(|(precision, n)| Some(*n as f64 / self.operations_per_second.get(precision)?));
        let compute_ms = 1e3 * multiplied.sum::<f64>();
        let memory_ms = self.bandwidth(cost.bytes()).map_or(0.0, |rate| 1e3 * cost.bytes() as f64 / rate);
        let bound = if compute_ms > memory_ms { Bound::Compute } else { Bound::Memory };
        let ms = compute_ms.max(memory_ms);
        (ms > 0.0).then_some(Floor { ms, compute_ms, memory_ms, bound })
    }

    /// At which so many bytes may be read: the highest of buffers that are not smaller by more than one step.
    fn bandwidth(&self, bytes: u64) -> Option<f64> {
        let at = self.memory.iter().rposition(|bandwidth| bandwidth.buffer_bytes <= bytes).unwrap_or(0);
        self.memory.get(at..)?.iter().map(|bandwidth| bandwidth.bytes_per_second).reduce(f64::max)
    }
}

/// Amounts a second of the fastest run.
fn rate(trial: impl FnOnce() -> Result<Trial, GraphError>, time: Duration) -> Option<f64> {
    let (mut trial, start) = (trial().ok()?, Instant::now());
    let mut fastest = Duration::MAX;
    for n in 0.. {
        if n >= RUNS && start.elapsed() >= time {
            break;
        }
        fastest = fastest.min(trial.run().ok()?);
    }
    Some(trial.amount() / fastest.as_secs_f64())
}

impl Limits {
    /// Of the stages that were measured, with the costs of those that have some.
    pub fn new(instruction_set: String, peaks: Peaks, costs: &[(String, Cost)], figures: &Figures) -> Self {
        let stages = figures.stages_ms.iter().map(|(stage, summary)| {
            let cost = costs.iter().find(|(name, _)| name == stage).map(|(_, cost)| cost.clone());
            let floor = cost.as_ref().and_then(|cost| peaks.floor(cost));
            let median_ms = summary.percentiles[0].value;
            StageLimit { stage: stage.clone(), median_ms, cost, floor, achieved: floor.map(|floor| median_ms / floor.ms) }
        });
        Self { stages: stages.collect(), instruction_set, peaks }
    }

    /// A table for people, in Markdown.
    pub fn markdown(&self) -> String {
        let mut out = String::from("| | G operations | MB | floor, ms | bound by | p50 / floor |\n|---|---|---|---|---|---|\n");
        for limit in &self.stages {
            let stage = limit.stage.replace('_', " ");
            let cost = |of: fn(&Cost) -> f64| limit.cost.as_ref().map(of);
            let (operations, bytes) = (cost(|cost| cost.all_operations() as f64 / 1e9), cost(|cost| cost.bytes() as f64 / 1e6));
            let bound = limit.floor.map_or("–", |floor| floor.bound.name());
            let cells = [operations, bytes, limit.floor.map(|floor| floor.ms)].map(shown);
            writeln!(out, "| {stage} | {} | {bound} | {} |", cells.join(" | "), shown(limit.achieved)).expect("a string");
        }
        writeln!(out, "\nat most ({}): {}", self.instruction_set, self.peaks).expect("a string");
        out
    }
}

impl Bound {
    fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Memory => "memory",
        }
    }
}

/// Such as `float32 140 G operations/s; memory 21.5 GB/s, 1 MB of it 88.1`.
impl std::fmt::Display for Peaks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let operations =
            self.operations_per_second.iter().map(|(precision, rate)| format!("{precision} {:.0} G operations/s", rate / 1e9));
        f.write_str(&operations.collect::<Vec<_>>().join(", "))?;
        let Some((last, smaller)) = self.memory.split_last() else { return Ok(()) };
        write!(f, "; memory {:.1} GB/s", last.bytes_per_second / 1e9)?;
        smaller.iter().try_for_each(|bandwidth| {
            write!(f, ", {} MB of it {:.1}", bandwidth.buffer_bytes >> 20, bandwidth.bytes_per_second / 1e9)
        })
    }
}

/// Three digits that matter, or a dash.
fn shown(value: Option<f64>) -> String {
    let Some(value) = value.filter(|value| *value > 0.0) else { return "–".into() };
    let digits = (2 - value.log10().floor() as i32).clamp(0, 9) as usize;
    format!("{value:.digits$}")
}
