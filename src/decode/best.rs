//! The best of many scores without sorting them all.

use super::softmax::{LANES, largest};

/// Scores that are skipped or looked at together.
pub(super) const BLOCK: usize = 4 * LANES;

/// Where the largest score stands, of equals the first, as `torch.argmax` gives on CPU.
pub(super) fn argmax(scores: &[f32]) -> usize {
    let mut best = (f32::NEG_INFINITY, 0);
    for (index, block) in scores.chunks(BLOCK).enumerate() {
        let score = largest(block);
        if score > best.0 {
            best = (score, index * BLOCK);
        }
    }
    best.1 + scores[best.1..].iter().position(|score| *score == best.0).unwrap_or(0)
}

/// A score and where it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scored {
    pub(super) score: f32,
    pub(super) at: usize,
}

/// Keeps the best of scores that pass by in order, of equals the first.
#[derive(Debug, Default)]
pub(super) struct Best {
    keep: usize,
    /// The best so far, and up to as many others.
    found: Vec<Scored>,
    /// What a score must exceed.
    least: f32,
}

impl Best {
    /// Forgets everything; from now on `keep` are wanted.
    pub(super) fn start(&mut self, keep: usize) {
        self.keep = keep;
        self.found.clear();
        self.least = if keep == 0 { f32::INFINITY } else { f32::NEG_INFINITY };
    }

    /// Looks at the scores of `values`, which stand in a row from `first`. Those of −∞ are none.
    pub(super) fn look(&mut self, values: &[f32], first: usize, score: impl Fn(f32) -> f32) {
        for (index, block) in values.chunks(BLOCK).enumerate() {
            if block.iter().fold(false, |any, value| any | (score(*value) > self.least)) {
                let scored = block.iter().enumerate();
                scored.for_each(|(at, value)| self.add(Scored { score: score(*value), at: first + index * BLOCK + at }));
            }
        }
    }

    fn add(&mut self, next: Scored) {
        if next.score > self.least {
            self.found.push(next);
            if self.found.len() >= self.keep.saturating_mul(2) {
                self.drop_others();
                self.least = self.found[self.keep - 1].score;
            }
        }
    }

    fn drop_others(&mut self) {
        if self.found.len() > self.keep {
            self.found.select_nth_unstable_by(self.keep - 1, best_first);
            self.found.truncate(self.keep);
        }
    }

    /// What was kept, the best first.
    pub(super) fn sorted(&mut self) -> &[Scored] {
        self.drop_others();
        self.found.sort_unstable_by(best_first);
        &self.found
    }
}

fn best_first(a: &Scored, b: &Scored) -> std::cmp::Ordering {
    b.score.total_cmp(&a.score).then(a.at.cmp(&b.at))
}

/// Walks `keys` from the smallest while the sum of their weights `holds`; gives the first that does not go by. The upper half of a key is a
/// float from 0 up, and equal keys there are none.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// Weights by the exponent and the first bits of the float: only one bucket's keys need an order.
    buckets: Vec<f64>,
    keys: Vec<u64>,
}

impl Walk {
    pub(super) fn first_over(
        &mut self,
        keys: impl Iterator<Item = u64> + Clone,
        weight: impl Fn(u64) -> f32,
        holds: impl Fn(f32) -> bool,
    ) -> Option<u64> {
        let bucket = |key: u64| (key >> 51) as usize;
        self.buckets.clear();
        self.buckets.resize(1 << 13, 0.0);
        keys.clone().for_each(|key| self.buckets[bucket(key)] += f64::from(weight(key)));
        let mut sum = 0.0;
        let over = self.buckets.iter().position(|of_bucket| {
            let goes_by = holds((sum + of_bucket) as f32);
            sum += if goes_by { *of_bucket } else { 0.0 };
            !goes_by
        })?;
        self.keys.clear();
        self.keys.extend(keys.filter(|key| bucket(*key) == over));
        self.keys.sort_unstable();
        let first = self.keys.iter().find(|key| {
            sum += f64::from(weight(**key));
            !holds(sum as f32)
        });
        first.or(self.keys.last()).copied()
    }
}
