//! What shapes the distribution that is drawn from, in the order of `transformers`: temperature, top-k, top-p, min-p, typical.

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
    /// Changes one row of scores; what is dropped becomes −∞. At least `keep` tokens stay.
    pub fn apply(&self, keep: usize, scores: &mut [f32]) {
        if self.temperature != 1.0 {
            scores.iter_mut().for_each(|score| *score /= self.temperature);
        }
        if self.top_k > 0 {
            keep_top_k(self.top_k.max(keep), scores);
        }
        if self.top_p < 1.0 {
            keep_top_p(self.top_p, keep, scores);
        }
        if self.min_p > 0.0 {
            keep_min_p(self.min_p, keep, scores);
        }
        if self.typical_p < 1.0 {
            keep_typical(self.typical_p, keep, scores);
        }
    }
}

/// Probabilities of scores.
pub(super) fn softmax(scores: &[f32]) -> Vec<f32> {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights: Vec<f32> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f32 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight /= total);
    weights
}

/// Indices of `values`, the largest first.
fn descending(values: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order
}

fn drop_all(tokens: &[usize], scores: &mut [f32]) {
    for token in tokens {
        scores[*token] = f32::NEG_INFINITY;
    }
}

fn keep_top_k(k: usize, scores: &mut [f32]) {
    let mut sorted = scores.to_vec();
    let last = k.min(scores.len()) - 1;
    let (_, threshold, _) = sorted.select_nth_unstable_by(last, |a, b| b.total_cmp(a));
    let threshold = *threshold;
    scores.iter_mut().filter(|score| **score < threshold).for_each(|score| *score = f32::NEG_INFINITY);
}

fn keep_top_p(p: f32, keep: usize, scores: &mut [f32]) {
    let probabilities = softmax(scores);
    let order = descending(&probabilities);
    // Summed from the smallest, as the reference does: those go whose sum so far is at most 1 − p.
    let mut sum = 0.0;
    let dropped = order.iter().rev().take_while(|token| {
        sum += probabilities[**token];
        sum <= 1.0 - p
    });
    let n_dropped = dropped.count().min(order.len().saturating_sub(keep));
    drop_all(&order[order.len() - n_dropped..], scores);
}

fn keep_min_p(p: f32, keep: usize, scores: &mut [f32]) {
    let probabilities = softmax(scores);
    let order = descending(&probabilities);
    let threshold = p * probabilities[order[0]];
    let dropped: Vec<usize> = order.into_iter().skip(keep).filter(|token| probabilities[*token] < threshold).collect();
    drop_all(&dropped, scores);
}

fn keep_typical(mass: f32, keep: usize, scores: &mut [f32]) {
    let probabilities = softmax(scores);
    let logs: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
    let information = |(p, log): (&f32, &f32)| if *p > 0.0 { -p * log } else { 0.0 };
    let expected: f32 = probabilities.iter().zip(&logs).map(information).sum();
    let distances: Vec<f32> = logs.iter().map(|log| (-log - expected).abs()).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| distances[*a].total_cmp(&distances[*b]));
    let mut sum = 0.0;
    let below = order.iter().take_while(|token| {
        sum += probabilities[**token];
        sum < mass
    });
    // The one that reaches the mass stays as well.
    let last = below.count().min(order.len() - 1);
    let threshold = distances[order[last]];
    let dropped: Vec<usize> = order.into_iter().skip(keep).filter(|token| distances[*token] > threshold).collect();
    drop_all(&dropped, scores);
}
