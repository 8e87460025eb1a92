//! Why a benchmark cannot begin or go on.

use std::path::PathBuf;

/// One clear line each.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Nothing arrives at such a rate.
    #[error("{0} is no rate: queries a second are a number above 0")]
    Rate(f64),
    /// Gaps have no such shape.
    #[error("{0} is no burstiness: a number above 0 is needed, 1 for Poisson arrivals, less for bursts")]
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
    /// A file holds no report.
    #[error("{}: {why}", path.display())]
    NoReport {
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
