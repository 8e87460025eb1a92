//! Records and reports in the forms of other tools, so that what reads theirs reads ours.
//!
//! Those tools count from when a query was sent, where a [`Report`] counts from when it was due; here their way holds.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde_json::Value;

use super::record::Record;
use super::report::Report;

mod aiperf;
mod vllm;

/// Whose form results are written in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// A [`Report`] and [`Record`]s.
    #[default]
    Blip2,
    /// `profile_export_aiperf.json` and `profile_export.jsonl`.
    Aiperf,
    /// The result of `vllm bench serve`, which has no lines of its own.
    Vllm,
}

impl Format {
    const ALL: [Self; 3] = [Self::Blip2, Self::Aiperf, Self::Vllm];

    /// A run's document. `records`: all of it, warm-up included.
    pub fn document(self, report: &Report, records: &[Record]) -> Value {
        match self {
            Self::Blip2 => serde_json::to_value(report).expect("a report is JSON"),
            Self::Aiperf => aiperf::document(report, records),
            Self::Vllm => vllm::document(report, records),
        }
    }

    /// A query's line. `zero`: since 1970, when the record's times begin.
    pub fn line(self, record: &Record, zero: Duration) -> String {
        match self {
            Self::Blip2 | Self::Vllm => serde_json::to_string(record).expect("a record is JSON"),
            Self::Aiperf => aiperf::line(record, zero).to_string(),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blip2 => "blip2",
            Self::Aiperf => "aiperf",
            Self::Vllm => "vllm",
        })
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(|format| format.to_string()).join(", ");
        Self::ALL.into_iter().find(|format| format.to_string() == typed).ok_or_else(|| format!("`{typed}` is none of {}", known()))
    }
}

/// Of a query that has an answer, from when it was sent, in milliseconds, as these tools name them.
struct Times {
    latency: f64,
    /// None where nothing was told before the end.
    first_token: Option<f64>,
}

impl Times {
    fn of(record: &Record) -> Self {
        Self { latency: record.done_ms - record.sent_ms, first_token: record.first_token_ms.map(|first| first - record.sent_ms) }
    }

    /// vLLM's time per output token, which AIPerf calls inter-token latency: all behind the first token by the tokens behind it. It ends
    /// with the answer, not with its last token.
    fn per_output_token(&self, record: &Record) -> Option<f64> {
        let behind_first = record.n_tokens.checked_sub(1).filter(|n| *n > 0)?;
        Some((self.latency - self.first_token?) / behind_first as f64)
    }
}

/// Records that count.
fn counted(records: &[Record]) -> Vec<&Record> {
    records.iter().filter(|record| !record.warm_up).collect()
}

/// Those of them that have an answer.
fn answered<'a>(counted: &[&'a Record]) -> Vec<&'a Record> {
    counted.iter().copied().filter(|record| record.is_answered()).collect()
}

/// Seconds from the first query that was sent to the last end; not 0.
fn duration_s(answered: &[&Record]) -> f64 {
    let first = answered.iter().map(|record| record.sent_ms).fold(f64::INFINITY, f64::min);
    let last = answered.iter().map(|record| record.done_ms).fold(0.0, f64::max);
    ((last - first) / 1e3).max(f64::MIN_POSITIVE)
}

/// Year, month, day, hour, minute and second, UTC, of seconds since 1970. Days are counted in eras of 400 years that begin with March, so
/// that a leap day ends a year.
fn calendar(seconds: u64) -> [u64; 6] {
    let (days, time) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    [era * 400 + year + u64::from(month <= 2), month, day, time / 3_600, time / 60 % 60, time % 60]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::{Objectives, figures};
    use crate::bench::report::tests::report as plain;

    /// A warm-up, a streamed text, one that came at once, and a failure.
    pub fn records() -> Vec<Record> {
        let streamed = Record {
            index: 0,
            input: "a.png".into(),
            n_pictures: 1,
            scheduled_ms: 0.0,
            sent_ms: 500.0,
            first_token_ms: Some(600.0),
            gaps_ms: vec![400.0, 900.0],
            done_ms: 2_000.0,
            n_tokens: 3,
            output: "a red star".into(),
            ..Record::default()
        };
        let at_once = Record {
            index: 1,
            input: "b.png".into(),
            scheduled_ms: 1_000.0,
            sent_ms: 1_000.0,
            first_token_ms: None,
            gaps_ms: Vec::new(),
            done_ms: 1_250.0,
            n_tokens: 0,
            ..streamed.clone()
        };
        let failed = Record { index: 2, error: Some("device lost".into()), n_tokens: 0, ..at_once.clone() };
        vec![Record { warm_up: true, done_ms: 9_000.0, ..streamed.clone() }, streamed, at_once, failed]
    }

    /// Their report, with an objective that the first misses.
    pub fn report() -> Report {
        let objectives = Objectives { end_to_end_ms: Some(1_000.0), ..Objectives::default() };
        let mut report = plain(3);
        report.figures = figures(&records(), objectives).expect("answers");
        report.work.objectives = objectives;
        report.work.concurrency = Some(2);
        report.started = 1_709_210_096;
        report
    }

    #[test]
    fn names_come_back() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert_eq!("json".parse::<Format>(), Err("`json` is none of blip2, aiperf, vllm".into()));
    }

    #[test]
    fn days_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, [1970, 1, 1, 0, 0, 0]),
            (951_782_399, [2000, 2, 28, 23, 59, 59]),
            (951_782_400, [2000, 2, 29, 0, 0, 0]),
            (951_868_800, [2000, 3, 1, 0, 0, 0]),
            (1_709_210_096, [2024, 2, 29, 12, 34, 56]),
            (4_107_542_399, [2100, 2, 28, 23, 59, 59]),
            (4_107_542_400, [2100, 3, 1, 0, 0, 0]),
            (1_798_761_599, [2026, 12, 31, 23, 59, 59]),
        ] {
            assert_eq!(calendar(seconds), expected, "{seconds}");
        }
    }

    #[test]
    fn a_line_of_our_own_is_the_record() {
        let record = &records()[1];
        let line = Format::Blip2.line(record, Duration::ZERO);
        assert_eq!(serde_json::from_str::<Record>(&line).expect("it is JSON"), *record);
    }
}
