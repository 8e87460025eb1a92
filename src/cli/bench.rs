//! `blip2 bench`

mod inputs;
mod live;
mod outputs;
mod plan;
mod process;
mod recorded;
mod rounds;
mod stage;
mod sweep;
mod tune;
mod turns;

use std::io::{Write as _, stdout};
use std::num::{NonZeroU16, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Subcommand, ValueEnum};

use super::Failure;
use super::args::Model;
use super::plain::plain;
use crate::bench::arrivals::{Rate, Spacing, trace};
use crate::bench::compare::{self, Condition};
use crate::bench::energy::Meter;
use crate::bench::environment::{self, Load as MachineLoad, Machine};
use crate::bench::figures::{Figures, Objectives};
use crate::bench::html::page;
use crate::bench::http::{self, Http};
use crate::bench::keep::Kept;
use crate::bench::load::{Load, Run, Target};
use crate::bench::local::Local;
use crate::bench::memory::{Drift, Memory, Watch};
use crate::bench::number;
use crate::bench::record::Record;
use crate::bench::report::{self, Report, Subject};
use crate::bench::startup::{Program, Startup};
use crate::bundle::Bundle;
use crate::engine::Engine;
use crate::runtime::default_threads;
use crate::service::{self, Service};
use inputs::{Files, Folder, Inputs};
use live::Live;
use outputs::Outputs;
use plan::Plan;
use stage::{Limiting, Stage};

/// With many more, there is no memory left for what is measured.
const MOST: usize = 10_000;
const KEY_OPTION: &str = "--api-key";
/// Queries that `offline` has under way together.
const AT_ONCE: usize = 16;

#[derive(Debug, clap::Args)]
pub(super) struct Bench {
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Debug, Subcommand)]
enum Scenario {
    /// One query at a time, the next when it has ended (MLPerf's SingleStream)
    Single(Measure),
    /// Queries of several pictures, one at a time (MLPerf's MultiStream)
    Multi {
        /// Pictures in a query
        #[arg(long, value_name = "N", default_value = "8", value_parser = few)]
        pictures: NonZeroUsize,
        #[command(flatten)]
        measure: Measure,
    },
    /// Everything at once: how much is done in a second (MLPerf's Offline)
    Offline {
        /// Queries that are under way together [default: --settings', else 16]
        #[arg(long, value_name = "N", value_parser = few)]
        concurrency: Option<NonZeroUsize>,
        #[command(flatten)]
        measure: Measure,
    },
    /// Queries come at a rate, whether or not earlier ones have ended (MLPerf's Server); latency counts from when each was due
    Server(Server),
    /// The program is started anew for every caption or answer: from its start to the answer. TensorRT's engines are those that `blip2 build`
    /// keeps
    Startup {
        /// Let the page cache forget the bundle before each start, as after the machine's own
        #[arg(long)]
        cold: bool,
        #[command(flatten)]
        measure: Measure,
    },
    /// Parts of a request alone, in turn: from decoding the picture to the text, and how far each is from what the machine can do at most
    Stage(Box<Stage>),
    /// A few at a time for hours: whether memory grows, and latency
    #[command(mut_arg("duration", |arg| arg.default_value("3600")))]
    Soak {
        /// Queries that are under way together
        #[arg(long, value_name = "N", default_value = "4", value_parser = few)]
        concurrency: NonZeroUsize,
        #[command(flatten)]
        measure: Measure,
    },
    /// Settings of a scenario beside each other, measured in turns
    Sweep(sweep::Sweep),
    /// Find the best number of threads, and of pictures together, for this machine and bundle
    Tune(tune::Tune),
    /// Two reports beside each other
    Compare(Compare),
    /// A report of queries that were measured before, by this program or another
    Report(recorded::Recorded),
    /// One page with tables and plots of reports
    Page {
        /// Reports (JSON)
        #[arg(required = true, value_name = "REPORT")]
        reports: Vec<PathBuf>,
        /// The page (HTML)
        #[arg(long, value_name = "FILE")]
        html: PathBuf,
    },
    /// What every field of a report means, as JSON Schema; `Record` in it is a line of --jsonl
    Schema,
}

#[derive(Debug, clap::Args)]
struct Server {
    /// Queries a second
    #[arg(long, value_name = "X", allow_negative_numbers = true, required_unless_present = "trace")]
    rate: Option<f64>,
    /// Gaps between arrivals: 1 as if they did not know of each other (Poisson), less in bursts, more evenly, inf all equal
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    burstiness: f64,
    /// Arrivals from a file instead: seconds from the start, one a line
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rate", "burstiness"])]
    trace: Option<PathBuf>,
    #[command(flatten)]
    measure: Measure,
}

#[derive(Debug, clap::Args)]
struct Compare {
    /// A report (JSON)
    before: PathBuf,
    /// Another, of the same work on the same machine
    after: PathBuf,
    /// End with 1 if this holds: `p99>+5%`, `time_to_first_token.p50>+10%`, `images<-3%`; may be given several times
    #[arg(long, value_name = "CONDITION")]
    fail_if: Vec<Condition>,
    /// Compare what was measured on other machines or with other work all the same
    #[arg(long)]
    anyway: bool,
}

/// What is measured, how long, and where it is written.
#[derive(Debug, clap::Args)]
struct Measure {
    #[command(flatten)]
    inputs: Inputs,
    /// Queries to measure at least; of `stage`, rounds
    #[arg(long, visible_alias = "rounds", value_name = "N", default_value = "100")]
    queries: NonZeroUsize,
    /// Seconds to measure at least
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds, allow_negative_numbers = true)]
    duration: Duration,
    /// Seconds to warm up at most; it ends earlier once latencies stay
    #[arg(long, value_name = "S", default_value = "30", value_parser = seconds, allow_negative_numbers = true)]
    warm_up: Duration,
    /// Of whatever is drawn
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Answers that are good enough: `e2e=500,ttft=200,tpot=50`, in milliseconds
    #[arg(long, value_name = "LIMITS", value_parser = objectives, default_value = "", hide_default_value = true)]
    slo: Objectives,
    /// Measure in so many parts, each when a line comes on standard input
    #[arg(long, value_name = "N", hide = true)]
    turns: Option<NonZeroU16>,
    #[command(flatten)]
    outputs: Outputs,
    #[command(flatten)]
    server: At,
    #[command(flatten)]
    model: Model,
}

/// Where queries go, if not to an engine in this process.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Server")]
struct At {
    /// Measure a server that speaks OpenAI's chat completions instead, ours or any other: http://HOST:PORT/v1. No bundle is loaded then,
    /// and what stands below says nothing
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The model to ask it for [default: the first that it lists]
    #[arg(long, value_name = "NAME", requires = "url")]
    served_model: Option<String>,
    /// The key to show it
    #[arg(long, value_name = "KEY", env = "BLIP2_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
}

/// What is wanted of every picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Task {
    /// A caption
    Caption,
    /// An answer to each question in turn
    Ask,
    /// How well the texts fit
    Match,
    /// Its vectors
    Embed,
}

pub(super) fn run(command: &Bench) -> Result<(), Failure> {
    match &command.scenario {
        Scenario::Single(measure) => measured(measure, &Plan::closed("single", 1, 1), Source::Here),
        Scenario::Multi { pictures, measure } => measured(measure, &Plan::closed("multi", 1, pictures.get()), Source::Here),
        Scenario::Offline { concurrency, measure } => {
            measured(measure, &Plan::closed("offline", measure.at_once(*concurrency), 1), Source::Here)
        }
        Scenario::Server(server) => measured(&server.measure, &server.plan()?.fit_for(server.measure.turns)?, Source::Here),
        Scenario::Startup { cold, measure } => {
            let how = if *cold { "started anew, the bundle not in memory" } else { "started anew, the bundle in memory" };
            measured(
                measure,
                &Plan { arrivals: how.into(), window: 1, ..Plan::closed("startup", 1, 1) },
                Source::Program { cold: *cold },
            )
        }
        Scenario::Stage(stage) => measured(&stage.measure, &Stage::plan(), Source::Stages(stage)),
        Scenario::Soak { concurrency, measure } => {
            measured(measure, &Plan { soaks: true, ..Plan::closed("soak", concurrency.get(), 1) }, Source::Here)
        }
        Scenario::Sweep(command) => sweep::run(command),
        Scenario::Tune(command) => tune::run(command),
        Scenario::Compare(compare) => compared(compare),
        Scenario::Schema => Ok(writeln!(stdout().lock(), "{}", report::schema())?),
        Scenario::Report(command) => recorded::run(command),
        Scenario::Page { reports, html } => {
            let reports = reports.iter().map(|path| read(path)).collect::<Result<Vec<_>, _>>()?;
            std::fs::write(html, page(&reports)).map_err(|source| Failure::Report { path: html.clone(), source })
        }
    }
}

impl Scenario {
    /// What it measures, and how many queries are under way together; nothing where it is none that can be measured in turns.
    fn in_turns(&self) -> Option<(&Measure, usize)> {
        match self {
            Self::Single(measure) | Self::Server(Server { measure, .. }) | Self::Startup { measure, .. } => Some((measure, 1)),
            Self::Multi { pictures, measure } => Some((measure, pictures.get())),
            Self::Offline { concurrency, measure } => Some((measure, measure.at_once(*concurrency))),
            Self::Stage(stage) => Some((&stage.measure, 1)),
            Self::Soak { .. }
            | Self::Sweep(_)
            | Self::Tune(_)
            | Self::Compare(_)
            | Self::Report(_)
            | Self::Page { .. }
            | Self::Schema => None,
        }
    }
}

/// What answers, and what is known of it.
struct Opened {
    target: Box<dyn Target>,
    names: Vec<String>,
    subject: Subject,
    /// Holds pictures until all is measured.
    folder: Option<Folder>,
    /// What stages are held against.
    limits: Option<Limiting>,
}

/// Who answers.
#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    /// An engine in this process, or the server that was named.
    Here,
    /// The parts of an engine in this process.
    Stages(&'a Stage),
    /// This program, started for every query.
    Program { cold: bool },
}

fn measured(measure: &Measure, plan: &Plan, source: Source<'_>) -> Result<(), Failure> {
    let (began, before, machine) = (Moment::now(), MachineLoad::now(), Machine::detect());
    let mut journal = measure.outputs.open()?;
    let Opened { mut target, names, subject, folder: _folder, limits } = measure.open(source)?;
    let truths = measure.inputs.truths(&names)?;
    let (stop, mut kept) = (stopped_by_signals()?, Kept::new(measure.slo, plan.most_records()));
    let (mut live, mut broken) = (Live::new(plan.n_queries(measure.queries.get())), None);
    let mut on_record = |record: &Record| {
        live.note(record);
        broken = broken.take().or_else(|| journal.note(record).err());
    };
    let (truths, n_pictures) = (truths.as_ref(), plan.n_pictures);
    let mut run = Run { target: &mut *target, inputs: &names, n_pictures, stop, truths, on_record: &mut on_record };
    plan.warm_up(&mut run, measure.warm_up).into_iter().for_each(|record| kept.add(record));
    let is_here = measure.server.url.is_none();
    let is_local = is_here && matches!(source, Source::Here);
    let (watch, meter) = ((plan.soaks && is_local).then(Watch::start), is_here.then(Meter::start).flatten());
    let is_complete = turns::measure(plan, measure, &mut run, &mut kept);
    let (memory, energy) = (watch.and_then(Watch::end), meter.map(|meter| meter.stop(kept.n_images())).unwrap_or_default());
    live.end();
    broken.iter().for_each(|failure| eprintln!("blip2: {failure}; what is measured goes on without it"));
    let figures = figures(&kept, memory.as_ref())?;
    let report = Report {
        command: typed(),
        started: began.since_1970(),
        took_s: began.1.elapsed().as_secs_f64(),
        is_complete,
        machine,
        load: [before, MachineLoad::since(&before)],
        limits: limits.map(|limits| limits.end(&figures, is_complete)),
        peak_resident_bytes: is_local.then(environment::peak_resident_bytes).flatten(),
        energy,
        memory,
        drift: Some(kept.records()).filter(|_| plan.soaks).and_then(Drift::of),
        ..Report::new(subject, plan.work(measure, names.len()), figures, kept.records())
    };
    measure.outputs.write(&report, kept.records())?;
    if is_complete { Ok(()) } else { Err(Failure::Stopped) }
}

/// What was found, and what memory has against it.
fn figures(kept: &Kept, memory: Option<&Memory>) -> Result<Figures, Failure> {
    let mut figures = kept.figures().ok_or_else(|| Failure::Usage(nothing(kept.records())))?;
    let growth = memory.and_then(|memory| memory.growth);
    figures.objections.extend(growth.and_then(|growth| growth.objection()));
    Ok(figures)
}

/// The command line, fit for others to read.
fn typed() -> Vec<String> {
    without_key(std::env::args_os().map(|word| word.to_string_lossy().into_owned()))
}

/// A time that can be told and one that can be counted from.
struct Moment(SystemTime, Instant);

impl Moment {
    fn now() -> Self {
        Self(SystemTime::now(), Instant::now())
    }

    fn since_1970(&self) -> u64 {
        self.0.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
    }
}

impl Measure {
    fn open(&self, source: Source<'_>) -> Result<Opened, Failure> {
        match source {
            Source::Stages(stage) => stage.open(),
            Source::Here if self.server.url.is_some() => self.connect(),
            Source::Here => self.load(),
            Source::Program { .. } if self.server.url.is_some() => {
                Err(Failure::Usage("--url names a server, which is not started".into()))
            }
            Source::Program { cold } => self.start(cold),
        }
    }

    /// Queries of `offline` that are under way together, typed or not.
    fn at_once(&self, typed: Option<NonZeroUsize>) -> usize {
        typed.or_else(|| self.model.batch_of_settings()).map_or(AT_ONCE, NonZeroUsize::get)
    }

    /// This program, for every query.
    fn start(&self, cold: bool) -> Result<Opened, Failure> {
        let bundle = self.model.bundle()?;
        let [before, behind] = self.inputs.typed(&self.model)?;
        let Files { names, paths, folder } = self.inputs.files(&bundle, self.seed)?;
        let unknown = |error: std::io::Error| Failure::Usage(format!("this program's own file is not known: {error}"));
        let files = bundle.facts().files.keys().map(|file| bundle.path(file));
        let forgets = if cold { files.collect() } else { Vec::new() };
        let program = Program { path: std::env::current_exe().map_err(unknown)?, args: [before, behind], forgets };
        let subject = Subject {
            provider: self.model.run.provider.to_string(),
            threads: self.model.threads().map(NonZeroUsize::get),
            ..of(&bundle)
        };
        Ok(Opened { target: Box::new(Startup::new(program, paths)), names, subject, folder, limits: None })
    }

    /// An engine in this process.
    fn load(&self) -> Result<Opened, Failure> {
        let bundle = self.model.bundle()?;
        let inputs = self.inputs.read(&bundle, self.seed)?;
        let loading = Instant::now();
        let engine = self.model.load(bundle)?;
        let subject = self.subject(&engine, loading.elapsed());
        let names = inputs.iter().map(|input| input.name.clone()).collect();
        let wanted = inputs.into_iter().map(|input| (input.picture, input.want)).collect();
        let target = Box::new(Local::new(
            Service::start(engine, service::Options { n_ready: default_threads().get(), ..Default::default() }),
            wanted,
        ));
        Ok(Opened { target, names, subject, folder: None, limits: None })
    }

    /// A server elsewhere.
    fn connect(&self) -> Result<Opened, Failure> {
        let inputs = self.inputs.asked(self.seed)?;
        let (names, asked): (Vec<_>, Vec<_>) = inputs.into_iter().unzip();
        let http = Http::connect(self.server.server(), &asked).map_err(|error| Failure::Usage(error.to_string()))?;
        let server = http.server();
        let subject = Subject {
            engine: "a server".into(),
            model: server.model.clone().unwrap_or_default(),
            provider: server.url.clone(),
            ..Subject::default()
        };
        Ok(Opened { names, subject, target: Box::new(http), folder: None, limits: None })
    }

    fn subject(&self, engine: &Engine, loading: Duration) -> Subject {
        let runtime = engine.runtime();
        Subject {
            provider: runtime.provider().to_string(),
            runtime: Some(runtime.library().version.clone()),
            threads: Some(self.model.threads().unwrap_or_else(default_threads).get()),
            loading_s: Some(loading.as_secs_f64()),
            ..of(engine.bundle())
        }
    }
}

/// What is known of a bundle before it runs anywhere.
fn of(bundle: &Bundle) -> Subject {
    let graphs = bundle.facts().graphs.iter();
    Subject {
        engine: format!("blip2 {}", env!("CARGO_PKG_VERSION")),
        revision: option_env!("BLIP2_REVISION").map(str::to_owned),
        model: bundle.facts().name.clone(),
        model_sha256: Some(bundle.hash()),
        precisions: graphs.map(|(name, graph)| (name.clone(), graph.precision.to_string())).collect(),
        ..Subject::default()
    }
}

impl At {
    fn server(&self) -> http::Server {
        let url = self.url.clone().expect("it is asked only where there is one");
        http::Server { url, model: self.served_model.clone(), key: self.api_key.clone() }
    }
}

fn without_key(typed: impl Iterator<Item = String>) -> Vec<String> {
    let (mut found, mut is_key) = (Vec::new(), false);
    for word in typed {
        let hidden = if is_key {
            "…"
        } else if word.starts_with(KEY_OPTION) && word.contains('=') {
            "--api-key=…"
        } else {
            &word
        };
        found.push(hidden.to_owned());
        is_key = word == KEY_OPTION;
    }
    found
}

fn nothing(records: &[Record]) -> String {
    let why = records.iter().find_map(|record| record.error.as_deref());
    why.map_or_else(
        || "nothing was measured before the run was stopped".into(),
        |why| format!("no query got an answer: {}", plain(why)),
    )
}

/// Is set by Ctrl-C and SIGTERM: the run ends with what is under way. A second one ends the program.
fn stopped_by_signals() -> Result<&'static AtomicBool, Failure> {
    static STOP: AtomicBool = AtomicBool::new(false);
    let handle = ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("blip2: stopping; once more to stop at once");
    });
    handle.map(|()| &STOP).map_err(|error| Failure::Usage(format!("signals cannot be caught: {error}")))
}

impl Server {
    fn plan(&self) -> Result<Plan, Failure> {
        let usage = |error: crate::bench::BenchError| Failure::Usage(error.to_string());
        if let Some(path) = &self.trace {
            let schedule = trace(path).map_err(usage)?;
            let arrivals = format!("{} arrivals of {}", schedule.len(), plain(&path.to_string_lossy()));
            return Ok(Plan { load: Load::Open(schedule), arrivals, ..Plan::closed("server", 1, 1) });
        }
        let rate = self.rate.expect("clap wants one of both");
        let spacing = match self.burstiness {
            1.0 => Spacing::Poisson,
            f64::INFINITY => Spacing::Constant,
            shape => Spacing::Gamma(shape),
        };
        let least = Duration::try_from_secs_f64(self.measure.queries.get() as f64 / rate).unwrap_or(Duration::MAX);
        let time = self.measure.duration.max(least);
        let schedule = Rate::new(rate, spacing).map_err(usage)?.schedule(time, self.measure.seed).map_err(usage)?;
        if schedule.is_empty() {
            return Err(Failure::Usage(format!(
                "at {} queries a second none comes in {} s",
                number(rate),
                number(time.as_secs_f64())
            )));
        }
        let arrivals = format!("{rate} a second, burstiness {}", self.burstiness);
        Ok(Plan { load: Load::Open(schedule), arrivals, ..Plan::closed("server", 1, 1) })
    }
}

fn compared(command: &Compare) -> Result<(), Failure> {
    let (before, after) = (read(&command.before)?, read(&command.after)?);
    let objections = compare::objections(&before, &after);
    if !objections.is_empty() && !command.anyway {
        return Err(Failure::Usage(format!("{}; --anyway compares them all the same", objections.join(", and "))));
    }
    objections.iter().for_each(|why| eprintln!("blip2: warning: {}", plain(why)));
    let changes = compare::changes(&before, &after);
    write!(stdout().lock(), "{}", compare::markdown(&changes))?;
    let mut n_met = 0;
    for condition in &command.fail_if {
        if let Some(said) = condition.meets(&changes).map_err(|error| Failure::Usage(error.to_string()))? {
            eprintln!("blip2: {said}");
            n_met += 1;
        }
    }
    if n_met == 0 { Ok(()) } else { Err(Failure::Worse(n_met)) }
}

fn read(path: &Path) -> Result<Report, Failure> {
    Report::read(path).map_err(|error| Failure::Usage(super::chain(&error)))
}

fn seconds(typed: &str) -> Result<Duration, String> {
    let found = typed.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    found.ok_or_else(|| "a number of seconds from 0 is needed".into())
}

/// Of what is under way or in memory together.
fn few(typed: &str) -> Result<NonZeroUsize, String> {
    typed
        .parse()
        .ok()
        .filter(|n: &NonZeroUsize| n.get() <= MOST)
        .ok_or_else(|| format!("a whole number from 1 to {MOST} is needed"))
}

fn objectives(typed: &str) -> Result<Objectives, String> {
    let mut found = Objectives::default();
    for pair in typed.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let bad = || format!("`{pair}` is no limit; one is e2e=500, ttft=200 or tpot=50, in milliseconds");
        let (name, limit) = pair.split_once('=').ok_or_else(bad)?;
        let limit: f64 = limit.trim().parse().ok().filter(|limit: &f64| limit.is_finite() && *limit > 0.0).ok_or_else(bad)?;
        let place = match name.trim() {
            "e2e" => &mut found.end_to_end_ms,
            "ttft" => &mut found.time_to_first_token_ms,
            "tpot" => &mut found.time_per_output_token_ms,
            _ => return Err(bad()),
        };
        *place = Some(limit);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_do_not_tell_keys() {
        for (typed, expected) in [
            ("bench --api-key secret --rate 1", "bench --api-key … --rate 1"),
            ("bench --api-key=secret", "bench --api-key=…"),
            ("bench single", "bench single"),
        ] {
            assert_eq!(without_key(typed.split(' ').map(str::to_owned)).join(" "), expected);
        }
    }

    #[test]
    fn limits_are_named_and_above_0() {
        let found = objectives("e2e=500, ttft=20.5").expect("two limits");
        assert_eq!(
            (found.end_to_end_ms, found.time_to_first_token_ms, found.time_per_output_token_ms),
            (Some(500.0), Some(20.5), None)
        );
        for typed in ["e2e", "e2e=0", "e2e=-1", "e2e=NaN", "p99=5"] {
            assert!(objectives(typed).is_err(), "{typed}");
        }
    }
}
