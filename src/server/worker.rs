//! One bundle at work: the only place where what is asked meets what blocks. Handlers get a [`Ticket`] and wait for what it brings.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::error::{ApiError, chain};
use super::metrics::ModelMetrics;
use crate::bundle::{Bundle, TaskName};
use crate::engine::{Context, Engine, Generation};
use crate::error::Error;
use crate::pixels::{Limits, Picture};
use crate::prompt::Task;
use crate::runtime::{Runtime, RuntimeOptions};
use crate::service::{self, Gone, Job, KeptCounts, Outcome, Progress, Service, Source, Terms, Want};
use crate::timing::milliseconds;

/// How much nicer threads that compute are than those that answer.
const POLITE: i32 = 5;
/// How often it is looked whether all threads of a service are there.
const LOOKING_AFTER: Duration = Duration::from_millis(200);
/// Until a bundle that could not be loaded, or whose threads ended, is loaded again; twice as long after every failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Of the past rate, what the last job leaves of it.
const FORGETTING: f64 = 0.9;

/// What a worker is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What requests call the bundle.
    pub name: String,
    /// Where it is.
    pub folder: PathBuf,
    /// Where its graphs run.
    pub runtime: RuntimeOptions,
    /// Jobs in hand at most.
    pub max_in_hand: usize,
    /// Bytes for what was made of pictures.
    pub kept_bytes: u64,
}

/// A bundle at work, or on its way there.
pub struct Worker {
    plan: Plan,
    state: Mutex<State>,
    wanted: AtomicBool,
    hand: Arc<Hand>,
    metrics: Arc<ModelMetrics>,
}

/// How far a bundle is.
#[derive(Clone, Default)]
pub enum State {
    /// Nobody wants it.
    #[default]
    Unloaded,
    /// Its graphs are being loaded, or it answers its first request.
    Loading,
    /// It answers.
    Ready(Arc<Service>),
    /// It cannot be loaded; it is tried again.
    Failed,
}

/// Jobs in hand, and how fast they go.
struct Hand {
    n: AtomicUsize,
    /// Seconds that a job takes while others are in hand, as `f64` bits.
    pace: AtomicU64,
    last_end: Mutex<Option<Instant>>,
}

/// A place in hand, until the job has ended.
struct Place(Arc<Hand>);

/// What comes of a job. When it is dropped, the job is given up.
pub struct Ticket {
    told: UnboundedReceiver<Told>,
    gone: Gone,
}

/// What becomes of a job.
#[derive(Debug)]
pub enum Told {
    /// So many tokens were settled, and this text with them.
    Settled(usize, String),
    /// The last thing that is told.
    End(Result<Outcome, Error>),
}

/// What is asked of a worker.
pub struct Asked {
    /// What it is about.
    pub source: Source,
    /// What is wanted.
    pub want: Want,
    /// On whose behalf, and until when.
    pub terms: Terms,
}

impl Worker {
    /// One that loads its bundle at once, on a thread of its own, unless it is to wait for [`load`](Self::load).
    pub fn start(plan: Plan, is_wanted: bool, metrics: Arc<ModelMetrics>) -> Arc<Self> {
        let hand = Hand { n: AtomicUsize::new(0), pace: AtomicU64::new(0), last_end: Mutex::new(None) };
        let state = Mutex::new(if is_wanted { State::Loading } else { State::Unloaded });
        let worker = Arc::new(Self { plan, state, wanted: is_wanted.into(), hand: Arc::new(hand), metrics });
        let weak = Arc::downgrade(&worker);
        std::thread::spawn(move || {
            give_way();
            let mut pause = FIRST_PAUSE;
            // It ends with the last who knows the worker.
            while let Some(worker) = weak.upgrade() {
                worker.look_after(&mut pause);
                drop(worker);
                std::thread::sleep(LOOKING_AFTER);
            }
        });
        worker
    }

    /// What requests call it.
    pub fn name(&self) -> &str {
        &self.plan.name
    }

    /// Wants the bundle loaded.
    pub fn load(&self) {
        self.wanted.store(true, Ordering::Relaxed);
    }

    /// Wants the bundle no more. What is in hand ends; who comes now is refused.
    pub fn unload(&self) {
        self.wanted.store(false, Ordering::Relaxed);
        let before = std::mem::take(&mut *self.state());
        retire(before);
    }

    /// How far it is.
    pub fn now(&self) -> State {
        self.state().clone()
    }

    /// What is known of the bundle, once it is loaded.
    pub fn context(&self) -> Result<Arc<Context>, ApiError> {
        Ok(self.service()?.context().clone())
    }

    /// What is counted of it.
    pub fn metrics(&self) -> &ModelMetrics {
        &self.metrics
    }

    /// Jobs in hand.
    pub fn n_in_hand(&self) -> usize {
        self.hand.n.load(Ordering::Relaxed)
    }

    /// Jobs in line that nobody works on.
    pub fn n_waiting(&self) -> usize {
        self.service().map_or(0, |service| service.n_waiting())
    }

    /// What is kept of pictures.
    pub fn kept(&self) -> KeptCounts {
        self.service().map(|service| service.kept()).unwrap_or_default()
    }

    /// Whether nothing more may come in hand; then, in how many seconds there will be room.
    pub fn is_full(&self) -> Option<u64> {
        (self.n_in_hand() >= self.plan.max_in_hand).then(|| self.hand.seconds(1))
    }

    /// Takes jobs in hand, all or none. Each gets its ticket, or why the bundle cannot do it.
    pub fn ask(&self, asked: Vec<Asked>) -> Result<Vec<Result<Ticket, Error>>, ApiError> {
        let service = self.service()?;
        let (n, most) = (asked.len(), self.plan.max_in_hand);
        if n > most {
            return Err(ApiError::invalid(format!("{n} texts or pictures at once are wanted, and {most} may be in hand")));
        }
        let places = Place::take(&self.hand, n, most).map_err(ApiError::overloaded)?;
        Ok(asked.into_iter().zip(places).map(|(asked, place)| submit(&service, asked, place)).collect())
    }

    fn service(&self) -> Result<Arc<Service>, ApiError> {
        let name = &self.plan.name;
        Err(ApiError::unavailable(match &*self.state() {
            State::Ready(service) => return Ok(service.clone()),
            State::Unloaded => format!("the model `{name}` is not loaded"),
            State::Loading => format!("the model `{name}` is being loaded"),
            State::Failed => format!("the model `{name}` cannot be loaded; the server's log says why"),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads the bundle if it is wanted and not there, or not whole any more.
    fn look_after(&self, pause: &mut Duration) {
        let now = self.now();
        let is_there = matches!(&now, State::Ready(service) if service.is_alive());
        let is_wanted = self.wanted.load(Ordering::Relaxed);
        if is_there || !is_wanted {
            return;
        }
        if matches!(now, State::Ready(_)) {
            tracing::error!(model = self.plan.name, "a thread of this model ended; it is loaded anew");
        }
        drop(now);
        let before = std::mem::replace(&mut *self.state(), State::Loading);
        retire(before);
        let start = Instant::now();
        // A panic in a library is a bundle that cannot be loaded.
        match catch_unwind(AssertUnwindSafe(|| self.open())).unwrap_or(Err(Error::Lost)) {
            Ok(service) => {
                tracing::info!(model = self.plan.name, ms = milliseconds(start.elapsed()), "ready");
                *pause = FIRST_PAUSE;
                let mut state = self.state();
                // Somebody may have thought better of it.
                *state = if self.wanted.load(Ordering::Relaxed) { State::Ready(service) } else { State::Unloaded };
            }
            Err(error) => {
                tracing::error!(model = self.plan.name, error = chain(&error), "the model cannot be loaded");
                *self.state() = State::Failed;
                std::thread::sleep(*pause);
                *pause = (*pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    /// Loads the bundle and lets it answer once.
    fn open(&self) -> Result<Arc<Service>, Error> {
        let bundle = Bundle::open(&self.plan.folder)?;
        let engine = Engine::load(bundle, Runtime::load(&self.plan.runtime)?)?;
        engine.notices().iter().for_each(|notice| tracing::warn!(model = self.plan.name, "{notice}"));
        let options = service::Options {
            n_ready: std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(4),
            capacity: self.plan.max_in_hand,
            delay: Duration::from_millis(2),
            kept_bytes: self.plan.kept_bytes,
            watch: self.metrics.clone(),
        };
        let service = Arc::new(Service::start(engine, options));
        warm_up(&service)?;
        Ok(service)
    }
}

/// Lets this thread, and those that it starts, ONNX Runtime's among them, give way to those that read and answer: there are as many that
/// compute as processors, and a request would wait until one of them is interrupted.
fn give_way() {
    // Elsewhere a process has one priority.
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{getpriority_process, setpriority_process};
        let polite = getpriority_process(None).and_then(|usual| setpriority_process(None, (usual + POLITE).min(19)));
        if let Err(error) = polite {
            tracing::debug!(%error, "models compute with the priority of everything else");
        }
    }
}

fn submit(service: &Service, Asked { source, want, terms }: Asked, place: Place) -> Result<Ticket, Error> {
    let (to, told) = unbounded_channel();
    let (gone, mut place) = (terms.gone.clone(), Some(place));
    let tell = Box::new(move |progress: Progress<'_>| {
        let told = match progress {
            Progress::Settled(tokens, text) => Told::Settled(tokens.len(), text.to_owned()),
            Progress::End(end) => {
                // Before its caller hears of it, who may come again at once.
                drop(place.take());
                Told::End(end)
            }
        };
        // Nobody waits for it any more.
        if to.send(told).is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    service.submit(Job { source, want, terms, tell })?;
    Ok(Ticket { told, gone })
}

/// Service threads end when their jobs have, and whoever drops a service waits for that: nobody who has other things to do.
fn retire(state: State) {
    let State::Ready(service) = state else { return };
    std::thread::spawn(move || {
        while Arc::strong_count(&service) > 1 {
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}

/// One answer of every kind that the bundle gives, about a grey picture.
fn warm_up(service: &Service) -> Result<(), Error> {
    let context = service.context().clone();
    let tasks = &context.bundle().facts().tasks;
    let brief = || Box::new(Generation { max_new_tokens: Some(2), ..Generation::default() });
    let mut wants = Vec::new();
    if tasks.contains(&TaskName::Caption) {
        wants.push(Want::Write(Task::Caption, brief()));
    } else if tasks.contains(&TaskName::Ask) {
        wants.push(Want::Write(Task::Ask("what is it?".into()), brief()));
    }
    if tasks.contains(&TaskName::Match) {
        wants.push(Want::Match(vec!["a".into()]));
    }
    let picture: Arc<[u8]> = grey().into();
    for want in wants {
        let (to, ends) = std::sync::mpsc::channel();
        let tell = Box::new(move |progress: Progress<'_>| {
            if let Progress::End(end) = progress {
                // Whoever waits for it is there.
                let _ = to.send(end);
            }
            ControlFlow::Continue(())
        });
        let source = Source::Encoded(picture.clone(), Limits::default());
        service.submit(Job { source, want, terms: Terms::default(), tell })?;
        ends.recv().map_err(|_| Error::Lost)??;
    }
    Ok(())
}

/// A portable pixmap: the simplest file that is a picture.
fn grey() -> Vec<u8> {
    let Picture { width, height, rgb, .. } = Picture::from_rgb(8, 8, vec![128; 8 * 8 * 3]);
    [format!("P6 {width} {height} 255\n").as_bytes(), &rgb].concat()
}

impl Ticket {
    /// What becomes of the job next.
    pub async fn next(&mut self) -> Told {
        self.told.recv().await.unwrap_or(Told::End(Err(Error::Lost)))
    }

    /// What comes of it in the end.
    pub async fn end(mut self) -> Result<Outcome, Error> {
        loop {
            if let Told::End(end) = self.next().await {
                return end;
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.gone.leave();
    }
}

impl Place {
    /// So many of them; if there are not as many, in how many seconds there will be.
    fn take(hand: &Arc<Hand>, n: usize, most: usize) -> Result<Vec<Self>, u64> {
        let more = |in_hand: usize| Some(in_hand + n).filter(|all| *all <= most);
        match hand.n.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok((0..n).map(|_| Self(hand.clone())).collect()),
            Err(in_hand) => Err(hand.seconds(in_hand + n - most)),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Hand {
    fn end(&self) {
        let left = self.n.fetch_sub(1, Ordering::Relaxed) - 1;
        let now = Instant::now();
        let mut last = self.last_end.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(took) = last.map(|last| (now - last).as_secs_f64()) {
            let before = f64::from_bits(self.pace.load(Ordering::Relaxed));
            let pace = if before == 0.0 { took } else { before * FORGETTING + took * (1.0 - FORGETTING) };
            self.pace.store(pace.to_bits(), Ordering::Relaxed);
        }
        // Time without anything in hand says nothing of how fast jobs go.
        *last = (left > 0).then_some(now);
    }

    /// Until so many jobs have ended, as things go.
    fn seconds(&self, n: usize) -> u64 {
        (f64::from_bits(self.pace.load(Ordering::Relaxed)) * n as f64).ceil().clamp(1.0, 60.0) as u64
    }
}
