//! The step loop over all live requests, and the searches that drive it. Pure Rust: no tensors, no files, no clock.
//!
//! Each request owns a [`Search`] over its own rows. At every step the [`Model`] runs once over the picks of all searches, or reads the
//! prompts of requests in line; then each search sees the scores of its own rows, and what it settles is handed out. Requests join and
//! leave between steps; the same request gives the same tokens alone and beside others, and a failure ends the requests it belongs to.

mod beam;
mod best;
mod forced;
mod greedy;
mod processors;
mod random;
mod ranking;
mod row;
mod sample;
mod softmax;
mod step_loop;
mod strategy;
mod warpers;

use std::ops::Range;
use std::sync::Arc;

pub use beam::{Beam, BeamOptions, BeamSample, EarlyStopping};
pub(crate) use best::argmax;
pub use forced::Forced;
pub use greedy::{Greedy, GreedyOptions};
pub use processors::{Past, Processors};
pub use random::Random;
pub use sample::{Sample, SampleOptions};
pub use softmax::log_softmax;
pub use step_loop::{Ended, Event, RequestId, StepLoop};
pub use strategy::{Strategy, StrategyError};
pub use warpers::Warpers;

/// An index into the vocabulary.
pub type TokenId = u32;

/// What ends a text besides its end tokens: a look at the new tokens, the latest one included.
#[derive(Clone)]
pub struct Stop(pub Arc<Look>);

/// Whether a text is over.
pub type Look = dyn Fn(&[TokenId]) -> bool + Send + Sync;

impl std::fmt::Debug for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stop")
    }
}

/// Where a text ends.
#[derive(Clone, Debug, Default)]
pub struct Ends {
    /// Limit of new tokens, the end token included.
    pub max_new_tokens: usize,
    /// Tokens that end a text.
    pub end: Vec<TokenId>,
    /// Whatever else ends it.
    pub stop: Option<Stop>,
}

impl Ends {
    /// Why a text that has come to `new` is over, if it is.
    fn finish(&self, new: &[TokenId]) -> Option<Finish> {
        let stops = || self.stop.as_ref().is_some_and(|stop| stop.0(new));
        self.finish_if(new.last(), stops, new.len())
    }

    /// The same of a text that `last` is put behind.
    fn finish_behind(&self, before: &[TokenId], last: TokenId) -> Option<Finish> {
        let stops = || self.stop.as_ref().is_some_and(|stop| stop.0(&[before, &[last]].concat()));
        self.finish_if(Some(&last), stops, before.len() + 1)
    }

    fn finish_if(&self, last: Option<&TokenId>, stops: impl FnOnce() -> bool, length: usize) -> Option<Finish> {
        if last.is_some_and(|last| self.end.contains(last)) || stops() {
            Some(Finish::Stop)
        } else if length >= self.max_new_tokens {
            Some(Finish::Length)
        } else {
            None
        }
    }
}

/// One row of the next step: the row it continues, and the token put behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// Index of a row of the step before.
    pub parent: usize,
    /// The token that the row gets.
    pub token: TokenId,
}

/// Next-token logits of consecutive rows: `[n_rows, vocabulary]`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Scores<'a> {
    values: &'a [f32],
    vocabulary: usize,
}

impl<'a> Scores<'a> {
    /// # Panics
    /// If `values` is not a whole number of rows.
    pub fn new(values: &'a [f32], vocabulary: usize) -> Self {
        assert!(vocabulary > 0 && values.len().is_multiple_of(vocabulary), "scores are whole rows");
        Self { values, vocabulary }
    }

    /// How many rows there are.
    pub fn n_rows(&self) -> usize {
        self.values.len() / self.vocabulary
    }

    /// The logits of one row.
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.values[row * self.vocabulary..(row + 1) * self.vocabulary]
    }
}

/// What texts need of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Rows side by side.
    pub rows: usize,
    /// Positions of a row: what it starts from and what is written behind.
    pub positions: usize,
    /// Positions that are read before the first token.
    pub read: usize,
}

impl Room {
    /// The larger of each.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { rows: self.rows.max(other.rows), ..self.beside(other) }
    }

    /// What both need together.
    #[must_use]
    pub fn beside(self, other: Self) -> Self {
        let (positions, read) = (self.positions.max(other.positions), self.read.max(other.read));
        Self { rows: self.rows.saturating_add(other.rows), positions, read }
    }
}

/// What the loop needs of a language model. It keeps the live rows in the order in which they were last named.
pub trait Model {
    /// What a request starts from.
    type Prompt;
    /// Why the model could not run; all requests of a run may get it.
    type Error: Clone;

    /// What one row behind `prompt` needs.
    fn room(&self, prompt: &Self::Prompt) -> Room;

    /// Makes room for all live rows and those to come; false if there is not as much.
    fn reserve(&mut self, room: Room) -> Result<bool, Self::Error>;

    /// What to say where [`reserve`](Self::reserve) fails although nothing else is live.
    fn no_room(&self, room: Room) -> Self::Error;

    /// Adds one row per prompt behind the live rows, and computes their scores. After an error the live rows are as before.
    fn prefill(&mut self, prompts: &[Self::Prompt]) -> Result<(), Self::Error>;

    /// Forgets all live rows but these, which keep their order.
    fn keep(&mut self, rows: &[usize]);

    /// Replaces the live rows by `picks`, each a continuation of an old row, and computes their scores. Old rows that nobody continues
    /// are gone.
    fn step(&mut self, picks: &[Pick]) -> Result<(), Self::Error>;

    /// The scores of consecutive rows that the last run computed; an error if they are not numbers.
    fn scores(&self, rows: Range<usize>) -> Result<Scores<'_>, Self::Error>;
}

/// Chooses tokens for one request. It starts with one row.
pub trait Search {
    /// Looks at the scores of the request's rows and pushes its next rows; parents count within the request, and several rows may have one
    /// parent. No picks end the request.
    fn advance(&mut self, scores: Scores<'_>, picks: &mut Vec<Pick>);

    /// All tokens that later steps cannot change: greedy settles one a step, beam search all at the end. Of several texts the first.
    fn settled(&self) -> &[TokenId];

    /// How probable the settled tokens are, one for each of them; empty where that was not asked for.
    fn log_probs(&self) -> &[LogProb] {
        &[]
    }

    /// Why the request ended, once it has.
    fn finish(&self) -> Option<Finish>;

    /// All texts of a search that writes several, once it has ended; empty for searches that follow one text. Beam search gives the best
    /// first, samples come in the order of their seeds, forced texts in the order in which they were given.
    fn hypotheses(&self) -> &[Hypothesis] {
        &[]
    }
}

/// How probable the model finds a token: under the softmax of its plain logits, before anything changes them, whatever search chose it.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProb {
    /// The token.
    pub token: TokenId,
    /// Natural logarithm of its probability.
    pub log_prob: f32,
    /// The most probable tokens in its place, the best first, of equals the smaller id; none of probability 0.
    pub alternatives: Vec<(TokenId, f32)>,
}

/// One of several texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// New tokens, the end token included.
    pub tokens: Vec<TokenId>,
    /// What the search compares texts by: of beam search the sum of log-probabilities / length ^ penalty, of forced decoding the plain sum.
    pub score: Option<f32>,
    /// Why it ended.
    pub finish: Finish,
    /// Of each token, where they were asked for.
    pub log_probs: Vec<LogProb>,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Finish {
    /// The model wrote an end token.
    Stop,
    /// The limit of new tokens was reached.
    #[default]
    Length,
    /// Whoever asked wanted no more.
    Cancelled,
}

impl std::fmt::Display for Finish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        })
    }
}
