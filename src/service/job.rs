//! What a caller wants, and what it is told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::bundle::TaskName;
use crate::decode::TokenId;
use crate::engine::{Answer, Context, Flow, Generation, Match};
use crate::error::Error;
use crate::pixels::Limits;
use crate::prompt::Task;
use crate::timing::{Stage, Timings};

/// One picture and what is wanted of it.
pub struct Job {
    /// The encoded picture.
    pub picture: Arc<[u8]>,
    /// What pictures may be.
    pub limits: Limits,
    /// What is wanted.
    pub want: Want,
    /// Is told what happens, on a thread of the service: it should return at once. [`ControlFlow::Break`](std::ops::ControlFlow) gives up a
    /// text that is being written.
    pub tell: Tell,
}

/// Takes what becomes of a job.
pub type Tell = Box<dyn FnMut(Progress<'_>) -> Flow + Send>;

/// What a picture is for.
#[derive(Clone, Debug)]
pub enum Want {
    /// A text about it.
    Write(Task, Box<Generation>),
    /// How well texts fit it.
    Match(Vec<String>),
    /// Its vectors.
    Embed,
}

/// What a job is told.
#[derive(Debug)]
pub enum Progress<'a> {
    /// These tokens, and the text that became settled with them.
    Settled(&'a [TokenId], &'a str),
    /// The last thing that is told.
    End(Result<Outcome, Error>),
}

/// What comes of a job.
#[derive(Debug)]
pub enum Outcome {
    /// Of [`Want::Write`].
    Written(Box<Answer>),
    /// Of [`Want::Match`], in the order of the texts.
    Matched(Vec<Match>, Timings),
    /// Of [`Want::Embed`]: the mean over query tokens.
    Embedded(Vec<f32>, Timings),
}

/// A job that was taken. Its caller is told an end whatever happens to the thread that has it.
pub(super) struct Taken {
    pub picture: Arc<[u8]>,
    pub limits: Limits,
    pub want: Want,
    /// None once it was told the end.
    tell: Option<Tell>,
}

/// A job on its way, with the time that it has spent.
pub(super) struct Waiting {
    pub job: Taken,
    pub timings: Timings,
    /// Since when it waits.
    since: Instant,
}

impl Job {
    pub(super) fn check(&self, context: &Context) -> Result<(), Error> {
        match &self.want {
            Want::Write(task, generation) => context.check(task, generation).map(drop),
            Want::Match(texts) => texts.iter().try_for_each(|text| context.reading(text).map(drop)),
            Want::Embed => Ok(context.bundle().require(TaskName::Embed)?),
        }
    }
}

impl Taken {
    pub fn settled(&mut self, tokens: &[TokenId], text: &str) -> Flow {
        self.tell.as_mut().map_or(Flow::Continue(()), |tell| tell(Progress::Settled(tokens, text)))
    }

    pub fn end(mut self, end: Result<Outcome, Error>) {
        self.tell_end(end);
    }

    fn tell_end(&mut self, end: Result<Outcome, Error>) {
        if let Some(mut tell) = self.tell.take() {
            // Nothing is left to give up.
            let _ = tell(Progress::End(end));
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.tell_end(Err(Error::Lost));
    }
}

impl Outcome {
    /// Every stage on the way.
    pub fn timings(&self) -> &Timings {
        match self {
            Self::Written(answer) => &answer.timings,
            Self::Matched(_, timings) | Self::Embedded(_, timings) => timings,
        }
    }
}

impl Waiting {
    /// It waits `since` then.
    pub fn new(Job { picture, limits, want, tell }: Job, since: Instant) -> Self {
        let job = Taken { picture, limits, want, tell: Some(tell) };
        Self { job, timings: Timings::default(), since }
    }

    /// Its turn has come: the time in line goes to `stage`.
    pub fn begin(&mut self, stage: Stage) {
        self.timings.add(stage, self.waited());
    }

    /// How long it has waited now.
    pub fn waited(&self) -> Duration {
        self.since.elapsed()
    }

    /// It waits again.
    pub fn wait(&mut self) {
        self.since = Instant::now();
    }

    /// Does a stage of it.
    pub fn time<T>(&mut self, stage: Stage, work: impl FnOnce(&Taken) -> T) -> T {
        let (job, timings) = (&self.job, &mut self.timings);
        timings.time(stage, || work(job))
    }
}
