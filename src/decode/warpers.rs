//! What shapes the distribution that is drawn from, in the order of `transformers`: temperature, top-k, top-p, min-p, typical.

use super::TokenId;
use super::best::{Best, Walk, find};
use super::softmax::{Weights, largest, sum};

/// How a distribution is shaped. The default leaves it as it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Warpers {
    /// Divides scores; below 1 sharpens.
    pub temperature: f32,
    /// Keeps this many of the best, and whatever equals the last of them; 0 is off.
    pub top_k: usize,
    /// Keeps the best that together reach this probability; 1 is off.
    pub top_p: f32,
    /// Keeps what has at least this share of the best one's probability; 0 is off.
    pub min_p: f32,
    /// Keeps those nearest to the expected information that together reach this probability (Meister et al. 2022); 1 is off.
    pub typical_p: f32,
}

impl Default for Warpers {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, typical_p: 1.0 }
    }
}

impl Warpers {
    /// Shapes what is listed. At least `keep` tokens stay.
    pub(super) fn apply(&self, keep: usize, list: &mut Shortlist) {
        if self.temperature != 1.0 {
            list.scores.iter_mut().for_each(|score| *score /= self.temperature);
        }
        if self.top_k > 0 {
            list.keep_top_k(self.top_k.max(keep));
        }
        if self.top_p < 1.0 {
            list.keep_top_p(self.top_p, keep);
        }
        if self.min_p > 0.0 {
            list.keep_min_p(self.min_p, keep);
        }
        if self.typical_p < 1.0 {
            list.keep_typical(self.typical_p, keep);
        }
    }
}

/// Tokens that may be drawn, by their ids.
#[derive(Debug, Default)]
pub(super) struct Shortlist {
    pub(super) tokens: Vec<TokenId>,
    pub(super) scores: Vec<f32>,
    /// As [`weigh`](Self::weigh) found them.
    pub(super) weights: Weights,
    /// As [`normalise`](Self::normalise) found them.
    pub(super) probabilities: Vec<f32>,
    /// What tokens add to the expected information; then how near their own is to it: minus the distance.
    nearness: Vec<f32>,
    choice: Choice,
}

impl Shortlist {
    /// Lists the whole vocabulary.
    pub(super) fn start(&mut self, scores: impl Iterator<Item = f32>) {
        self.scores.clear();
        self.scores.extend(scores);
        self.tokens.clear();
        self.tokens.extend(0..self.scores.len() as TokenId);
    }

    /// Finds the weights of what is listed; gives the logarithm of the sum of exponentials.
    pub(super) fn weigh(&mut self) -> f32 {
        self.weights.weigh(&self.scores)
    }

    /// The same, and the probabilities.
    pub(super) fn normalise(&mut self) -> f32 {
        let shift = self.weigh();
        self.weights.probabilities(&mut self.probabilities);
        shift
    }

    /// Makes one of those listed impossible.
    pub(super) fn take(&mut self, place: usize) {
        self.scores[place] = f32::NEG_INFINITY;
        self.weights.take(place);
    }

    fn keep_top_k(&mut self, k: usize) {
        if let Some(threshold) = self.choice.best(&self.scores, k.min(self.scores.len())) {
            self.choice.stay_from(&self.scores, threshold);
            self.retain();
        }
    }

    fn keep_top_p(&mut self, p: f32, keep: usize) {
        self.normalise();
        self.choice.stay_before_tail(&self.probabilities, 1.0 - p);
        self.choice.fill_up(&self.probabilities, keep);
        self.retain();
    }

    fn keep_min_p(&mut self, p: f32, keep: usize) {
        self.normalise();
        self.choice.stay_from(&self.probabilities, p * largest(&self.probabilities));
        self.choice.fill_up(&self.probabilities, keep);
        self.retain();
    }

    fn keep_typical(&mut self, mass: f32, keep: usize) {
        let shift = self.normalise();
        let information = |(p, score): (&f32, &f32)| if *p > 0.0 { *p * (shift - score) } else { 0.0 };
        self.nearness.clear();
        self.nearness.extend(self.probabilities.iter().zip(&self.scores).map(information));
        let expected = sum(&self.nearness) as f32;
        self.nearness.clear();
        self.nearness.extend(self.scores.iter().map(|score| -(shift - score - expected).abs()));
        let threshold = self.choice.reach(&self.nearness, &self.probabilities, mass);
        self.choice.stay_from(&self.nearness, threshold);
        self.choice.fill_up(&self.nearness, keep);
        self.retain();
    }

    fn retain(&mut self) {
        for (new, &old) in self.choice.places.iter().enumerate() {
            self.tokens[new] = self.tokens[old];
            self.scores[new] = self.scores[old];
        }
        self.tokens.truncate(self.choice.places.len());
        self.scores.truncate(self.choice.places.len());
    }
}

/// Finds which places of a list stay.
#[derive(Debug, Default)]
struct Choice {
    /// Ascending.
    places: Vec<usize>,
    best: Best,
    walk: Walk,
}

impl Choice {
    /// The n-th best of `values`.
    fn best(&mut self, values: &[f32], n: usize) -> Option<f32> {
        self.best.start(n);
        self.best.look(values, 0, |value| value);
        self.best.sorted().get(n - 1).map(|last| last.score)
    }

    /// Those stay that have at least this value.
    fn stay_from(&mut self, values: &[f32], least: f32) {
        find(values, |value| value >= least, &mut self.places);
    }

    /// If fewer than `keep` stay, the best `keep` do.
    fn fill_up(&mut self, values: &[f32], keep: usize) {
        if self.places.len() < keep {
            self.best.start(keep);
            self.best.look(values, 0, |value| value);
            self.places.clear();
            self.places.extend(self.best.sorted().iter().map(|best| best.at));
            self.places.sort_unstable();
        }
    }

    /// Summed from the smallest, as the reference does, those go whose sum so far is at most `tail`; of equals the later ones go first.
    fn stay_before_tail(&mut self, probabilities: &[f32], tail: f32) {
        self.places.clear();
        if let Some(last) = self.walk.first_over(probabilities, probabilities, |sum| sum <= tail) {
            self.stay_from(probabilities, probabilities[last]);
            self.places.retain(|place| probabilities[*place] > probabilities[last] || *place <= last);
        }
    }

    /// The nearness of the last that is needed to reach `mass`, from the nearest on; −∞ if all do not.
    fn reach(&mut self, nearness: &[f32], probabilities: &[f32], mass: f32) -> f32 {
        self.walk.first_over(nearness, probabilities, |sum| sum < mass).map_or(f32::NEG_INFINITY, |last| nearness[last])
    }
}
