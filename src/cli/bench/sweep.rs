//! `blip2 bench sweep`

use std::ffi::OsString;
use std::io::{Write as _, stdout};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::Ordering;

use super::inputs::Folder;
use super::outputs::{can_be_written, unwritable};
use super::rounds::{Choice, Order};
use super::stopped_by_signals;
use crate::bench::html::page;
use crate::bench::report::Report;
use crate::cli::Failure;
use crate::cli::failures::Failures;

/// More are a mistake in typing.
const MOST_SETTINGS: usize = 64;

#[derive(Debug, clap::Args)]
pub(super) struct Sweep {
    /// An option of the scenario and its values, such as `threads=1,2,4`; may be given several times, for all combinations
    #[arg(long, value_name = "NAME=V1,V2", required = true)]
    vary: Vec<Varied>,
    /// Turns of each setting, 2 at least. A turn measures its share of the scenario's --queries and --duration
    #[arg(long, value_name = "N", default_value = "5", value_parser = rounds)]
    rounds: NonZeroU16,
    /// Start a process for every turn, so that one bundle is in memory at a time; so it is anyway where all do not fit into the
    /// processor's memory. What a GPU has is not looked at
    #[arg(long)]
    apart: bool,
    /// A folder for the report of each setting and for sweep.json, which is about all
    #[arg(long, value_name = "DIR")]
    into: Option<PathBuf>,
    /// What sweep.json has
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// A page with tables and plots of all settings
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// A scenario with its own options, as they are typed behind `bench`
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "SCENARIO")]
    scenario: Vec<OsString>,
}

/// An option and its values.
#[derive(Clone, Debug, PartialEq)]
struct Varied {
    name: String,
    values: Vec<String>,
}

pub(super) fn run(command: &Sweep) -> Result<(), Failure> {
    let choices = choices(&command.vary)?;
    let temporary = if command.into.is_none() { Some(Folder::new("sweep")?) } else { None };
    let folder = command.into.as_deref().or(temporary.as_ref().map(Folder::path)).expect("one of both");
    std::fs::create_dir_all(folder).map_err(|source| unwritable(folder, source))?;
    for path in [&command.json, &command.html].into_iter().flatten() {
        can_be_written(path)?;
    }
    let stop = stopped_by_signals()?;
    let Sweep { scenario, rounds, apart, .. } = command;
    let order = Order { scenario, choices: &choices, rounds: *rounds, folder, apart: *apart, stop };
    let mut failures = Failures::default();
    let (mut sweep, reports) = order.run(&mut failures)?;
    if temporary.is_some() {
        sweep.settings.iter_mut().for_each(|setting| setting.report = None);
    }
    let json = serde_json::to_string_pretty(&sweep).expect("a sweep is JSON") + "\n";
    let inside = command.into.as_ref().map(|folder| folder.join("sweep.json"));
    for path in [inside.as_ref(), command.json.as_ref()].into_iter().flatten() {
        std::fs::write(path, &json).map_err(|source| unwritable(path, source))?;
    }
    command.write_page(&reports)?;
    stdout().lock().write_all(sweep.markdown().as_bytes())?;
    if stop.load(Ordering::Relaxed) { Err(Failure::Stopped) } else { failures.end() }
}

impl Sweep {
    fn write_page(&self, reports: &[Report]) -> Result<(), Failure> {
        let Some(path) = self.html.as_ref().filter(|_| !reports.is_empty()) else { return Ok(()) };
        std::fs::write(path, page(reports)).map_err(|source| unwritable(path, source))
    }
}

impl FromStr for Varied {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        let bad = || format!("`{typed}` names no option with its values; `threads=1,2,4` does");
        let (name, values) = typed.split_once('=').ok_or_else(bad)?;
        let name = name.trim().trim_start_matches("--");
        let values: Vec<String> = values.split(',').map(|value| value.trim().to_owned()).collect();
        if name == "api-key" {
            return Err("keys are not varied: reports would tell them".into());
        }
        if name.is_empty() || values.iter().any(String::is_empty) {
            return Err(bad());
        }
        Ok(Self { name: name.to_owned(), values })
    }
}

/// All combinations; those of the last option change soonest.
fn choices(varied: &[Varied]) -> Result<Vec<Choice>, Failure> {
    let mut found = vec![Choice::default()];
    for (i, Varied { name, values }) in varied.iter().enumerate() {
        if varied[..i].iter().any(|before| before.name == *name) {
            return Err(Failure::Usage(format!("--vary names {name} twice; all its values stand behind one `{name}=`")));
        }
        found = found.iter().flat_map(|choice| values.iter().map(|value| choice.with(name, value))).collect();
        if found.len() > MOST_SETTINGS {
            return Err(Failure::Usage(format!("these are more than {MOST_SETTINGS} settings")));
        }
    }
    if found.len() < 2 {
        return Err(Failure::Usage(
            "there is one setting; another value of --vary makes two, and the same value may stand twice".into(),
        ));
    }
    Ok(found)
}

/// An interval needs two.
pub(super) fn rounds(typed: &str) -> Result<NonZeroU16, String> {
    let n = typed.parse::<NonZeroU16>().ok().filter(|n| n.get() >= 2);
    n.ok_or_else(|| "2 rounds at least are needed, or nothing tells how much turns differ".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn varied(typed: &[&str]) -> Vec<Varied> {
        typed.iter().map(|typed| typed.parse().expect("an option")).collect()
    }

    #[test]
    fn all_combinations_are_settings() {
        let found = choices(&varied(&["threads=1,2", "--beams=1,5"])).expect("four");
        let names: Vec<_> = found.iter().map(Choice::name).collect();
        assert_eq!(names, ["threads=1 beams=1", "threads=1 beams=5", "threads=2 beams=1", "threads=2 beams=5"]);
        assert_eq!(choices(&varied(&["model=a,a"])).expect("two").len(), 2);
        for (typed, part) in [
            (&["threads=1"][..], "one setting"),
            (&["threads=1,2", "threads=3"], "twice"),
            (&["threads=1,2,3,4,5,6,7,8,9", "beams=1,2,3,4,5,6,7,8"], "more than 64"),
        ] {
            let error = choices(&varied(typed)).expect_err(part).to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn what_names_no_values_is_refused() {
        for typed in ["threads", "threads=", "=1,2", "threads=1,,2", "--=1", "api-key=a,b"] {
            assert!(typed.parse::<Varied>().is_err(), "{typed}");
        }
        assert!(rounds("0").is_err() && rounds("1").is_err() && rounds("two").is_err() && rounds("2").is_ok());
    }
}
