//! Tokens drawn from the shaped distribution, for one text or several behind one prompt.

use super::processors::Processors;
use super::random::Random;
use super::row::Row;
use super::warpers::{Shortlist, Warpers};
use super::{Ends, Finish, Hypothesis, LogProb, Pick, Scores, Search, TokenId};

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
    /// Log-probabilities, each with as many alternatives.
    pub log_probs: Option<usize>,
}

/// Sampling of texts behind one prompt. They share its row at first, then each has its own until it ends.
#[derive(Debug)]
pub struct Sample {
    options: SampleOptions,
    texts: Vec<(Row, Random)>,
    /// The text of each row.
    running: Vec<usize>,
    list: Shortlist,
    hypotheses: Vec<Hypothesis>,
}

impl Sample {
    /// One text behind `prompt`, image tokens included.
    pub fn new(prompt: &[TokenId], options: SampleOptions) -> Self {
        Self::several(prompt, options, 1)
    }

    /// `n` texts, the k-th drawn as one alone is with seed + k. The first is settled while it is written.
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn several(prompt: &[TokenId], options: SampleOptions, n: usize) -> Self {
        assert!(n > 0, "sampling needs at least one text");
        let seeds = (0..n as u64).map(|k| options.seed.wrapping_add(k));
        let texts = seeds.map(|seed| (Row::new(prompt), Random::new(seed))).collect();
        Self { options, texts, running: (0..n).collect(), list: Shortlist::default(), hypotheses: Vec::new() }
    }

    /// The distribution that the first text's next token is drawn from.
    pub fn probabilities(&mut self, logits: &[f32]) -> Vec<f32> {
        self.shape(0, logits);
        self.list.normalise();
        let mut all = vec![0.0; logits.len()];
        for (token, probability) in self.list.tokens.iter().zip(&self.list.probabilities) {
            all[*token as usize] = *probability;
        }
        all
    }

    fn shape(&mut self, text: usize, logits: &[f32]) {
        let past = self.texts[text].0.past(&self.options.ends);
        self.list.start(logits.iter().copied());
        self.options.processors.apply(past, &mut self.list.scores);
        self.options.warpers.apply(1, &mut self.list);
        self.list.weigh();
    }

    /// Puts a token behind a text; gives it where the text goes on.
    fn draw(&mut self, text: usize, logits: &[f32]) -> Option<TokenId> {
        let (row, random) = &mut self.texts[text];
        let token = self.list.weights.draw(random.uniform()).map_or(0, |place| self.list.tokens[place]);
        row.push(token, &self.options.ends);
        row.log_probs.extend(self.options.log_probs.map(|n| LogProb::new(token, logits, n)));
        row.finish.is_none().then_some(token)
    }
}

impl Search for Sample {
    fn advance(&mut self, scores: Scores<'_>, picks: &mut Vec<Pick>) {
        let texts = std::mem::take(&mut self.running);
        for (place, text) in texts.into_iter().enumerate() {
            // All begin with the one row of the prompt.
            let row = place.min(scores.n_rows() - 1);
            if row == place {
                self.shape(text, scores.row(row));
            }
            if let Some(token) = self.draw(text, scores.row(row)) {
                self.running.push(text);
                picks.push(Pick { parent: row, token });
            }
        }
        if self.running.is_empty() && self.texts.len() > 1 {
            self.hypotheses = self.texts.iter().map(|(row, _)| row.hypothesis()).collect();
        }
    }

    fn settled(&self) -> &[TokenId] {
        self.texts[0].0.written()
    }

    fn log_probs(&self) -> &[LogProb] {
        &self.texts[0].0.log_probs
    }

    fn finish(&self) -> Option<Finish> {
        self.texts[0].0.finish.filter(|_| self.running.is_empty())
    }

    fn hypotheses(&self) -> &[Hypothesis] {
        &self.hypotheses
    }
}
