//! One loaded bundle at work for many callers: threads that make pictures ready, one that looks at them and one that writes.
//!
//! Jobs come in at any time and wait in one line, which is as long as it may be: who comes then is refused at once. Pictures that wait are
//! looked at together, texts join and leave between decode steps, and what is settled is told to each caller at once, on the thread that
//! found it. Channels between the threads are short, so that the line decides who is next. A job whose caller has gone, or whose time has
//! passed, is dropped wherever it is. A panic ends the jobs that were in that thread's hands. It knows nothing of protocols.

mod job;
mod kept;
mod line;
mod look;
mod ready;
mod terms;
mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::{Context, Engine, Writer};
use crate::error::Error;
use crate::language::Sizes;
use kept::Kept;
use line::Line;

pub use job::{Job, Outcome, Progress, Source, Tell, Want};
pub use terms::{Gone, Terms};

/// Texts that were looked at and wait for the thread that writes; the rest keep their places in line.
const N_ORDERED: usize = 2;

/// The threads of one engine. They end when it is dropped and all jobs have ended.
pub struct Service {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// How a service works.
pub struct Options {
    /// Threads that make pictures ready.
    pub n_ready: usize,
    /// Jobs that may wait in line.
    pub capacity: usize,
    /// How long a picture waits for others that are nearly there, to be looked at with them.
    pub delay: Duration,
    /// Bytes of memory that may be taken to keep what was made of pictures.
    pub kept_bytes: u64,
    /// Is told what the threads do.
    pub watch: Arc<dyn Watch>,
}

/// Is told what a service does, on its threads: it should return at once.
pub trait Watch: Send + Sync {
    /// So many pictures were looked at in one run.
    fn looked(&self, _n_pictures: usize, _time: Duration) {}
    /// One step, after which so many texts are being written.
    fn stepped(&self, _n_live: usize, _time: Duration) {}
}

/// Watches nothing.
impl Watch for () {}

/// How much is kept of pictures, and how often that was of use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeptCounts {
    /// Pictures that were found.
    pub hits: u64,
    /// Pictures that were looked for and not found.
    pub misses: u64,
    /// Bytes that are taken.
    pub bytes: u64,
}

/// What all threads of a service know.
struct Shared {
    context: Arc<Context>,
    /// Of the language model, if there is one.
    sizes: Option<Sizes>,
    line: Line<(job::Waiting, Source)>,
    kept: Kept,
    delay: Duration,
    watch: Arc<dyn Watch>,
    n_on_their_way: AtomicUsize,
}

/// A picture that is being made ready, as long as it lives.
struct OnItsWay<'a>(&'a AtomicUsize);

impl Default for Options {
    /// One thread makes pictures ready, nobody is refused and nothing is kept.
    fn default() -> Self {
        Self { n_ready: 1, capacity: usize::MAX, delay: Duration::ZERO, kept_bytes: 0, watch: Arc::new(()) }
    }
}

impl Service {
    /// Puts an engine to work.
    pub fn start(engine: Engine, options: Options) -> Self {
        let Options { n_ready, capacity, delay, kept_bytes, watch } = options;
        let (context, (seer, mut writer)) = (engine.context().clone(), engine.split());
        let shared = Arc::new(Shared {
            context,
            sizes: writer.as_mut().map(Writer::sizes),
            line: Line::new(capacity),
            kept: Kept::new(kept_bytes),
            delay,
            watch,
            n_on_their_way: AtomicUsize::new(0),
        });
        let (to_look, pictures) = sync_channel(seer.at_once());
        let (to_write, orders) = sync_channel(N_ORDERED);
        let mut threads = ready::start(&shared, &to_look, n_ready.max(1));
        let looking = shared.clone();
        threads.push(std::thread::spawn(move || look::run(seer, &looking, &pictures, &to_write)));
        if let Some(writer) = writer {
            let writing = shared.clone();
            threads.push(std::thread::spawn(move || write::run(writer, &writing, &orders)));
        }
        Self { shared, threads }
    }

    /// What is known of the bundle.
    pub fn context(&self) -> &Arc<Context> {
        &self.shared.context
    }

    /// Takes a job in line; an error if the bundle cannot do it, or if the line is full. Whatever goes wrong later is told to the job.
    pub fn submit(&self, job: Job) -> Result<(), Error> {
        let since = Instant::now();
        job.check(self.context(), self.shared.sizes.as_ref())?;
        let Job { source, want, terms, tell } = job;
        let (owner, priority) = (terms.owner, terms.priority);
        self.shared.line.join(owner, priority, (job::Waiting::new(want, terms, tell, since), source))
    }

    /// Jobs in line that nobody has in hand.
    pub fn n_waiting(&self) -> usize {
        self.shared.line.len()
    }

    /// Whether all its threads are there. One without can only be dropped, and another started.
    pub fn is_alive(&self) -> bool {
        !self.threads.iter().any(JoinHandle::is_finished)
    }

    /// What is kept of pictures.
    pub fn kept(&self) -> KeptCounts {
        let (hits, misses, bytes) = self.shared.kept.counts();
        KeptCounts { hits, misses, bytes }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shared.line.close();
        for thread in self.threads.drain(..) {
            // A panic was told on standard error when it happened.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn on_its_way(&self) -> OnItsWay<'_> {
        self.n_on_their_way.fetch_add(1, Ordering::Relaxed);
        OnItsWay(&self.n_on_their_way)
    }

    fn n_on_their_way(&self) -> usize {
        self.n_on_their_way.load(Ordering::Relaxed)
    }
}

impl Drop for OnItsWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
