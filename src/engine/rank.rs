//! Candidate answers by how probable the language model finds them.

use super::write::{Order, Work};
use super::{Engine, Sight};
use crate::decode::TokenId;
use crate::error::Error;
use crate::language::Prefix;
use crate::prompt::{Prompt, PromptError, Task};

/// Candidates that are read side by side. More would take memory and gain no time.
const AT_ONCE: usize = 64;

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
        if candidates.is_empty() {
            return Err(PromptError::NoCandidates.into());
        }
        let prompt = self.context.prompt(task)?;
        let read = candidates.iter().map(|candidate| self.context.candidate(&prompt, candidate));
        let tokens: Vec<Vec<TokenId>> = read.map(|read| Ok(read?.ids)).collect::<Result<_, Error>>()?;
        let seen = self.seer.seen(&[(sight, &prompt)])?.remove(0);
        let longest = tokens.iter().map(Vec::len).max().unwrap_or(0);
        let prefix = Prefix { seen, prompt: prompt.ids.clone(), max_new_tokens: longest };
        let mut ranked = Vec::with_capacity(tokens.len());
        for (tokens, texts) in tokens.chunks(AT_ONCE).zip(candidates.chunks(AT_ONCE)) {
            for (sum, (tokens, text)) in self.likelihoods(&prefix, &prompt, tokens)?.into_iter().zip(tokens.iter().zip(texts)) {
                let (text, index) = ((*text).to_owned(), ranked.len());
                ranked.push(Ranked { text, index, log_likelihood: sum, n_tokens: tokens.len() });
            }
        }
        Ok(ranked)
    }

    fn likelihoods(&mut self, prefix: &Prefix, prompt: &Prompt, texts: &[Vec<TokenId>]) -> Result<Vec<f32>, Error> {
        let (work, warnings) = (Work::Read(texts.to_vec()), prompt.warnings.clone());
        let order = Order { prefix: prefix.clone(), work, warnings, timings: Default::default() };
        let answer = self.finish(vec![Ok(order)], |_, _| std::ops::ControlFlow::Continue(())).remove(0)?;
        let score = |score: Option<f32>| score.unwrap_or(f32::NEG_INFINITY);
        Ok(match answer.candidates.as_slice() {
            // One text is the answer itself.
            [] => vec![score(answer.score)],
            several => several.iter().map(|candidate| score(candidate.score)).collect(),
        })
    }
}
