//! What a run leaves behind: one JSON document, which every other form is made of.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::BenchError;
use super::document;
use super::energy::Energy;
use super::environment::{Load, Machine};
use super::figures::{Figures, Objectives, quantiles, timeline};
use super::limits::Limits;
use super::memory::{Drift, Memory};
use super::record::Record;
use super::statistics::{Percentile, Summary};

/// The name in every document.
pub const SCHEMA: &str = "blip2-bench";
/// It grows when a field changes its meaning or goes; new fields may come without that.
pub const VERSION: u32 = 1;

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: String,
    /// [`VERSION`].
    pub version: u32,
    /// What was typed.
    pub command: Vec<String>,
    /// Seconds since 1970, when it began.
    pub started: u64,
    /// Seconds that it took, warm-up and loading included.
    pub took_s: f64,
    /// Whether it came to its end; else it was stopped, and the figures are of what was measured until then.
    pub is_complete: bool,
    /// Where.
    pub machine: Machine,
    /// The machine's load before, and at the end with what others took meanwhile.
    pub load: [Load; 2],
    /// What was measured.
    pub subject: Subject,
    /// What it had to do.
    pub work: Work,
    /// What was found.
    pub figures: Figures,
    /// How far stages are from what the machine can do at most, where that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Of latencies by name, what so many half percents of the sample lie below: the curve of its distribution.
    pub quantiles: BTreeMap<String, Vec<f64>>,
    /// The first queries that counted, of those whose records were kept.
    pub timeline: Vec<Record>,
    /// The most memory that the process had resident, where the engine ran in it.
    pub peak_resident_bytes: Option<u64>,
    /// Energy while queries counted, as far as counters tell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub energy: Vec<Energy>,
    /// What it had resident over time, where the run is a soak and the engine ran in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// How latency changed, where the run is a soak.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drift: Option<Drift>,
    /// What tells it from the other settings of a sweep, such as `threads=2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Subject {
    /// The program and its version.
    pub engine: String,
    /// The revision of the source that it was built from, where it is a release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// The bundle, or the model's name at a server.
    pub model: String,
    /// SHA-256 over the hashes of the bundle's files.
    pub model_sha256: Option<String>,
    /// Of each graph.
    pub precisions: Vec<(String, String)>,
    /// The execution provider, or the server's address.
    pub provider: String,
    /// ONNX Runtime's version.
    pub runtime: Option<String>,
    /// Threads inside an operator.
    pub threads: Option<usize>,
    /// Seconds until the engine was loaded.
    pub loading_s: Option<f64>,
}

/// What it had to do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Work {
    /// `single`, `multi`, `offline`, `server`, `startup`, `stage` or `soak`.
    pub scenario: String,
    /// `caption`, `ask`, `match` or `embed`.
    pub task: String,
    /// Distinct inputs.
    pub inputs: usize,
    /// Pictures in a query.
    pub pictures: usize,
    /// How queries came, in words.
    pub arrivals: String,
    /// Queries that were kept under way together, where they did not come by a schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<usize>,
    /// Queries a second that were due, where they came by a schedule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// Of whatever is drawn.
    pub seed: u64,
    /// How texts are searched.
    pub search: Option<String>,
    /// What answers must keep to count as good.
    pub objectives: Objectives,
}

/// JSON Schema of a report, with what each field means.
pub fn schema() -> String {
    serde_json::to_string_pretty(&schemars::schema_for!(Report)).expect("a schema is JSON")
}

impl Report {
    /// What records say, and nothing yet of when and where.
    pub fn new(subject: Subject, work: Work, figures: Figures, records: &[Record]) -> Self {
        Self {
            schema: SCHEMA.into(),
            version: VERSION,
            command: Vec::new(),
            started: 0,
            took_s: 0.0,
            is_complete: false,
            machine: Machine::default(),
            load: [Load::default(); 2],
            subject,
            work,
            figures,
            limits: None,
            quantiles: quantiles(records),
            timeline: timeline(records),
            peak_resident_bytes: None,
            energy: Vec::new(),
            memory: None,
            drift: None,
            label: None,
        }
    }

    /// Of a file that this program, or one like it, wrote.
    pub fn read(path: &Path) -> Result<Self, BenchError> {
        let none = |why: String| BenchError::NoReport { path: path.to_owned(), why };
        document::read(path, (SCHEMA, VERSION), "it is no JSON of `blip2 bench`", none)
    }

    /// Whether the figures may be quoted.
    pub fn is_valid(&self) -> bool {
        self.is_complete && self.figures.objections.is_empty()
    }

    /// A table for people, in Markdown.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        self.describe(&mut out).expect("a string takes everything");
        out
    }

    /// A line a figure: name, count, mean, deviation, least, percentiles, largest.
    pub fn csv(&self) -> String {
        let mut out = String::from("metric,count,mean,deviation,min");
        let ranks = self.rows().next().map(|(_, summary)| summary.percentiles.clone()).unwrap_or_default();
        ranks
            .iter()
            .for_each(|percentile| write!(out, ",p{0},p{0}_low,p{0}_high,p{0}_certified", percentile.rank).expect("a string"));
        out.push_str(",max\n");
        for (name, summary) in self.rows() {
            let Summary { count, mean, deviation, min, max, percentiles, .. } = summary;
            write!(out, "{name},{count},{mean},{deviation},{min}").expect("a string takes everything");
            for Percentile { value, interval: [low, high], certified, .. } in percentiles {
                let certified = certified.map(|value| value.to_string()).unwrap_or_default();
                write!(out, ",{value},{low},{high},{certified}").expect("a string takes everything");
            }
            writeln!(out, ",{max}").expect("a string takes everything");
        }
        out
    }

    /// Every summary with its name: latencies, then stages.
    pub fn rows(&self) -> impl Iterator<Item = (String, &Summary)> {
        let latencies = self.figures.latencies_ms.iter().map(|(name, summary)| (format!("{name}_ms"), summary));
        latencies.chain(self.figures.stages_ms.iter().map(|(name, summary)| (format!("stage_{name}_ms"), summary)))
    }

    fn describe(&self, out: &mut String) -> std::fmt::Result {
        let (machine, subject, work, figures) = (&self.machine, &self.subject, &self.work, &self.figures);
        writeln!(out, "{} of {}, {}, {} by {}", work.scenario, subject.model, work.task, work.arrivals, subject.provider)?;
        let processor = machine.processor.as_deref().unwrap_or("a processor");
        writeln!(
            out,
            "{processor} ({}), {} of {} processors\n",
            machine.instruction_set, machine.usable_processors, machine.processors
        )?;
        writeln!(out, "| ms | mean | p50 | p90 | p95 | p99 | p99.9 | max | n |\n|---|---|---|---|---|---|---|---|---|")?;
        for (name, summary) in self.rows() {
            let name = name.trim_end_matches("_ms").replace('_', " ");
            write!(out, "| {name} | {}", short(summary.mean))?;
            summary.percentiles.iter().try_for_each(|percentile| write!(out, " | {}", shown(percentile)))?;
            writeln!(out, " | {} | {} |", short(summary.max), summary.count)?;
        }
        self.limits.as_ref().map_or(Ok(()), |limits| write!(out, "\n{}", limits.markdown()))?;
        let rates = figures.rates;
        write!(out, "\n{} images/s, {} tokens/s, {} queries/s", short(rates.images), short(rates.tokens), short(rates.queries))?;
        rates.good.map_or(Ok(()), |good| write!(out, ", {} good ones", short(good)))?;
        let counts = figures.counts;
        writeln!(out, "; {} answered, {} failed, {} to warm up", counts.answered, counts.failed, counts.warm_up)?;
        if let Some(truth) = figures.truth {
            writeln!(out, "{} of {} answers are true, {:.1} %", truth.n_true, truth.n_known, truth.share() * 100.0)?;
        }
        let energy = |one: &Energy| format!("{} J ({})", short(one.joules_per_image), one.source);
        if !self.energy.is_empty() {
            writeln!(out, "an image takes {}", self.energy.iter().map(energy).collect::<Vec<_>>().join(", "))?;
        }
        writeln!(out, "`~`: the sample is too small to say so with a certainty of 99 %; ± is the 95 % interval of a percentile")?;
        let growth = self.memory.as_ref().and_then(|memory| memory.growth);
        growth.map_or(Ok(()), |growth| writeln!(out, "memory: {growth}"))?;
        self.drift.map_or(Ok(()), |drift| writeln!(out, "latency: {drift}"))?;
        figures.objections.iter().try_for_each(|why| writeln!(out, "not valid: {why}"))?;
        if self.is_complete { Ok(()) } else { writeln!(out, "not valid: the run was stopped") }
    }
}

/// With its interval, and a mark where too few values support it.
fn shown(percentile: &Percentile) -> String {
    let [low, high] = percentile.interval;
    let mark = if percentile.certified.is_some() { "" } else { "~" };
    format!("{mark}{} ±{}", short(percentile.value), short((high - low) / 2.0))
}

/// Four digits that matter.
pub(super) fn short(value: f64) -> String {
    let digits = if value == 0.0 { 0 } else { (3 - value.abs().log10().floor() as i32).clamp(0, 6) as usize };
    format!("{value:.digits$}")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::figures::figures;

    /// A report of `n` queries whose latencies are 10, 11, … milliseconds.
    pub fn report(n: usize) -> Report {
        let record = |index: usize| Record {
            index,
            input: format!("{index}.png"),
            n_pictures: 1,
            scheduled_ms: index as f64 * 200.0,
            sent_ms: index as f64 * 200.0,
            done_ms: index as f64 * 200.0 + 10.0 + index as f64,
            stages_ms: vec![("vision".into(), 10.0 + index as f64)],
            ..Record::default()
        };
        let records: Vec<_> = (0..n).map(record).collect();
        let figures = figures(&records, Objectives::default()).expect("answers");
        let subject = Subject { model: "demo-opt".into(), provider: "cpu".into(), ..Subject::default() };
        let work = Work { scenario: "single".into(), task: "caption".into(), arrivals: "one at a time".into(), ..Work::default() };
        Report {
            command: vec!["blip2".into(), "bench".into(), "single".into()],
            started: 1_800_000_000,
            took_s: 12.5,
            is_complete: true,
            ..Report::new(subject, work, figures, &records)
        }
    }

    #[test]
    fn a_report_comes_back_from_its_file() {
        let path = std::env::temp_dir().join(format!("blip2-report-{}.json", std::process::id()));
        let written = report(70);
        std::fs::write(&path, serde_json::to_vec(&written).expect("it is JSON")).expect("a temporary file");
        let read = Report::read(&path).expect("it was written here");
        assert_eq!((read.csv(), read.markdown(), read.timeline), (written.csv(), written.markdown(), written.timeline));
        for (content, part) in [("{}", "no JSON of"), (r#"{"schema":"blip2-bench","version":9}"#, "version 9"), ("x", "no JSON")] {
            std::fs::write(&path, content).expect("a temporary file");
            let error = Report::read(&path).expect_err("it is none").to_string();
            assert!(error.contains(part), "{error}");
        }
        std::fs::remove_file(&path).expect("it was written");
    }

    #[test]
    fn percentiles_that_the_sample_does_not_support_are_marked() {
        let table = report(70).markdown();
        let row = table.lines().find(|line| line.starts_with("| end to end")).expect("a row");
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert!(!cells[3].starts_with('~') && !cells[4].starts_with('~'), "p50 and p90 of 70: {row}");
        assert!(cells[5].starts_with('~') && cells[6].starts_with('~') && cells[7].starts_with('~'), "{row}");
    }

    #[test]
    fn csv_has_a_line_a_figure() {
        let csv = report(70).csv();
        let lines: Vec<&str> = csv.lines().collect();
        let n_columns = lines[0].split(',').count();
        assert!(lines.iter().all(|line| line.split(',').count() == n_columns), "{csv}");
        assert!(lines[1].starts_with("end_to_end_ms,70,44.5,") && lines.iter().any(|line| line.starts_with("stage_vision_ms,")));
    }

    #[test]
    fn numbers_keep_four_digits() {
        for (value, expected) in [(0.0, "0"), (1234.56, "1235"), (12.345, "12.35"), (0.012_345, "0.01235"), (99_999.0, "99999")] {
            assert_eq!(short(value), expected);
        }
    }
}
