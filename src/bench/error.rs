//! Why a benchmark cannot begin or go on.

use std::path::PathBuf;

use super::arrivals::{MOST_ARRIVALS, MOST_BYTES};

/// One clear line each.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Nothing arrives at such a rate.
    #[error("{} is no rate: queries a second are a number above 0", number(*.0))]
    Rate(f64),
    /// Gaps have no such shape.
    #[error("{} is no burstiness: a number above 0 is needed, 1 for Poisson arrivals, less for bursts", number(*.0))]
    Burstiness(f64),
    /// A file cannot be read.
    #[error("{} cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A line of a trace says no time.
    #[error("{}, line {line}: `{text}` {why}", path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What stands there.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A trace says nothing.
    #[error("{}: there are no arrivals in it", .0.display())]
    EmptyTrace(PathBuf),
    /// A trace is no trace of anything that can be measured.
    #[error("{}: it is larger than {} MB", .0.display(), MOST_BYTES >> 20)]
    LongTrace(PathBuf),
    /// More arrivals than can be kept.
    #[error("{} queries a second are more than {MOST_ARRIVALS} in {} s; measure a shorter time, or at a lower rate", number(*.0), number(*.1))]
    TooMany(f64, f64),
    /// A file holds no report.
    #[error("{}: {why}", path.display())]
    NoReport {
        /// The file.
        path: PathBuf,
        /// What it is.
        why: String,
    },
    /// A file holds no true answers.
    #[error("{}: {why}", path.display())]
    NoTruths {
        /// The file.
        path: PathBuf,
        /// What it is.
        why: String,
    },
    /// A file holds no settings.
    #[error("{}: {why}", path.display())]
    NoSettings {
        /// The file.
        path: PathBuf,
        /// What it is.
        why: String,
    },
    /// A line of a file of records holds none.
    #[error("{}: line {line} is no record: {why}", path.display())]
    NoRecord {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// A file does not tell about records.
    #[error("{}: it does not tell about records: {why}", path.display())]
    NoAbout {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A condition names what reports do not have.
    #[error("both reports have no `{name}`; they have {known}")]
    UnknownFigure {
        /// What it names.
        name: String,
        /// What there is.
        known: String,
    },
    /// A server cannot be measured.
    #[error("{url}: {why}")]
    Server {
        /// What was asked of it.
        url: String,
        /// What came back.
        why: String,
    },
}

/// With an exponent where there would be many zeros.
pub(crate) fn number(value: f64) -> String {
    if value == 0.0 || (1e-4..1e9).contains(&value.abs()) || !value.is_finite() { value.to_string() } else { format!("{value:e}") }
}
