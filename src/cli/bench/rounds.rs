//! Settings measured in turns: a process for each, all at once in memory or one after another.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser as _;
use clap::error::ErrorKind;
use indicatif::{ProgressBar, ProgressStyle};

use super::outputs::unwritable;
use super::process::Process;
use super::{Measure, Moment, typed, without_key};
use crate::bench::environment::{Load as MachineLoad, Machine};
use crate::bench::record::Record;
use crate::bench::report::Report;
use crate::bench::sweep::{SCHEMA, Setting, Sweep, VERSION};
use crate::bench::turns::joined;
use crate::bundle::{Bundle, Load};
use crate::cli::args::{Args, Command};
use crate::cli::failures::Failures;
use crate::cli::plain::one_line;
use crate::cli::{Failure, chain};
use crate::runtime::{Provider, ProviderChoice, free_memory};

/// What is measured.
pub(super) struct Order<'a> {
    /// What is typed behind `bench` for all.
    pub scenario: &'a [OsString],
    pub choices: &'a [Choice],
    pub rounds: NonZeroU16,
    /// Where reports are written.
    pub folder: &'a Path,
    /// Whether each turn has a process of its own, even where all fit into memory.
    pub apart: bool,
    pub stop: &'a AtomicBool,
}

/// What one setting has of all that is varied.
#[derive(Clone, Debug, Default)]
pub(super) struct Choice {
    /// Option and value.
    options: Vec<(String, String)>,
}

/// A setting while it is measured.
struct Lane {
    setting: Setting,
    args: Vec<OsString>,
    json: PathBuf,
    /// Records of a turn, where processes end after each.
    jsonl: PathBuf,
    /// What ended processes left.
    parts: Vec<(Report, Vec<Record>)>,
}

/// Who starts processes, gives out turns, and tells what becomes of them.
struct Watch<'a> {
    bar: ProgressBar,
    failures: &'a mut Failures,
    stop: &'a AtomicBool,
}

impl Choice {
    pub fn with(&self, name: &str, value: &str) -> Self {
        let mut options = self.options.clone();
        options.push((name.to_owned(), value.to_owned()));
        Self { options }
    }

    pub fn name(&self) -> String {
        self.options.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    }
}

impl Order<'_> {
    /// Measures all settings; what goes wrong with one is noted, and the others go on. Beside what was found, the reports in their order.
    pub fn run(&self, failures: &mut Failures) -> Result<(Sweep, Vec<Report>), Failure> {
        let (began, before, machine) = (Moment::now(), MachineLoad::now(), Machine::detect());
        let needed = self.choices.iter().map(|choice| look(self.scenario, choice, needed)).collect::<Result<Vec<_>, _>>()?;
        let apart = self.apart || !do_fit(&needed);
        let mut lanes: Vec<Lane> = self.choices.iter().enumerate().map(|(i, choice)| self.lane(i, choice, apart)).collect();
        let mut watch = Watch { bar: bar(usize::from(self.rounds.get()) * lanes.len()), failures, stop: self.stop };
        if apart {
            self.one_by_one(&mut lanes, &mut watch);
        } else {
            self.together(&mut lanes, &mut watch);
        }
        watch.bar.finish_and_clear();
        let mut reports = Vec::new();
        for lane in &mut lanes {
            reports.extend(lane.finish(self.rounds, apart)?);
        }
        let settings: Vec<Setting> = lanes.into_iter().map(|lane| lane.setting).collect();
        let mut sweep = Sweep {
            schema: SCHEMA.into(),
            version: VERSION,
            command: typed(),
            started: began.since_1970(),
            took_s: began.1.elapsed().as_secs_f64(),
            is_complete: settings.iter().all(|setting| setting.turns.len() == usize::from(self.rounds.get())),
            machine,
            load: [before, MachineLoad::since(&before)],
            scenario: without_key(self.scenario.iter().map(|word| word.to_string_lossy().into_owned())),
            rounds: usize::from(self.rounds.get()),
            apart,
            noise: None,
            noise_of_images: None,
            settings,
        };
        sweep.compare();
        Ok((sweep, reports))
    }

    fn lane(&self, index: usize, choice: &Choice, apart: bool) -> Lane {
        let name = choice.name();
        let file = format!("{}-{}.json", index + 1, of_a_file(&name));
        let (json, jsonl) = (self.folder.join(&file), self.folder.join(&file).with_extension("jsonl"));
        let mut args = words(self.scenario, choice);
        let mut own: Vec<OsString> = vec!["--turns".into(), self.rounds.to_string().into(), "--json".into(), json.clone().into()];
        if apart {
            own.extend(["--jsonl".into(), jsonl.clone().into()]);
        }
        args.splice(1..1, own);
        let setting = Setting { name, options: choice.options.clone(), report: Some(file), ..Setting::default() };
        Lane { setting, args, json, jsonl, parts: Vec::new() }
    }

    fn together(&self, lanes: &mut [Lane], watch: &mut Watch<'_>) {
        // One after another, so that none warms up beside one that loads.
        let mut running: Vec<Option<Process>> = lanes.iter_mut().map(|lane| watch.begin(lane)).collect();
        for _ in 0..self.rounds.get() {
            for (lane, process) in lanes.iter_mut().zip(&mut running) {
                watch.turn(lane, process);
            }
        }
        lanes.iter_mut().zip(running).for_each(|(lane, process)| watch.end(lane, process));
    }

    fn one_by_one(&self, lanes: &mut [Lane], watch: &mut Watch<'_>) {
        for _ in 0..self.rounds.get() {
            for lane in lanes.iter_mut().filter(|lane| lane.setting.failure.is_none()) {
                let mut process = watch.begin(lane);
                watch.turn(lane, &mut process);
                watch.end(lane, process);
            }
        }
    }
}

impl Watch<'_> {
    fn begin(&mut self, lane: &mut Lane) -> Option<Process> {
        if self.is_stopped() {
            return None;
        }
        self.bar.set_message(format!("{} loads and warms up", lane.setting.name));
        let mut process = match Process::start(&lane.args) {
            Ok(process) => process,
            Err(error) => return self.note(lane, format!("it cannot be started: {error}")),
        };
        if process.is_ready() { Some(process) } else { self.give_up(lane, process) }
    }

    /// The next of a setting, if it lives.
    fn turn(&mut self, lane: &mut Lane, running: &mut Option<Process>) {
        if self.is_stopped() {
            return;
        }
        let Some(process) = running else { return };
        self.bar.set_message(lane.setting.name.clone());
        match process.turn() {
            // One that was stopped in the middle is not as long as others.
            Some(turn) => lane.setting.turns.extend(Some(turn).filter(|_| !self.is_stopped())),
            None => *running = running.take().and_then(|process| self.give_up(lane, process)),
        }
        self.bar.inc(1);
    }

    /// Lets a process end, and keeps what it found.
    fn end(&mut self, lane: &mut Lane, process: Option<Process>) {
        let Some(process) = process else { return };
        let report = process.end().and_then(|()| Report::read(&lane.json).map_err(|error| chain(&error)));
        match report {
            Ok(report) => lane.parts.push((report, records(&lane.jsonl))),
            Err(why) => drop(self.note(lane, why)),
        }
    }

    /// Says why a process is of no more use.
    fn give_up(&mut self, lane: &mut Lane, process: Process) -> Option<Process> {
        let why = process.end().err().unwrap_or_else(|| "it ended before its turn".into());
        self.note(lane, why)
    }

    /// There is no process then.
    fn note(&mut self, lane: &mut Lane, why: String) -> Option<Process> {
        if !self.is_stopped() {
            let failure = Failure::Usage(format!("{}: {why}", lane.setting.name));
            self.bar.suspend(|| self.failures.note(failure));
        }
        lane.setting.failure = Some(why);
        None
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl Lane {
    /// Its report, with its name and as its file has it.
    fn finish(&mut self, rounds: NonZeroU16, apart: bool) -> Result<Option<Report>, Failure> {
        let parts = std::mem::take(&mut self.parts);
        let report = if apart { joined(parts) } else { parts.into_iter().next().map(|(report, _)| report) };
        // It is of no use without the others, and may not be there.
        let _ = std::fs::remove_file(&self.jsonl);
        let Some(report) = report else {
            let _ = std::fs::remove_file(&self.json);
            self.setting.report = None;
            return Ok(None);
        };
        let is_complete = self.setting.turns.len() == usize::from(rounds.get());
        let report = Report { label: Some(self.setting.name.clone()), is_complete, ..report };
        let json = serde_json::to_string_pretty(&report).expect("a report is JSON") + "\n";
        std::fs::write(&self.json, json).map_err(|source| unwritable(&self.json, source))?;
        self.setting = std::mem::take(&mut self.setting).with(&report);
        Ok(Some(report))
    }
}

/// Lines that are whole.
fn records(path: &Path) -> Vec<Record> {
    let lines = File::open(path).into_iter().flat_map(|file| BufReader::new(file).lines().map_while(Result::ok));
    lines.filter_map(|line| serde_json::from_str(&line).ok()).collect()
}

/// What `at` finds in what is typed behind `bench` for one setting, and in the number of pictures that are under way together; refuses
/// what cannot be typed so, or cannot be measured in turns.
pub(super) fn look<T>(scenario: &[OsString], choice: &Choice, at: impl FnOnce(&Measure, usize) -> T) -> Result<T, Failure> {
    let refused = |why: &str| Failure::Usage(format!("{}: {why}", choice.name()).trim_start_matches(": ").to_owned());
    let typed = ["blip2".into(), "bench".into()].into_iter().chain(words(scenario, choice));
    let args = Args::try_parse_from(typed).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => error.exit(),
        _ => refused(&first_paragraph(&error.to_string())),
    })?;
    let Command::Bench(bench) = &args.command else { unreachable!("that is what was parsed") };
    let (measure, at_once) = bench.scenario.in_turns().ok_or_else(|| refused("it is not measured in turns"))?;
    if measure.outputs.are_named() || measure.turns.is_some() {
        return Err(refused("the reports of settings are not named one by one; `bench sweep --into DIR` keeps them"));
    }
    Ok(at(measure, at_once))
}

/// What is typed behind `bench`: options stand where a `--` before a scenario's pictures cannot hide them.
fn words(scenario: &[OsString], choice: &Choice) -> Vec<OsString> {
    let (scenario, rest) = scenario.split_first().expect("clap wants one");
    let options = choice.options.iter().map(|(name, value)| format!("--{name}={value}").into());
    std::iter::once(scenario.clone()).chain(options).chain(rest.iter().cloned()).collect()
}

/// Bytes of the processor's memory, as far as they can be reckoned.
fn needed(measure: &Measure, at_once: usize) -> Option<u64> {
    let on_processor = matches!(measure.model.run.provider, ProviderChoice::Auto | ProviderChoice::Only(Provider::Cpu));
    if !on_processor || measure.server.url.is_some() || at_once == 0 {
        return None;
    }
    // A bundle that cannot be opened is refused by its own process, and the others go on.
    let bundle = Bundle::open(&measure.model.folder.path()).ok()?;
    Some(bundle.memory(Load { batch: at_once as u64, rows: None, new_tokens: None }).ok()?.peak())
}

/// Says on standard error where they do not.
fn do_fit(needed: &[Option<u64>]) -> bool {
    let all: u64 = needed.iter().flatten().sum();
    let Some(free) = free_memory().filter(|free| all > *free) else { return true };
    let [all, free] = [all, free].map(|bytes| bytes as f64 / 1e6);
    eprintln!("blip2: all settings need {all:.0} MB together, and {free:.0} MB are free: each turn has a process of its own");
    false
}

fn first_paragraph(text: &str) -> String {
    one_line(text.split("\n\n").next().unwrap_or(text).trim_start_matches("error: "))
}

/// Of a name, what any file system takes.
fn of_a_file(name: &str) -> String {
    name.chars().map(|char| if char.is_ascii_alphanumeric() || "=.-".contains(char) { char } else { '_' }).take(80).collect()
}

fn bar(n_turns: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} turns, {eta} left {msg}").expect("the template is written here");
    let bar = ProgressBar::new(n_turns as u64).with_style(style);
    bar.enable_steady_tick(std::time::Duration::from_millis(250));
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_into_memory_is_measured_apart() {
        assert!(do_fit(&[Some(1 << 20), None]) && do_fit(&[]));
        if cfg!(target_os = "linux") {
            assert!(!do_fit(&[Some(1 << 60), Some(1)]));
        }
    }

    #[test]
    fn names_become_files_and_options_stand_first() {
        assert_eq!(of_a_file("model=../a b beams=1"), "model=.._a_b_beams=1");
        let words = words(&["single".into(), "--".into(), "-x.png".into()], &Choice::default().with("beams", "2"));
        assert_eq!(words, ["single", "--beams=2", "--", "-x.png"]);
        assert_eq!(first_paragraph("error: no such thing:\n  --rate\n\nUsage: x"), "no such thing: --rate");
    }
}
