//! One loaded bundle at work for many callers: threads that make pictures ready, one that looks at them and one that writes.
//!
//! Jobs come in at any time. Pictures that wait are looked at together, texts join and leave between decode steps, and what is settled is
//! told to each caller at once, on the thread that found it. It knows nothing of protocols, rates or clocks of its callers.

mod job;
mod look;
mod ready;
mod write;

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::engine::{Context, Engine};
use crate::error::Error;

pub use job::{Job, Outcome, Progress, Tell, Want};

/// The threads of one engine. They end when it is dropped and all jobs have ended.
pub struct Service {
    context: Arc<Context>,
    /// None while it ends.
    jobs: Option<Sender<job::Waiting>>,
    threads: Vec<JoinHandle<()>>,
}

impl Service {
    /// Puts an engine to work; `n_ready`: threads that make pictures ready.
    pub fn start(engine: Engine, n_ready: usize) -> Self {
        let context = engine.context().clone();
        let (seer, writer) = engine.split();
        let (jobs, waiting) = channel();
        let (to_look, pictures) = channel();
        let (to_write, orders) = channel();
        let mut threads = ready::start(context.clone(), waiting, to_look, n_ready.max(1));
        threads.push(std::thread::spawn(move || look::run(seer, &pictures, &to_write)));
        if let Some(writer) = writer {
            threads.push(std::thread::spawn(move || write::run(writer, &orders)));
        }
        Self { context, jobs: Some(jobs), threads }
    }

    /// What is known of the bundle.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Takes a job in line; an error if the bundle cannot do it. Whatever goes wrong later is told to the job.
    pub fn submit(&self, job: Job) -> Result<(), Error> {
        let since = Instant::now();
        job.check(&self.context)?;
        let jobs = self.jobs.as_ref().expect("it is not being dropped");
        // Where threads have panicked nobody takes it any more, and so it is told when it is dropped.
        let _ = jobs.send(job::Waiting::new(job, since));
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A panic was told on standard error when it happened.
            let _ = thread.join();
        }
    }
}
