//! What is asked for, and what comes of it.

use std::time::Duration;

use super::Sight;
use crate::decode::{Finish, Processors, Strategy, TokenId};
use crate::prompt::Task;
use crate::text::Warning;
use crate::timing::Timings;

/// One text that is wanted.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The picture.
    pub sight: &'a Sight,
    /// What is asked of it.
    pub task: Task,
    /// How to write it.
    pub generation: Generation,
}

/// How a text is written. Whatever is absent comes from the bundle.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// Tokens to write at most. The model's positions limit it further.
    pub max_new_tokens: Option<usize>,
    /// What changes scores before a token is chosen.
    pub processors: Processors,
    /// How tokens are chosen.
    pub strategy: Strategy,
    /// The text ends before the first of these.
    pub stop: Vec<String>,
    /// Log-probabilities of the tokens, each with as many alternatives.
    pub log_probs: Option<usize>,
}

/// A finished text.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The text, trimmed.
    pub text: String,
    /// Its tokens, the end token included.
    pub tokens: Vec<TokenId>,
    /// Why it ended.
    pub finish: Finish,
    /// Sum of log-probabilities / length ^ penalty, where beam search found the text.
    pub score: Option<f32>,
    /// Where several texts were wanted, all of them, this one first.
    pub candidates: Vec<Candidate>,
    /// Of each token, where they were wanted.
    pub log_probs: Vec<TokenLogProb>,
    /// What was not read or written as it was asked for.
    pub warnings: Vec<Warning>,
    /// Every stage on the way, those that the picture took included. What ran for several requests together counts in full for each.
    pub timings: Timings,
    /// From joining to the first settled token.
    pub first_token: Option<Duration>,
    /// From each settled token, or several at once, to the next.
    pub gaps: Vec<Duration>,
}

/// One of several texts.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Candidate {
    /// The text, trimmed.
    pub text: String,
    /// Its tokens, the end token included.
    pub tokens: Vec<TokenId>,
    /// Why it ended.
    #[serde(rename = "finish_reason", serialize_with = "as_written")]
    pub finish: Finish,
    /// As [`Answer::score`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
    /// Where candidates were put in order by it: the probability that the text matches the picture.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub itm_probability: Option<f32>,
}

impl Answer {
    /// Puts the candidates in another order; the first of them becomes the answer. Log-probabilities of another text are dropped.
    pub fn reorder(&mut self, compare: impl FnMut(&Candidate, &Candidate) -> std::cmp::Ordering) {
        self.candidates.sort_by(compare);
        let Some(Candidate { text, tokens, finish, score, .. }) = self.candidates.first().cloned() else { return };
        if tokens != self.tokens {
            self.log_probs.clear();
        }
        (self.text, self.tokens, self.finish, self.score) = (text, tokens, finish, score);
    }
}

fn as_written<S: serde::Serializer>(value: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// How probable the model finds a token: under the softmax of its plain logits, whatever search chose it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TokenLogProb {
    /// The token.
    pub token: TokenId,
    /// As the vocabulary writes it.
    pub text: String,
    /// Natural logarithm of its probability.
    pub log_prob: f32,
    /// The most probable tokens in its place, the best first.
    pub alternatives: Vec<Alternative>,
}

/// A token that could have stood in another's place.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Alternative {
    /// The token.
    pub token: TokenId,
    /// As the vocabulary writes it.
    pub text: String,
    /// Natural logarithm of its probability.
    pub log_prob: f32,
}
