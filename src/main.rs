//! The `blip2` binary: parse, run, print what went wrong, exit code.

use std::process::ExitCode;

use blip2::Error;
use blip2::cli::{self, Failure};

fn main() -> ExitCode {
    match cli::run(&cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            cli::report(&failure);
            exit_code(&failure)
        }
    }
}

/// Documented in README.md; clap itself exits with 2 for a wrong command line.
fn exit_code(failure: &Failure) -> ExitCode {
    ExitCode::from(match failure {
        Failure::Engine(Error::Runtime(error)) if error.blames_the_bundle() => 4,
        Failure::Engine(Error::Runtime(_)) | Failure::Output(_) | Failure::File { .. } => 1,
        Failure::Usage(_) | Failure::Engine(Error::Strategy(_)) => 2,
        Failure::Picture { .. } | Failure::Engine(Error::Picture(_) | Error::Prompt(_)) => 3,
        Failure::Mismatch(_) | Failure::Engine(Error::Bundle(_)) => 4,
        Failure::Engine(Error::Unavailable(_)) | Failure::Nothing => 5,
        Failure::Reported(first) => return exit_code(first),
    })
}
