//! Candidate answers by how probable the language model finds them.

use super::write::{Order, Work};
use super::{Answer, Engine, Seer, Sight};
use crate::decode::TokenId;
use crate::error::Error;
use crate::language::Prefix;
use crate::prompt::{PromptError, Task};

/// Candidates that are read side by side. More would take memory and gain no time.
pub const AT_ONCE: usize = 64;

/// A candidate with its likelihood.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Ranked {
    /// The candidate.
    pub text: String,
    /// Its place in the list that was given.
    pub index: usize,
    /// Sum of the log-probabilities of its tokens, the end token included.
    pub log_likelihood: f32,
    /// How many tokens that are.
    pub n_tokens: usize,
}

impl Ranked {
    /// The log-likelihood of a token on average.
    pub fn per_token(&self) -> f32 {
        self.log_likelihood / self.n_tokens as f32
    }
}

impl Engine {
    /// Candidates for the answer to a task, in the order in which they were given. Each is read behind the prompt and ended by the first
    /// end token, as `predict_class` of LAVIS does it. All fail together where one fails in
    /// [`candidate`](super::Context::candidate).
    pub fn rank(&mut self, sight: &Sight, task: &Task, candidates: &[&str]) -> Result<Vec<Ranked>, Error> {
        let order = self.seer.ranking(sight, task, candidates)?;
        let Work::Read(tokens) = &order.work else { unreachable!("a ranking is read") };
        let orders = tokens.chunks(AT_ONCE).map(|tokens| Order { work: Work::Read(tokens.to_vec()), ..order.clone() });
        let mut ranked = Vec::with_capacity(candidates.len());
        for (order, texts) in orders.zip(candidates.chunks(AT_ONCE)) {
            let answer = self.finish(vec![Ok(order)], |_, _| std::ops::ControlFlow::Continue(())).remove(0)?;
            let first = ranked.len();
            ranked.extend(answer.ranked(texts).map(|one| Ranked { index: first + one.index, ..one }));
        }
        Ok(ranked)
    }
}

impl Seer {
    /// What reads candidates for the answer to a task behind its prompt, all side by side. [`Answer::ranked`] makes of its answer what
    /// [`Engine::rank`] gives.
    pub fn ranking(&mut self, sight: &Sight, task: &Task, candidates: &[&str]) -> Result<Order, Error> {
        if candidates.is_empty() {
            return Err(PromptError::NoCandidates.into());
        }
        let prompt = self.context.prompt(task)?;
        let read = candidates.iter().map(|candidate| self.context.candidate(&prompt, candidate));
        let tokens: Vec<Vec<TokenId>> = read.map(|read| Ok(read?.ids)).collect::<Result<_, Error>>()?;
        let seen = self.seen(&[(sight, &prompt)])?.remove(0);
        let longest = tokens.iter().map(Vec::len).max().unwrap_or(0);
        let prefix = Prefix { seen, prompt: prompt.ids, max_new_tokens: longest };
        Ok(Order { prefix, work: Work::Read(tokens), warnings: prompt.warnings, timings: sight.timings().clone() })
    }
}

impl Answer {
    /// What a [`Seer::ranking`] found of its candidates, in the order in which they were given.
    pub fn ranked<'a>(&'a self, candidates: &'a [&str]) -> impl Iterator<Item = Ranked> + 'a {
        // One text is the answer itself.
        let alone = self.candidates.is_empty().then_some((self.score, self.tokens.len()));
        let read = self.candidates.iter().map(|read| (read.score, read.tokens.len())).chain(alone);
        read.zip(candidates).enumerate().map(|(index, ((score, n_tokens), text))| {
            let log_likelihood = score.unwrap_or(f32::NEG_INFINITY);
            Ranked { text: (*text).to_owned(), index, log_likelihood, n_tokens }
        })
    }
}
