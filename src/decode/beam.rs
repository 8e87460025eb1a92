//! Beam search, step by step as `transformers` does it (`generation/utils.py`, `_beam_search`).
//!
//! 1. Log-probabilities of every running row, then the processors, then the row's sum so far.
//! 2. The best `max(2, 1 + end tokens) × beams` continuations over all rows, best first.
//! 3. Those that end and stand among the first `beams` go to the finished texts, scored by sum / length ^ penalty.
//! 4. The best `beams` that do not end run on.
//! 5. It is over when nothing can run on, when the running rows cannot improve on the worst finished text (how that is judged is
//!    [`EarlyStopping`]), or when all places are taken and that is enough.

use super::processors::{Past, Processors};
use super::random::Random;
use super::warpers::Warpers;
use super::{Ends, Finish, Hypothesis, Pick, Scores, Search, TokenId};

/// When beam search ends although rows could run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// As soon as `beams` texts are finished.
    Enough,
    /// When the best running row, at its length now, would score no better than the worst finished text.
    #[default]
    Unlikely,
    /// As `Unlikely`, but a positive length penalty is reckoned at the longest length.
    Impossible,
}

impl std::str::FromStr for EarlyStopping {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "true" => Ok(Self::Enough),
            "false" => Ok(Self::Unlikely),
            "never" => Ok(Self::Impossible),
            _ => Err("false, true and never are known".into()),
        }
    }
}

/// How beam search goes.
#[derive(Clone, Debug)]
pub struct BeamOptions {
    /// Rows that run side by side.
    pub beams: usize,
    /// Exponent of the length that sums are divided by; 0 compares plain sums.
    pub length_penalty: f32,
    /// When to end.
    pub early_stopping: EarlyStopping,
    /// Where a text ends.
    pub ends: Ends,
    /// What changes scores.
    pub processors: Processors,
    /// Draws continuations instead of taking the best.
    pub sample: Option<BeamSample>,
}

/// How continuations are drawn: without putting back, from the sums over all rows.
#[derive(Clone, Copy, Debug)]
pub struct BeamSample {
    /// How each row's scores are shaped before they are summed.
    pub warpers: Warpers,
    /// The same seed draws the same continuations.
    pub seed: u64,
}

#[derive(Clone, Debug)]
struct Row {
    /// Prompt and new tokens.
    tokens: Vec<TokenId>,
    sum: f32,
}

#[derive(Clone, Copy, Debug)]
struct Continuation {
    sum: f32,
    row: usize,
    token: TokenId,
}

/// Beam search over one prompt.
#[derive(Debug)]
pub struct Beam {
    options: BeamOptions,
    n_prompt: usize,
    rows: Vec<Row>,
    finished: Vec<Hypothesis>,
    best: Vec<TokenId>,
    finish: Option<Finish>,
    random: Random,
}

impl Beam {
    /// A search behind `prompt`, image tokens included.
    ///
    /// # Panics
    /// If `options` ask for no beams.
    pub fn new(prompt: &[TokenId], options: BeamOptions) -> Self {
        assert!(options.beams > 0, "beam search needs at least one beam");
        let rows = vec![Row { tokens: prompt.to_vec(), sum: 0.0 }];
        let random = Random::new(options.sample.map_or(0, |sample| sample.seed));
        Self { options, n_prompt: prompt.len(), rows, finished: Vec::new(), best: Vec::new(), finish: None, random }
    }

    /// The continuations under consideration, the best (or the first drawn) first.
    fn continuations(&mut self, scores: Scores<'_>) -> Vec<Continuation> {
        let keep = 2.max(1 + self.options.ends.end.len()) * self.options.beams;
        let mut found: Vec<Ranked> = Vec::new();
        let mut own = Vec::new();
        for (index, row) in self.rows.iter().enumerate() {
            own.clear();
            own.extend(log_softmax(scores.row(index)));
            let past = Past { tokens: &row.tokens, n_prompt: self.n_prompt, ends: &self.options.ends };
            self.options.processors.apply(past, &mut own);
            if let Some(sample) = self.options.sample {
                sample.warpers.apply(1 + self.options.ends.end.len(), &mut own);
            }
            let (is_drawn, random) = (self.options.sample.is_some(), &mut self.random);
            let of_row = own.iter().enumerate().map(|(token, score)| Continuation {
                sum: row.sum + score,
                row: index,
                token: token as TokenId,
            });
            let possible = of_row.filter(|next| next.sum > f32::NEG_INFINITY);
            let ranked = possible.map(|next| {
                let luck = if is_drawn { random.gumbel() } else { 0.0 };
                Ranked { rank: f64::from(next.sum) + luck, next }
            });
            keep_best(&mut found, ranked, keep);
        }
        found.into_iter().map(|ranked| ranked.next).collect()
    }

    /// New tokens of a continuation.
    fn written(&self, next: &Continuation) -> Vec<TokenId> {
        [&self.rows[next.row].tokens[self.n_prompt..], &[next.token]].concat()
    }

    fn ends(&self, next: &Continuation) -> bool {
        self.options.ends.finish(&self.written(next)).is_some()
    }

    /// New tokens of every running row.
    fn n_new(&self) -> usize {
        self.rows.first().map_or(0, |row| row.tokens.len() - self.n_prompt)
    }

    fn penalised(&self, sum: f32, length: usize) -> f32 {
        sum / (length as f64).powf(f64::from(self.options.length_penalty)) as f32
    }

    fn take_finished(&mut self, found: &[Continuation]) {
        let length = self.n_new() + 1;
        let ended = |next: &Continuation| {
            let tokens = self.written(next);
            let finish = self.options.ends.finish(&tokens).unwrap_or_default();
            Hypothesis { tokens, score: Some(self.penalised(next.sum, length)), finish, log_probs: Vec::new() }
        };
        let among_the_first = found.iter().take(self.options.beams);
        let new: Vec<Hypothesis> = among_the_first.filter(|next| self.ends(next)).map(ended).collect();
        self.finished.extend(new);
        self.finished.sort_by(|a, b| score(b).total_cmp(&score(a)));
        self.finished.truncate(self.options.beams);
    }

    /// Judged after the step: `best` is the best sum that runs on, at `length`.
    fn is_over(&self, best: f32, length: usize) -> bool {
        let is_full = self.finished.len() == self.options.beams;
        let reckoned = match self.options.early_stopping {
            EarlyStopping::Enough if is_full => return true,
            EarlyStopping::Impossible if self.options.length_penalty > 0.0 => self.options.ends.max_new_tokens,
            _ => length,
        };
        is_full && self.finished.last().is_some_and(|worst| self.penalised(best, reckoned) <= score(worst))
    }

    fn settle(&mut self) {
        self.best = self.finished.first().map(|best| best.tokens.clone()).unwrap_or_default();
        self.finish = Some(self.options.ends.finish(&self.best).unwrap_or(Finish::Length));
    }
}

impl Search for Beam {
    fn advance(&mut self, scores: Scores<'_>, picks: &mut Vec<Pick>) {
        let found = self.continuations(scores);
        self.take_finished(&found);
        let mut running: Vec<Continuation> = found.iter().filter(|next| !self.ends(next)).copied().collect();
        running.sort_by(|a, b| b.sum.total_cmp(&a.sum));
        running.truncate(self.options.beams);
        let length = self.n_new() + 1;
        if running.first().is_none_or(|best| self.is_over(best.sum, length)) {
            self.settle();
            return;
        }
        let continued = |next: &Continuation| {
            let mut tokens = self.rows[next.row].tokens.clone();
            tokens.push(next.token);
            Row { tokens, sum: next.sum }
        };
        self.rows = running.iter().map(continued).collect();
        picks.extend(running.iter().map(|next| Pick { parent: next.row, token: next.token }));
    }

    fn settled(&self) -> &[TokenId] {
        &self.best
    }

    fn finish(&self) -> Option<Finish> {
        self.finish
    }

    fn hypotheses(&self) -> &[Hypothesis] {
        &self.finished
    }
}

/// Natural logarithms of the softmax.
pub fn log_softmax(logits: &[f32]) -> impl Iterator<Item = f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f32 = logits.iter().map(|logit| (logit - largest).exp()).sum();
    let shift = largest + total.ln();
    logits.iter().map(move |logit| logit - shift)
}

fn score(hypothesis: &Hypothesis) -> f32 {
    hypothesis.score.unwrap_or(f32::NEG_INFINITY)
}

struct Ranked {
    rank: f64,
    next: Continuation,
}

/// Keeps `best` sorted, best first; of equals the earlier one stands first.
fn keep_best(best: &mut Vec<Ranked>, more: impl Iterator<Item = Ranked>, keep: usize) {
    for next in more {
        if best.len() == keep && best.last().is_some_and(|last| next.rank <= last.rank) {
            continue;
        }
        let at = best.partition_point(|other| other.rank >= next.rank);
        best.insert(at, next);
        best.truncate(keep);
    }
}
