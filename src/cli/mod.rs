//! The command line: one file per command. The only door to `clap`.
//!
//! Results go to standard output, everything else to standard error.

mod ahead;
mod args;
mod ask;
mod bench;
mod build;
mod caption;
mod doctor;
mod embed;
mod failures;
mod inspect;
mod lists;
mod matching;
mod npy;
mod output;
mod pictures;
mod plain;
mod progress;
mod rank;
mod rerank;
mod serve;
mod texts;
mod verify;

use std::path::PathBuf;

use clap::Parser;

use crate::error::Error;
use crate::pixels::PixelsError;
use crate::server::ServeError;

pub use args::Args;
use args::Command;
use plain::{one_line, plain};

/// Why a command ends with another exit code than 0.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line asks for something that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// A picture cannot be used.
    #[error("{}", plain(&.path.to_string_lossy()))]
    Picture {
        /// The picture, as it was typed.
        path: PathBuf,
        /// Why.
        source: PixelsError,
    },
    /// What went wrong with one of several pictures.
    #[error("{}", plain(&.path.to_string_lossy()))]
    About {
        /// The picture, as it was named.
        path: PathBuf,
        /// Why.
        source: Box<Failure>,
    },
    /// A line of pairs cannot be read.
    #[error("line {line} of {}: {why}", plain(&.file.to_string_lossy()))]
    Pair {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// One of several texts cannot be used.
    #[error("{kind} {place}, `{text}`")]
    Text {
        /// What it is.
        kind: &'static str,
        /// Its place, from 1.
        place: usize,
        /// Its beginning.
        text: String,
        /// Why.
        source: Box<Error>,
    },
    /// An item has no vectors for an array, whose other rows are written.
    #[error("row {row} of {} is NaN", plain(&.path.to_string_lossy()))]
    Row {
        /// The row, from 0.
        row: usize,
        /// The array's file.
        path: PathBuf,
        /// Why.
        source: Box<Failure>,
    },
    /// The engine reports an error.
    #[error(transparent)]
    Engine(#[from] Error),
    /// A server does not start.
    #[error(transparent)]
    Serve(ServeError),
    /// A file cannot be written.
    #[error("{} cannot be written", plain(&.path.to_string_lossy()))]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ndarray_npy::WriteNpyError,
    },
    /// The folder of built engines cannot be written.
    #[error("the cache of engines cannot be written at {}", plain(&.path.to_string_lossy()))]
    Cache {
        /// The folder.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A report cannot be written.
    #[error("{} cannot be written", plain(&.path.to_string_lossy()))]
    Report {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Figures changed more than they may.
    #[error("{0} of the conditions above hold")]
    Worse(usize),
    /// A measurement was stopped from outside, after its report was written.
    #[error("stopped; the report is of what was measured until then")]
    Stopped,
    /// Standard output is closed or full.
    #[error("cannot write to standard output")]
    Output(#[from] std::io::Error),
    /// A bundle gives other outputs than its reference.
    #[error("{0} of the checks above failed")]
    Mismatch(usize),
    /// No execution provider works.
    #[error("no execution provider is usable")]
    Nothing,
    /// The first of several failures, all of which were reported when they happened.
    #[error(transparent)]
    Reported(Box<Failure>),
}

/// Parses the command line; exits with 2 and an explanation if it is wrong.
pub fn parse() -> Args {
    Args::parse()
}

/// Runs the command.
pub fn run(args: &Args) -> Result<(), Failure> {
    match &args.command {
        Command::Caption(command) => caption::run(command),
        Command::Ask(command) => ask::run(command),
        Command::Match(command) => matching::run(command),
        Command::Embed(command) => embed::run(command),
        Command::Rank(command) => rank::run(command),
        Command::Serve(command) => serve::run(command),
        Command::Verify(command) => verify::run(command),
        Command::Inspect(command) => inspect::run(command),
        Command::Bench(command) => bench::run(command),
        Command::Build(command) => build::run(command),
        Command::Doctor(command) => doctor::run(command),
    }
}

/// Prints a failure and its causes in one line. A reader that went away is no news.
pub fn report(failure: &Failure) {
    match failure {
        Failure::Reported(_) => {}
        Failure::Output(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        failure => eprintln!("blip2: {}", chain(failure)),
    }
}

fn chain(failure: &(dyn std::error::Error + 'static)) -> String {
    let mut whole = one_line(&failure.to_string());
    let mut cause = failure.source();
    while let Some(error) = cause {
        let text = one_line(&error.to_string());
        // Some libraries repeat their cause in their own text.
        if !whole.contains(&text) {
            whole = format!("{whole}: {text}");
        }
        cause = error.source();
    }
    whole
}
