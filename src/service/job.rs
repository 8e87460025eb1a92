//! What a caller wants, and what it is told.

use std::sync::Arc;
use std::time::Instant;

use super::terms::Terms;
use crate::bundle::TaskName;
use crate::decode::TokenId;
use crate::engine::{Answer, Context, Flow, Generation, Match, Order, Ranked, Sight};
use crate::error::Error;
use crate::language::Sizes;
use crate::pixels::Limits;
use crate::prompt::{PromptError, Task};
use crate::timing::{Stage, Timings};

/// What is wanted of a picture, or of texts alone.
pub struct Job {
    /// What it is about.
    pub source: Source,
    /// What is wanted.
    pub want: Want,
    /// On what terms it is in hand.
    pub terms: Terms,
    /// Is told what happens, on a thread of the service: it should return at once. [`ControlFlow::Break`](std::ops::ControlFlow) gives up a
    /// text that is being written.
    pub tell: Tell,
}

/// What a job is about.
pub enum Source {
    /// An encoded picture, and what pictures may be.
    Encoded(Arc<[u8]>, Limits),
    /// A picture that was looked at before.
    Seen(Box<Sight>),
    /// No picture: texts alone.
    Texts,
}

/// Takes what becomes of a job.
pub type Tell = Box<dyn FnMut(Progress<'_>) -> Flow + Send>;

/// What a picture is for.
#[derive(Clone, Debug)]
pub enum Want {
    /// A text about it.
    Write(Task, Box<Generation>),
    /// How probable given answers to a task are. They are read side by side, so give no more than memory holds.
    Rank(Task, Vec<String>),
    /// How well texts fit it.
    Match(Vec<String>),
    /// Its vectors.
    Embed,
    /// Vectors of texts, without a picture.
    EmbedTexts(Vec<String>),
    /// What was made of it, to ask about it later.
    See,
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
    /// Of [`Want::Rank`], in the order of the answers.
    Ranked(Vec<Ranked>, Timings),
    /// Of [`Want::Match`], in the order of the texts.
    Matched(Vec<Match>, Timings),
    /// Of [`Want::Embed`]: the mean over query tokens.
    Embedded(Vec<f32>, Timings),
    /// Of [`Want::EmbedTexts`], in their order.
    Texts(Vec<Vec<f32>>, Timings),
    /// Of [`Want::See`].
    Seen(Box<Sight>),
}

/// A job that was taken. Its caller is told an end whatever happens to the thread that has it.
pub(super) struct Taken {
    pub want: Want,
    pub terms: Terms,
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
    /// What the bundle cannot do, alone or at this size, is refused before it is in line.
    pub(super) fn check(&self, context: &Context, sizes: Option<&Sizes>) -> Result<(), Error> {
        if matches!(self.source, Source::Texts) && !matches!(self.want, Want::EmbedTexts(_)) {
            return Err(Error::NoPicture);
        }
        match &self.want {
            Want::Write(task, generation) => {
                let prompt = context.check(task, generation)?;
                let n_read = context.bundle().facts().qformer.n_queries + prompt.ids.len();
                let (n_new, n_rows) = (context.n_new(task, generation, &prompt), generation.strategy.n_rows());
                // Nothing is held then that could not be given up; what must wait for that waits.
                Ok(sizes.map_or(Ok(()), |sizes| sizes.check(sizes.room(n_read, n_new, n_rows), 0))?)
            }
            Want::Rank(_, answers) if answers.is_empty() => Err(PromptError::NoCandidates.into()),
            Want::Rank(task, answers) => {
                let prompt = context.prompt(task)?;
                answers.iter().try_for_each(|answer| context.candidate(&prompt, answer).map(drop))
            }
            Want::Match(texts) => {
                context.bundle().require(TaskName::Match)?;
                texts.iter().try_for_each(|text| context.reading(text).map(drop))
            }
            Want::EmbedTexts(texts) => texts.iter().try_for_each(|text| context.reading(text).map(drop)),
            Want::Embed => Ok(context.bundle().require(TaskName::Embed)?),
            Want::See => Ok(()),
        }
    }
}

impl Want {
    /// Whether the language model does it.
    pub(super) fn is_for_writer(&self) -> bool {
        matches!(self, Self::Write(..) | Self::Rank(..))
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
    /// What was done, in a word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Written(_) => "write",
            Self::Ranked(..) => "rank",
            Self::Matched(..) => "match",
            Self::Embedded(..) | Self::Texts(..) => "embed",
            Self::Seen(_) => "see",
        }
    }

    /// Every stage on the way.
    pub fn timings(&self) -> &Timings {
        match self {
            Self::Written(answer) => &answer.timings,
            Self::Seen(sight) => sight.timings(),
            Self::Ranked(_, timings) | Self::Matched(_, timings) | Self::Embedded(_, timings) | Self::Texts(_, timings) => timings,
        }
    }
}

impl Waiting {
    /// It waits `since` then.
    pub fn new(want: Want, terms: Terms, tell: Tell, since: Instant) -> Self {
        Self { job: Taken { want, terms, tell: Some(tell) }, timings: Timings::default(), since }
    }

    /// Its turn has come: the time in line goes to `stage`.
    pub fn begin(&mut self, stage: Stage) {
        self.timings.add(stage, self.since, self.since.elapsed());
    }

    /// The same, where an order has the time that was spent before.
    pub fn begin_order(&self, order: &mut Order, stage: Stage) {
        order.timings.add(stage, self.since, self.since.elapsed());
    }

    /// It waits again.
    pub fn wait(&mut self) {
        self.since = Instant::now();
    }

    /// Tells a job that should not be begun any more why, and drops it.
    pub fn if_wanted(self) -> Option<Self> {
        match self.job.terms.check() {
            Ok(()) => Some(self),
            Err(why) => {
                self.job.end(Err(why));
                None
            }
        }
    }
}
