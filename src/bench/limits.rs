//! How far each stage is from what the machine can do at most: the most that ONNX Runtime's own kernels come to, measured in the same run,
//! beside what the graphs cost.
//!
//! The least time of a stage is that of its products at the highest rate of their type, or that of its bytes at the rate at which memory
//! is read, whichever is longer. What fits in caches may come from there, so bytes count at the rate of a buffer that is no larger.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cost::Cost;
use super::figures::Figures;
use crate::bundle::Precision;
use crate::runtime::{Runtime, Trial};

/// What the machine can do at most, and how near each stage comes to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// What the processor's kernels are written for; where graphs run elsewhere, the provider.
    pub instruction_set: String,
    /// What was measured.
    pub peaks: Peaks,
    /// Each stage, in order; the floor is absent where nothing says what it costs.
    pub stages: Vec<StageLimit>,
}

/// The most that was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Peaks {
    /// Reading buffers, the smallest first; the last is larger than caches.
    pub memory: Vec<Bandwidth>,
    /// Multiplications and additions a second in products of many rows, by what they are computed in; without those that the provider has
    /// no kernel for.
    #[schemars(with = "BTreeMap<String, f64>")]
    pub operations_per_second: BTreeMap<Precision, f64>,
}

/// How fast a buffer is read.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Bandwidth {
    /// Its size.
    pub buffer_bytes: u64,
    /// The rate.
    pub bytes_per_second: f64,
}

/// One stage beside its floor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Products.
    Compute,
    /// Reading and writing.
    Memory,
}

/// Sizes of buffers up to one that caches of most processors do not hold.
const BUFFERS: [u64; 4] = [1 << 20, 8 << 20, 64 << 20, 512 << 20];
/// Products of a ViT on one picture and on some, and larger ones: rows, depth and width. The fastest counts.
const PRODUCTS: [[usize; 3]; 4] = [[257, 1024, 4096], [1024, 2048, 2048], [4096, 4096, 4096], [16_384, 4096, 4096]];
/// What takes so long is not faster for being larger.
const LONG: Duration = Duration::from_millis(50);
/// Runs of a trial, whatever time they take: the first finds nothing in caches.
const RUNS: usize = 2;

impl Peaks {
    /// Tries kernels of these precisions and buffers, for about so long in all. What the provider cannot do or memory does not hold is left
    /// out.
    pub fn measure(runtime: &Runtime, precisions: &[Precision], time: Duration) -> Self {
        let room = runtime.room_for_trials();
        let each = time / (PRODUCTS.len() * precisions.len() + BUFFERS.len()) as u32;
        let read = |bytes: &u64| {
            let mut trial = (2 * *bytes <= room).then(|| runtime.reading_trial(*bytes as usize).ok()).flatten()?;
            Some(Bandwidth { buffer_bytes: *bytes, bytes_per_second: trial.amount() / fastest(&mut trial, each)?.as_secs_f64() })
        };
        let multiply = |precision: &Precision| Some((*precision, multiplied(runtime, *precision, each)?));
        Self {
            memory: BUFFERS.iter().filter_map(read).collect(),
            operations_per_second: precisions.iter().filter_map(multiply).collect(),
        }
    }

    /// The higher of each.
    #[must_use]
    pub fn or(mut self, other: &Self) -> Self {
        for mine in &mut self.memory {
            let same = other.memory.iter().find(|others| others.buffer_bytes == mine.buffer_bytes);
            mine.bytes_per_second = same.map_or(0.0, |same| same.bytes_per_second).max(mine.bytes_per_second);
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

/// Operations a second of the fastest product; nothing where there is no kernel.
fn multiplied(runtime: &Runtime, precision: Precision, time: Duration) -> Option<f64> {
    let (mut most, room): (Option<f64>, _) = (None, runtime.room_for_trials());
    // The matrix lies in the model, in the session and once more as kernels want it.
    let bytes = |[rows, depth, width]: [usize; 3]| 4 * (rows * depth + 3 * depth * width + rows * width) as u64;
    for sizes in PRODUCTS.into_iter().filter(|sizes| bytes(*sizes) <= room) {
        let Some(mut trial) = runtime.product_trial(precision, sizes).ok() else { break };
        let Some(fastest) = fastest(&mut trial, time) else { break };
        most = Some(most.unwrap_or(0.0).max(trial.amount() / fastest.as_secs_f64()));
        if fastest > LONG {
            break;
        }
    }
    most
}

/// The shortest of runs that take about so long in all; nothing if one fails.
fn fastest(trial: &mut Trial, time: Duration) -> Option<Duration> {
    let (start, mut fastest) = (Instant::now(), Duration::MAX);
    for n in 0.. {
        if n >= RUNS && start.elapsed() >= time {
            break;
        }
        fastest = fastest.min(trial.run().ok()?);
    }
    Some(fastest)
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

    /// With the higher peaks of both.
    #[must_use]
    pub fn or(self, other: &Self) -> Self {
        Self { peaks: self.peaks.or(&other.peaks), ..self }
    }

    /// The same costs beside other figures.
    #[must_use]
    pub fn of(self, figures: &Figures) -> Self {
        let costs = self.stages.into_iter().filter_map(|limit| Some((limit.stage, limit.cost?)));
        Self::new(self.instruction_set, self.peaks, &costs.collect::<Vec<_>>(), figures)
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

/// Such as `float32 140 G operations/s; memory 21.5 GB/s (1 MB: 88.1, 8 MB: 85.3)`.
impl std::fmt::Display for Peaks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rates = self.operations_per_second.iter();
        let rates = rates.map(|(precision, rate)| format!("{precision} {} G operations/s", shown(Some(rate / 1e9))));
        f.write_str(&rates.collect::<Vec<_>>().join(", "))?;
        let Some((last, smaller)) = self.memory.split_last() else { return Ok(()) };
        let rate = |bandwidth: &Bandwidth| shown(Some(bandwidth.bytes_per_second / 1e9));
        write!(f, "; memory {} GB/s", rate(last))?;
        let smaller = smaller.iter().map(|buffer| format!("{} MB: {}", buffer.buffer_bytes >> 20, rate(buffer)));
        write!(f, " ({})", smaller.collect::<Vec<_>>().join(", "))
    }
}

/// Three digits that matter, or a dash.
fn shown(value: Option<f64>) -> String {
    let Some(value) = value.filter(|value| *value > 0.0) else { return "–".into() };
    let digits = (2 - value.log10().floor() as i32).clamp(0, 9) as usize;
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::report;

    fn peaks() -> Peaks {
        let buffer = |buffer_bytes, bytes_per_second| Bandwidth { buffer_bytes, bytes_per_second };
        Peaks {
            memory: vec![buffer(1 << 20, 8e9), buffer(8 << 20, 9e9), buffer(64 << 20, 1e9)],
            operations_per_second: [(Precision::Float32, 1e9), (Precision::Int8, 4e9)].into(),
        }
    }

    fn cost(operations: &[(Precision, u64)], weight_bytes: u64) -> Cost {
        Cost { operations: operations.iter().copied().collect(), weight_bytes, ..Cost::default() }
    }

    #[test]
    fn a_floor_is_the_longer_of_both_times() {
        let floor = |operations: &[(Precision, u64)], bytes| peaks().floor(&cost(operations, bytes));
        let found = floor(&[(Precision::Float32, 1_000_000), (Precision::Int8, 4_000_000)], 1000).expect("costs");
        assert_eq!((found.ms, found.bound), (2.0, Bound::Compute));
        let found = floor(&[(Precision::Float32, 1_000_000)], 100 << 20).expect("costs");
        assert_eq!((found.ms, found.compute_ms, found.bound), (f64::from(100 << 20) / 1e6, 1.0, Bound::Memory));
        // There is no rate for this type, so only its bytes say something.
        let found = floor(&[(Precision::Float16, 1_000_000)], 9_000_000).expect("costs");
        assert_eq!((found.ms, found.compute_ms), (1.0, 0.0));
        assert_eq!(floor(&[], 0), None);
        assert_eq!(Peaks::default().floor(&cost(&[(Precision::Float32, 1)], 1)), None);
    }

    #[test]
    fn bytes_that_caches_may_hold_count_at_the_rate_of_caches() {
        for (bytes, expected) in [(1000, 9e9), (2 << 20, 9e9), (9 << 20, 9e9), (63 << 20, 9e9), (64 << 20, 1e9), (1 << 40, 1e9)] {
            assert_eq!(peaks().bandwidth(bytes), Some(expected), "{bytes}");
        }
    }

    #[test]
    fn the_higher_of_two_measurements_counts() {
        let (mut first, mut second) = (peaks(), peaks());
        first.memory[0].bytes_per_second = 1e9;
        second.operations_per_second.insert(Precision::Float32, 2e9);
        second.memory.remove(2);
        let found = first.or(&second);
        assert_eq!((found.memory[0].bytes_per_second, found.memory[2].bytes_per_second), (8e9, 1e9));
        assert_eq!(found.operations_per_second[&Precision::Float32], 2e9);
    }

    #[test]
    fn limits_of_several_runs_become_those_of_all() {
        let costs = [("vision".to_owned(), cost(&[(Precision::Float32, 20_000_000)], 1_000_000))];
        let faster = Peaks { operations_per_second: [(Precision::Float32, 2e9)].into(), ..peaks() };
        let limits = |peaks, n| Limits::new("avx2".into(), peaks, &costs, &report(n).figures);
        assert_eq!(limits(peaks(), 70).or(&limits(faster.clone(), 70)).of(&report(90).figures), limits(peaks().or(&faster), 90));
    }

    #[test]
    fn stages_without_costs_have_a_dash() {
        let costs = [("vision".to_owned(), cost(&[(Precision::Float32, 20_000_000)], 1_000_000))];
        let figures = report(70).figures;
        let limits = Limits::new("avx2".into(), peaks(), &costs, &figures);
        let row = |limits: &Limits| limits.markdown().lines().nth(2).expect("a row").to_owned();
        // The median of 10, 11, … is 44.5 milliseconds.
        assert_eq!(row(&limits), "| vision | 0.0200 | 1.00 | 20.0 | compute | 2.23 |");
        assert!(limits.markdown().ends_with(
            "at most (avx2): float32 1.00 G operations/s, int8 4.00 G operations/s; memory 1.00 GB/s (1 MB: 8.00, 8 MB: 9.00)\n"
        ));
        let without = Limits::new("avx2".into(), peaks(), &[], &figures);
        assert_eq!(row(&without), "| vision | – | – | – | – | – |");
        let json = serde_json::to_string(&limits).expect("limits are JSON");
        assert_eq!(serde_json::from_str::<Limits>(&json).expect("they were written here"), limits);
    }
}
