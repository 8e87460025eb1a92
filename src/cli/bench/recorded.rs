//! `blip2 bench report`: records that are there already → a report.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::outputs::Outputs;
use super::{Failure, nothing, objectives, plain, typed};
use crate::bench::BenchError;
use crate::bench::about::About;
use crate::bench::environment::{Load, Machine};
use crate::bench::figures::{Figures, Objectives, figures};
use crate::bench::log::Log;
use crate::bench::record::Record;
use crate::bench::report::{Report, Subject, Work};

const UNKNOWN: &str = "unknown";

#[derive(Debug, clap::Args)]
pub(super) struct Recorded {
    /// Queries, one a line, as --jsonl writes them; a last line that was cut short is left out
    #[arg(value_name = "RECORDS")]
    records: PathBuf,
    /// What is known of the run (JSON): any of command, started, took_s, is_complete, machine, load, subject, work and
    /// peak_resident_bytes, as a report has them, and a list of limits. Machine and load are those of now where it does not say
    #[arg(long, value_name = "FILE")]
    about: Option<PathBuf>,
    /// Answers that are good enough, if not those of --about: `e2e=500,ttft=200,tpot=50`, in milliseconds
    #[arg(long, value_name = "LIMITS", value_parser = objectives)]
    slo: Option<Objectives>,
    #[command(flatten)]
    outputs: Outputs,
}

pub(super) fn run(command: &Recorded) -> Result<(), Failure> {
    if command.outputs.are_over(&command.records) {
        let path = command.records.to_string_lossy();
        return Err(Failure::Usage(format!("{}: the records would be overwritten", plain(&path))));
    }
    let about = command.about.as_deref().map_or_else(|| Ok(About::default()), About::read).map_err(usage)?;
    let log = Log::read(&command.records).map_err(usage)?;
    let report = command.report(about, &log)?;
    command.warn(&log);
    let mut journal = command.outputs.open()?;
    let zero = Duration::from_secs(report.started);
    log.records.iter().try_for_each(|record| journal.note_from(record, zero))?;
    command.outputs.write(&report, &log.records)
}

impl Recorded {
    fn warn(&self, log: &Log) {
        let path = self.records.to_string_lossy();
        if log.is_cut {
            eprintln!("blip2: {}: the last line is cut short and left out", plain(&path));
        }
        if self.about.is_none() {
            eprintln!(
                "blip2: {}: nobody says that its run came to its end, so it counts as stopped; --about tells more",
                plain(&path)
            );
        }
    }

    fn report(&self, about: About, log: &Log) -> Result<Report, Failure> {
        let (records, now) = (&log.records, Load::now());
        let mut work = about.work.unwrap_or_else(|| work(records));
        work.objectives = self.slo.unwrap_or(work.objectives);
        let took_s = about.took_s.unwrap_or_else(|| length_s(records));
        let figures = self.figures(records, work.objectives)?;
        Ok(Report {
            command: about.command.unwrap_or_else(typed),
            started: about.started.unwrap_or_else(|| written(&self.records).saturating_sub(took_s as u64)),
            took_s,
            is_complete: about.is_complete && !log.is_cut,
            machine: about.machine.unwrap_or_else(Machine::detect),
            load: about.load.unwrap_or([now; 2]),
            limits: about.limits.into_iter().reduce(|limits, others| limits.or(&others)).map(|limits| limits.of(&figures)),
            peak_resident_bytes: about.peak_resident_bytes,
            ..Report::new(about.subject.unwrap_or_else(subject), work, figures, records)
        })
    }

    fn figures(&self, records: &[Record], objectives: Objectives) -> Result<Figures, Failure> {
        let path = plain(&self.records.to_string_lossy()).into_owned();
        let counts = |record: &Record| !record.warm_up;
        figures(records, objectives).ok_or_else(|| {
            Failure::Usage(match records {
                [] => format!("{path}: there is no record in it"),
                _ if !records.iter().any(counts) => format!("{path}: every record in it is one of the warm-up"),
                _ => format!("{path}: {}", nothing(records)),
            })
        })
    }
}

fn usage(error: BenchError) -> Failure {
    Failure::Usage(crate::cli::chain(&error))
}

fn subject() -> Subject {
    Subject { engine: UNKNOWN.into(), model: UNKNOWN.into(), provider: UNKNOWN.into(), ..Subject::default() }
}

/// As far as records tell.
fn work(records: &[Record]) -> Work {
    let inputs: std::collections::BTreeSet<_> = records.iter().map(|record| &record.input).collect();
    Work {
        scenario: UNKNOWN.into(),
        task: UNKNOWN.into(),
        inputs: inputs.len(),
        pictures: records.first().map_or(0, |record| record.n_pictures),
        arrivals: UNKNOWN.into(),
        ..Work::default()
    }
}

/// Seconds from the first arrival to the last end.
fn length_s(records: &[Record]) -> f64 {
    let first = records.iter().map(|record| record.scheduled_ms).fold(f64::INFINITY, f64::min);
    let last = records.iter().map(|record| record.done_ms).fold(f64::NEG_INFINITY, f64::max);
    (last - first).max(0.0) / 1e3
}

/// Seconds since 1970, when a file was last written.
fn written(path: &Path) -> u64 {
    let at = path.metadata().and_then(|found| found.modified()).unwrap_or_else(|_| SystemTime::now());
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
