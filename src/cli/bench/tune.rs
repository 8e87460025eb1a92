//! `blip2 bench tune`

use std::ffi::OsString;
use std::io::{Write as _, stdout};
use std::num::{NonZeroU16, NonZeroUsize};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::ValueEnum;

use super::inputs::Folder;
use super::outputs::{can_be_written, unwritable};
use super::rounds::{Choice, Order, look};
use super::{Moment, stopped_by_signals, sweep};
use crate::bench::environment::Machine;
use crate::bench::settings::{Goal, SCHEMA, Settings, VERSION, best};
use crate::bench::sweep::Sweep;
use crate::bundle::{Bundle, Load};
use crate::cli::Failure;
use crate::cli::args::DEFAULT_BATCH;
use crate::cli::failures::Failures;
use crate::error::Error;
use crate::runtime::{default_threads, free_memory};

/// Numbers of threads between which nothing surprising happens.
const THREADS: [usize; 15] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256];
/// Pictures together that are tried.
const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];

#[derive(Debug, clap::Args)]
pub(super) struct Tune {
    /// What settings are to be best for: one query at a time, soon; or many in a second
    #[arg(long = "for", value_name = "GOAL", value_enum)]
    goal: For,
    /// The settings file, for --settings of other commands
    #[arg(long, value_name = "FILE")]
    write: PathBuf,
    /// Turns of each setting, 2 at least
    #[arg(long, value_name = "N", default_value = "5", value_parser = sweep::rounds)]
    rounds: NonZeroU16,
    /// What `bench single` takes, or `bench offline` for throughput: --model, --task, pictures and so on, but not what is looked for
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    options: Vec<OsString>,
}

/// As it is typed.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum For {
    /// One query at a time: threads
    Latency,
    /// Many queries together: threads, and how many
    Throughput,
}

/// What goes on while settings are looked for.
struct Search<'a> {
    /// The scenario, with what all settings have in common.
    scenario: Vec<OsString>,
    goal: Goal,
    rounds: NonZeroU16,
    folder: Folder,
    stop: &'a AtomicBool,
    failures: Failures,
    tried: Vec<Sweep>,
    /// Of the last report.
    provider: String,
}

pub(super) fn run(command: &Tune) -> Result<(), Failure> {
    let (began, goal) = (Moment::now(), Goal::from(command.goal));
    let name = if goal == Goal::Latency { "single" } else { "offline" };
    let scenario: Vec<OsString> = std::iter::once(name.into()).chain(command.options.iter().cloned()).collect();
    // What is looked for is refused here where it was typed.
    let any = Choice::default().with("threads", "1");
    let (path, url) = look(&scenario, &any, |measure, _| (measure.model.folder.path(), measure.server.url.clone()))?;
    if url.is_some() {
        return Err(Failure::Usage("--url names a server, whose threads are its own".into()));
    }
    let bundle = Bundle::open(&path).map_err(Error::from)?;
    can_be_written(&command.write)?;
    let (folder, stop) = (Folder::new("tune")?, stopped_by_signals()?);
    let (rounds, failures) = (command.rounds, Failures::default());
    let mut search = Search { scenario, goal, rounds, folder, stop, failures, tried: Vec::new(), provider: String::new() };
    let (threads, batch) = search.find(&bundle)?;
    let settings = Settings {
        schema: SCHEMA.into(),
        version: VERSION,
        measured: began.since_1970(),
        goal,
        machine: Machine::detect(),
        model: bundle.facts().name.clone(),
        model_sha256: bundle.hash(),
        provider: search.provider,
        threads,
        batch,
        tried: search.tried,
    };
    let json = serde_json::to_string_pretty(&settings).expect("settings are JSON") + "\n";
    std::fs::write(&command.write, json).map_err(|source| unwritable(&command.write, source))?;
    let shown = |n: Option<NonZeroUsize>| n.map_or_else(|| "the default".to_owned(), |n| n.to_string());
    writeln!(stdout().lock(), "best: threads {}, batch {}", shown(threads), shown(batch))?;
    search.failures.end()
}

impl Search<'_> {
    /// Threads and pictures together, where others than the defaults are better: threads first, then the number of pictures with them.
    fn find(&mut self, bundle: &Bundle) -> Result<(Option<NonZeroUsize>, Option<NonZeroUsize>), Failure> {
        let (default, most) = (default_threads().get(), std::thread::available_parallelism().map_or(1, NonZeroUsize::get));
        let others = THREADS.into_iter().filter(|n| *n <= most && *n != default).collect();
        if self.goal == Goal::Latency {
            return Ok((self.best_of("threads", default, others)?, None));
        }
        self.scenario.insert(1, format!("--concurrency={DEFAULT_BATCH}").into());
        let threads = self.best_of("threads", default, others)?;
        self.scenario[1] = format!("--threads={}", threads.map_or(default, NonZeroUsize::get)).into();
        let free = free_memory().unwrap_or(u64::MAX);
        let mut fitting = Vec::new();
        for n in BATCHES.into_iter().filter(|n| *n != DEFAULT_BATCH) {
            let needed = bundle.memory(Load { batch: n as u64, rows: None, new_tokens: None }).map_err(Error::from)?.peak();
            fitting.extend(Some(n).filter(|_| needed <= free));
        }
        Ok((threads, self.best_of("concurrency", DEFAULT_BATCH, fitting)?))
    }

    /// The best value of an option, shown with all others; nothing where that is the default.
    fn best_of(&mut self, option: &str, default: usize, others: Vec<usize>) -> Result<Option<NonZeroUsize>, Failure> {
        let values: Vec<usize> = std::iter::once(default).chain(others).collect();
        if values.len() == 1 {
            return Ok(None);
        }
        let choices: Vec<Choice> = values.iter().map(|value| Choice::default().with(option, &value.to_string())).collect();
        let Self { scenario, rounds, stop, .. } = self;
        let order = Order { scenario, choices: &choices, rounds: *rounds, folder: self.folder.path(), apart: false, stop };
        let (mut sweep, reports) = order.run(&mut self.failures)?;
        writeln!(stdout().lock(), "{}", sweep.markdown())?;
        if self.stop.load(Ordering::Relaxed) {
            return Err(Failure::Stopped);
        }
        if sweep.settings[0].figures.is_none() {
            return Err(Failure::Usage(format!("{option} {default}, the default, cannot be measured: nothing was written")));
        }
        sweep.settings.iter_mut().for_each(|setting| setting.report = None);
        self.provider = reports.into_iter().next().map_or_else(String::new, |report| report.subject.provider);
        let best = best(&sweep, self.goal);
        self.tried.push(sweep);
        Ok(NonZeroUsize::new(values[best]).filter(|_| best > 0))
    }
}

impl From<For> for Goal {
    fn from(typed: For) -> Self {
        match typed {
            For::Latency => Self::Latency,
            For::Throughput => Self::Throughput,
        }
    }
}
