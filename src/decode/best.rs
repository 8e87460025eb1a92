//! The best of many scores without sorting them all.

use super::softmax::{LANES, largest};

/// Scores that are skipped or looked at together.
pub(super) const BLOCK: usize = 4 * LANES;

/// Where the largest score stands, of equals the first, as `torch.argmax` gives on CPU.
pub(crate) fn argmax(scores: &[f32]) -> usize {
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

/// Finds the places of values that are `wanted`. Blocks without any are passed by; others are read without branches, which processors foretell
/// wrongly where wanted values are many and scattered.
pub(super) fn find(values: &[f32], wanted: impl Fn(f32) -> bool, places: &mut Vec<usize>) {
    places.clear();
    for (index, block) in values.chunks(BLOCK).enumerate() {
        if block.iter().fold(false, |any, value| any | wanted(*value)) {
            let (mut found, mut n_found) = ([0; BLOCK], 0);
            for (at, value) in block.iter().enumerate() {
                found[n_found] = index * BLOCK + at;
                n_found += usize::from(wanted(*value));
            }
            places.extend_from_slice(&found[..n_found]);
        }
    }
}

/// Finds where a sum over values in order comes to a limit.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// Weights by the exponent and the first bits of the value: only one bucket's values need an order. Neighbours add to sums of their own,
    /// for they often fall into one bucket, where each would wait for the one before.
    buckets: Vec<[f64; 2]>,
    places: Vec<usize>,
    /// Values and places of that bucket.
    keys: Vec<u64>,
}

impl Walk {
    /// Walks `values` from the one nearest to 0, of equals the later first, while the sum of their weights `holds`; gives the place of the
    /// first that does not go by.
    pub(super) fn first_over(&mut self, values: &[f32], weights: &[f32], holds: impl Fn(f32) -> bool) -> Option<usize> {
        const N_BUCKETS: usize = 1 << 11;
        let bucket = |value: &f32| (value.to_bits() >> 20) as usize % N_BUCKETS;
        self.buckets.clear();
        self.buckets.resize(N_BUCKETS, [0.0; 2]);
        for (at, (value, weight)) in values.iter().zip(weights).enumerate() {
            self.buckets[bucket(value)][at % 2] += f64::from(*weight);
        }
        let mut sum = 0.0;
        let over = self.buckets.iter().position(|of_bucket| {
            let of_bucket = of_bucket.iter().sum::<f64>();
            let goes_by = holds((sum + of_bucket) as f32);
            sum += if goes_by { of_bucket } else { 0.0 };
            !goes_by
        })?;
        find(values, |value| bucket(&value) == over, &mut self.places);
        let key = |place: &usize| u64::from(values[*place].abs().to_bits()) << 32 | u64::from(!(*place as u32));
        self.keys.clear();
        self.keys.extend(self.places.iter().map(key));
        self.keys.sort_unstable();
        let place = |key: &u64| !(*key as u32) as usize;
        let first = self.keys.iter().find(|key| {
            sum += f64::from(weights[place(key)]);
            !holds(sum as f32)
        });
        first.or(self.keys.last()).map(place)
    }
}
