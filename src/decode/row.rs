//! One text that is being written, and how probable its tokens are.

use super::best::Best;
use super::processors::Past;
use super::softmax::log_sum_exp;
use super::{Ends, Finish, Hypothesis, LogProb, TokenId};

/// A text behind its prompt.
#[derive(Clone, Debug)]
pub(super) struct Row {
    n_prompt: usize,
    /// Prompt and new tokens.
    tokens: Vec<TokenId>,
    pub(super) log_probs: Vec<LogProb>,
    pub(super) finish: Option<Finish>,
}

impl Row {
    pub(super) fn new(prompt: &[TokenId]) -> Self {
        Self { n_prompt: prompt.len(), tokens: prompt.to_vec(), log_probs: Vec::new(), finish: None }
    }

    pub(super) fn past<'a>(&'a self, ends: &'a Ends) -> Past<'a> {
        Past { tokens: &self.tokens, n_prompt: self.n_prompt, ends }
    }

    /// New tokens.
    pub(super) fn written(&self) -> &[TokenId] {
        &self.tokens[self.n_prompt..]
    }

    pub(super) fn push(&mut self, token: TokenId, ends: &Ends) {
        self.tokens.push(token);
        self.finish = ends.finish(self.written());
    }

    pub(super) fn hypothesis(&self) -> Hypothesis {
        let finish = self.finish.unwrap_or_default();
        Hypothesis { tokens: self.written().to_vec(), score: None, finish, log_probs: self.log_probs.clone() }
    }
}

impl LogProb {
    /// Of a token that was chosen where the model gave `logits`.
    pub(super) fn new(token: TokenId, logits: &[f32], n_alternatives: usize) -> Self {
        let shift = log_sum_exp(logits);
        Self { token, log_prob: logits[token as usize] - shift, alternatives: alternatives(logits, shift, n_alternatives) }
    }
}

/// The most probable tokens; `shift` is the logarithm of the sum of exponentials.
pub(super) fn alternatives(logits: &[f32], shift: f32, n: usize) -> Vec<(TokenId, f32)> {
    let mut best = Best::default();
    best.start(n);
    best.look(logits, 0, |logit| logit - shift);
    best.sorted().iter().map(|best| (best.at as TokenId, best.score)).collect()
}
