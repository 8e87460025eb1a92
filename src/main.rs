//! The `blip2` binary: parse, run, print what went wrong, exit code.

use std::process::ExitCode;

use blip2::Error;
use blip2::bundle::BundleError;
use blip2::cli::{self, Failure};
use blip2::prompt::PromptError;
use blip2::runtime::UnavailableError;
use blip2::server::ServeError;

fn main() -> ExitCode {
    #[cfg(unix)]
    without_telemetry();
    match cli::run(&cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            cli::report(&failure);
            exit_code(&failure)
        }
    }
}

/// ONNX Runtime's packages send reports to their makers, and keep an identity of the machine under the user's cache folder, unless the
/// environment forbids it before the library is loaded. A process cannot safely change its own, so this one begins anew with it.
#[cfg(unix)]
fn without_telemetry() {
    use std::os::unix::process::CommandExt as _;
    const NO_TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";
    if std::env::var_os(NO_TELEMETRY).is_none() {
        let mut typed = std::env::args_os();
        let name = typed.next().unwrap_or_default();
        let error = match std::env::current_exe() {
            Ok(program) => std::process::Command::new(program).arg0(name).args(typed).env(NO_TELEMETRY, "1").exec(),
            Err(error) => error,
        };
        eprintln!("blip2: warning: ONNX Runtime may send reports to its makers, for {NO_TELEMETRY}=1 cannot be set: {error}");
    }
}

/// Documented in README.md; clap itself exits with 2 for a wrong command line.
fn exit_code(failure: &Failure) -> ExitCode {
    ExitCode::from(match failure {
        Failure::Output(_) | Failure::File { .. } | Failure::Cache { .. } | Failure::Report { .. } | Failure::Worse(_) => 1,
        Failure::Stopped => 130, // as shells tell of Ctrl-C
        Failure::Usage(_) => 2,
        Failure::Picture { .. } | Failure::Pair { .. } => 3,
        Failure::Mismatch(_) => 4,
        Failure::Nothing => 5,
        Failure::Engine(error) | Failure::Serve(ServeError::Engine(error)) => of_engine(error),
        Failure::Serve(ServeError::Listen { .. } | ServeError::Threads(_)) => 1,
        Failure::Serve(_) => 2,
        Failure::Text { source: error, .. } => of_engine(error),
        Failure::Reported(first) | Failure::Row { source: first, .. } | Failure::About { source: first, .. } => {
            return exit_code(first);
        }
    })
}

fn of_engine(error: &Error) -> u8 {
    match error {
        Error::Runtime(error) if error.blames_the_bundle() => 4,
        Error::Runtime(_) | Error::Busy | Error::Lost | Error::Overloaded | Error::Late | Error::Gone => 1,
        Error::Unavailable(UnavailableError::Provider(error)) if error.blames_the_options() => 2,
        Error::Strategy(_) | Error::Prompt(PromptError::Template(_)) | Error::Unavailable(UnavailableError::Threads(_)) => 2,
        Error::Picture(_) | Error::NoPicture | Error::Prompt(_) | Error::NoSuchRequest(_) => 3,
        Error::Unavailable(_)
        | Error::Bundle(BundleError::Unfit { .. } | BundleError::NotBuilt { .. } | BundleError::Inexact { .. }) => 5,
        Error::Bundle(_) => 4,
    }
}
