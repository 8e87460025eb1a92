//! Exponentials of a whole vocabulary and their sums, in loops that the compiler vectorises.

/// Values that are looked at side by side.
pub(super) const LANES: usize = 16;
/// Exponentials that are computed before they are summed.
const BLOCK: usize = 16 * LANES;

/// The largest value that is a number; −∞ where there is none.
pub(super) fn largest(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        lanes = std::array::from_fn(|lane| larger(lanes[lane], chunk[lane]));
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// Natural logarithms of the softmax.
pub fn log_softmax(logits: &[f32]) -> impl Iterator<Item = f32> {
    let shift = log_sum_exp(logits);
    logits.iter().map(move |logit| logit - shift)
}

/// Natural logarithm of the sum of exponentials: what a logit exceeds its log-probability by.
pub(super) fn log_sum_exp(logits: &[f32]) -> f32 {
    let largest = largest(logits);
    // A buffer of its own leaves the compiler two loops that it vectorises; as one it does not.
    let of_block = |block: &[f32]| {
        let mut weights = [0.0; BLOCK];
        weights.iter_mut().zip(block).for_each(|(weight, logit)| *weight = exp(logit - largest));
        sum(&weights)
    };
    largest + logits.chunks(BLOCK).map(of_block).sum::<f64>().ln() as f32
}

/// Exponentials of scores less the largest of them: a distribution that is drawn from.
#[derive(Debug, Default)]
pub(super) struct Weights {
    values: Vec<f32>,
    /// Of each block.
    sums: Vec<f64>,
    /// Of all, as they were weighed.
    whole: f64,
}

impl Weights {
    /// Weighs `scores`; gives the [`log_sum_exp`] of them.
    pub(super) fn weigh(&mut self, scores: &[f32]) -> f32 {
        let largest = largest(scores);
        self.values.resize(scores.len(), 0.0);
        self.sums.clear();
        for (weights, scores) in self.values.chunks_mut(BLOCK).zip(scores.chunks(BLOCK)) {
            weights.iter_mut().zip(scores).for_each(|(weight, score)| *weight = exp(score - largest));
            self.sums.push(sum(weights));
        }
        self.whole = self.total();
        largest + self.whole.ln() as f32
    }

    fn total(&self) -> f64 {
        self.sums.iter().sum()
    }

    /// What is left of the whole.
    pub(super) fn share(&self) -> f64 {
        self.total() / self.whole
    }

    /// Weights as shares of the whole.
    pub(super) fn probabilities(&self, probabilities: &mut Vec<f32>) {
        let total = self.whole as f32;
        probabilities.clear();
        probabilities.extend(self.values.iter().map(|weight| weight / total));
    }

    /// Where `luck`, from 0 to below 1, falls; nowhere if all weights are 0.
    pub(super) fn draw(&self, luck: f64) -> Option<usize> {
        let mut left = luck * self.total();
        let start = fall(self.sums.iter().copied(), &mut left)? * BLOCK;
        let block = self.values[start..].iter().take(BLOCK).copied().map(f64::from);
        fall(block, &mut left).map(|place| start + place)
    }

    /// Makes a weight 0.
    pub(super) fn take(&mut self, place: usize) {
        self.values[place] = 0.0;
        let block = place / BLOCK;
        self.sums[block] = sum(&self.values[block * BLOCK..self.values.len().min((block + 1) * BLOCK)]);
    }
}

/// On which of weights that stand in a row a point falls, and how far into it. Where rounding lets it pass them all, that is the last.
fn fall(weights: impl Iterator<Item = f64>, left: &mut f64) -> Option<usize> {
    let mut found = None;
    for (place, weight) in weights.enumerate().filter(|(_, weight)| *weight > 0.0) {
        found = Some(place);
        if *left < weight {
            break;
        }
        *left -= weight;
    }
    found
}

/// The sum in double precision.
pub(super) fn sum(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        lanes = std::array::from_fn(|lane| lanes[lane] + f64::from(chunk[lane]));
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|value| f64::from(*value)).sum::<f64>()
}

/// e^x for x ≤ 0, within 1.1 ulp; 0 where the result would be subnormal, and for what is no number.
fn exp(x: f32) -> f32 {
    // Added to a small float, this leaves its nearest integer in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first short enough that its products with integers are exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = (std::f64::consts::LN_2 - LN_2_HIGH as f64) as f32;
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    // Taylor's series: for |r| ≤ ln 2 / 2 what is left out is 5e-9 of the result. In pairs, which do not wait for each other.
    let square = r * r;
    let pair = |n: f32, next: f32| r * (1.0 / next) + 1.0 / n;
    let tail = (pair(720.0, 5040.0) * square + pair(24.0, 120.0)) * square + pair(2.0, 6.0);
    let power = f32::from_bits(rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x > -87.0 { (tail * square + r + 1.0) * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_right_within_1_1_ulp() {
        let mut worst = 0.0f64;
        for step in 0..2_000_000 {
            let x = -87.0 * step as f32 / 2_000_000.0;
            let wanted = f64::from(x).exp();
            let ulp = f64::from(f32::EPSILON) * 2f64.powi(wanted.log2().floor() as i32);
            worst = worst.max((f64::from(exp(x)) - wanted).abs() / ulp);
        }
        assert!(worst < 1.1, "{worst} ulp");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!([exp(-90.0), exp(f32::NEG_INFINITY), exp(f32::NAN)], [0.0; 3]);
    }

    #[test]
    fn sums_keep_their_precision_over_a_whole_vocabulary() {
        let logits: Vec<f32> = (0..50_272u32).map(|token| (token.wrapping_mul(2_654_435_761) >> 8) as f32 / 4e6).collect();
        let wanted = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
        assert!((f64::from(log_sum_exp(&logits)) - wanted).abs() < 1e-6);
        let (mut weights, mut probabilities) = (Weights::default(), Vec::new());
        assert_eq!(weights.weigh(&logits), log_sum_exp(&logits));
        weights.probabilities(&mut probabilities);
        assert!((probabilities.iter().map(|p| f64::from(*p)).sum::<f64>() - 1.0).abs() < 1e-7);
    }

    #[test]
    fn luck_falls_on_weights_by_their_size_and_never_on_none() {
        let none = f32::NEG_INFINITY;
        let mut weights = Weights::default();
        weights.weigh(&[vec![none; 700], vec![0.0, none, 3f32.ln()], vec![none; 300]].concat());
        assert_eq!([0.0, 0.24, 0.26, 0.999].map(|luck| weights.draw(luck)), [700, 700, 702, 702].map(Some));
        weights.take(702);
        assert!((weights.share() - 0.25).abs() < 1e-6);
        assert_eq!(weights.draw(0.999), Some(700));
        weights.take(700);
        assert_eq!((weights.share(), weights.draw(0.5)), (0.0, None));
    }

    #[test]
    fn the_largest_is_a_number() {
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
        for at in 0..40 {
            let values: Vec<f32> = (0..40).map(|i| if i == at { 3.0 } else { f32::NAN }).collect();
            assert_eq!(largest(&values), 3.0);
        }
    }
}
