//! A token drawn from the shaped distribution.

use super::processors::{Past, Processors};
use super::random::Random;
use super::warpers::{Warpers, softmax};
use super::{Ends, Finish, Pick, Scores, Search, TokenId};

/// How sampling goes.
#[derive(Clone, Debug, Default)]
pub struct SampleOptions {
    /// Where the text ends.
    pub ends: Ends,
    /// What changes scores, before they are shaped.
    pub processors: Processors,
    /// How the distribution is shaped.
    pub warpers: Warpers,
    /// The same seed draws the same tokens from the same scores.
    pub seed: u64,
}

/// Sampling of one row.
#[derive(Debug)]
pub struct Sample {
    options: SampleOptions,
    random: Random,
    n_prompt: usize,
    /// Prompt and new tokens.
    tokens: Vec<TokenId>,
    finish: Option<Finish>,
}

impl Sample {
    /// A search behind `prompt`, image tokens included.
    pub fn new(prompt: &[TokenId], options: SampleOptions) -> Self {
        let random = Random::new(options.seed);
        Self { options, random, n_prompt: prompt.len(), tokens: prompt.to_vec(), finish: None }
    }

    /// The distribution that the next token is drawn from.
    pub fn probabilities(&self, logits: &[f32]) -> Vec<f32> {
        let mut scores = logits.to_vec();
        let past = Past { tokens: &self.tokens, n_prompt: self.n_prompt, ends: &self.options.ends };
        self.options.processors.apply(past, &mut scores);
        self.options.warpers.apply(1, &mut scores);
        softmax(&scores)
    }

    fn draw(&mut self, logits: &[f32]) -> TokenId {
        let probabilities = self.probabilities(logits);
        let total: f64 = probabilities.iter().map(|p| f64::from(*p)).sum();
        let mut left = self.random.uniform() * total;
        let mut last = 0;
        for (token, probability) in probabilities.iter().enumerate().filter(|(_, probability)| **probability > 0.0) {
            last = token;
            left -= f64::from(*probability);
            if left < 0.0 {
                break;
            }
        }
        last as TokenId
    }
}

impl Search for Sample {
    fn advance(&mut self, scores: Scores<'_>, picks: &mut Vec<Pick>) {
        let token = self.draw(scores.row(0));
        self.tokens.push(token);
        self.finish = self.options.ends.finish(self.settled());
        if self.finish.is_none() {
            picks.push(Pick { parent: 0, token });
        }
    }

    fn settled(&self) -> &[TokenId] {
        &self.tokens[self.n_prompt..]
    }

    fn finish(&self) -> Option<Finish> {
        self.finish
    }
}
