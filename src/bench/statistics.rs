//! What a sample of times says, and how surely: percentiles with intervals, MLPerf's conservative estimate, outliers, ratios.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use statrs::function::beta::beta_reg;

/// The percentiles that reports have.
pub const PERCENTILES: [f64; 5] = [50.0, 90.0, 95.0, 99.0, 99.9];
/// How sure intervals are.
pub const CONFIDENCE: f64 = 0.95;
/// How sure MLPerf's estimate is that no more than its share lies above it.
const CERTAINTY: f64 = 0.99;
/// The median absolute deviation of a normal distribution is its standard deviation divided by this.
const MAD_TO_DEVIATION: f64 = 1.4826;
/// Deviations from the median beyond which a value is an outlier (Iglewicz and Hoaglin 1993), and beyond which a severe one.
const OUTLYING: [f64; 2] = [3.5, 10.0];
const RESAMPLES: usize = 2_000;
const MOST_RESAMPLED: usize = 5_000;
/// Of a normal distribution, [`CONFIDENCE`] lies within so many deviations.
const NORMAL: f64 = 1.959_963_985;

/// A sample in order.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    sorted: Vec<f64>,
}

/// A percentile as a report shows it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Percentile {
    /// In percent.
    pub rank: f64,
    /// Between the two values beside the rank, as numpy's `percentile` has it.
    pub value: f64,
    /// Holds it with [`CONFIDENCE`].
    pub interval: [f64; 2],
    /// What at least the share `rank` lies below, by MLPerf's early stopping with a certainty of 0.99; none from too few values.
    pub certified: Option<f64>,
}

/// How many values lie far from the median. None is dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Outliers {
    /// Beyond 3.5 deviations, estimated from the median absolute deviation.
    pub mild: usize,
    /// Beyond 10.
    pub severe: usize,
}

/// A sample's description. Units are those of its values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Summary {
    /// Number of values.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// The interval of the mean with [`CONFIDENCE`]: a bootstrap, from 5,000 values on that of a normal distribution.
    pub mean_interval: [f64; 2],
    /// Standard deviation, of a sample (n − 1).
    pub deviation: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// [`PERCENTILES`].
    pub percentiles: Vec<Percentile>,
    /// Far ones.
    pub outliers: Outliers,
}

/// A ratio of two medians.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Ratio {
    /// The first divided by the second.
    pub value: f64,
    /// The bootstrap interval of [`CONFIDENCE`].
    pub interval: [f64; 2],
}

impl Sample {
    /// Of finite values; others are left out.
    pub fn new(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        Self { sorted }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// Everything; none of an empty sample.
    pub fn summary(&self) -> Option<Summary> {
        let (min, max) = (*self.sorted.first()?, *self.sorted.last()?);
        Some(Summary {
            count: self.len(),
            mean: mean(&self.sorted),
            mean_interval: self.mean_interval(),
            deviation: deviation(&self.sorted),
            min,
            max,
            percentiles: PERCENTILES.into_iter().map(|rank| self.percentile(rank)).collect(),
            outliers: self.outliers(),
        })
    }

    /// # Panics
    /// On an empty sample.
    pub fn median(&self) -> f64 {
        self.value_at(50.0)
    }

    /// # Panics
    /// On an empty sample.
    pub fn percentile(&self, rank: f64) -> Percentile {
        Percentile { rank, value: self.value_at(rank), interval: self.interval(rank), certified: self.certified(rank) }
    }

    /// `n` + 1 values from the smallest to the largest, in equal steps of rank.
    ///
    /// # Panics
    /// On an empty sample.
    pub fn quantiles(&self, n: usize) -> Vec<f64> {
        (0..=n).map(|i| self.value_at(100.0 * i as f64 / n as f64)).collect()
    }

    fn value_at(&self, rank: f64) -> f64 {
        let place = rank / 100.0 * (self.len() - 1) as f64;
        let (below, part) = (place.floor() as usize, place.fract());
        let above = (below + 1).min(self.len() - 1);
        self.sorted[below] + part * (self.sorted[above] - self.sorted[below])
    }

    /// Between two values of the sample, which hold the percentile of what it was drawn from at least as often as [`CONFIDENCE`] says,
    /// whatever its distribution: how many of n values lie below is binomial (David and Nagaraja 2003, section 7.1). A bootstrap of the
    /// 99th percentile holds it too seldom. Where the sample is too small the interval ends with its largest value.
    fn interval(&self, rank: f64) -> [f64; 2] {
        let (n, share, tail) = (self.len(), rank / 100.0, (1.0 - CONFIDENCE) / 2.0);
        let at_least = |k: usize| beta_reg(k as f64, (n - k + 1) as f64, share); // that so many lie below
        let low = partition(1, n + 1, |k| 1.0 - at_least(k) <= tail).saturating_sub(1).max(1);
        let high = partition(1, n, |k| at_least(k) > tail);
        [low, high].map(|place| self.sorted[place - 1])
    }

    /// MLPerf's early stopping (inference policies, "early stopping"): of `t` values above, the largest number with which a share `rank`
    /// below is certain enough; the `t − 1` largest values are set aside and the largest of the others counts.
    fn certified(&self, rank: f64) -> Option<f64> {
        let (n, share) = (self.len(), rank / 100.0);
        let is_certain = |t: usize| beta_reg((n - t) as f64, (t + 1) as f64, share) <= 1.0 - CERTAINTY;
        let n_certain = partition(1, n, is_certain) - 1; // certain are all up to a largest one
        (n_certain >= 1).then(|| self.sorted[n - n_certain])
    }

    fn outliers(&self) -> Outliers {
        let median = self.median();
        let deviations = Self::new(self.sorted.iter().map(|value| (value - median).abs()));
        let scale = MAD_TO_DEVIATION * deviations.median();
        let beyond = |times: f64| deviations.sorted.iter().filter(|deviation| **deviation > times * scale).count();
        let [outlying, severe] = OUTLYING.map(|times| if scale > 0.0 { beyond(times) } else { 0 });
        Outliers { mild: outlying - severe, severe }
    }

    /// By resampling; of many values their mean is as good as normally distributed, and resampling takes long.
    fn mean_interval(&self) -> [f64; 2] {
        if self.len() > MOST_RESAMPLED {
            let margin = NORMAL * deviation(&self.sorted) / (self.len() as f64).sqrt();
            return [-margin, margin].map(|margin| mean(&self.sorted) + margin);
        }
        let mut random = StdRng::seed_from_u64(0);
        interval_of((0..RESAMPLES).map(|_| mean(&drawn(&self.sorted, &mut random))))
    }
}

/// Of two samples' medians.
///
/// # Panics
/// If one is empty.
pub fn ratio(over: &Sample, under: &Sample) -> Ratio {
    let mut random = StdRng::seed_from_u64(0);
    let resampled = (0..RESAMPLES).map(|_| {
        let [over, under] = [over, under].map(|sample| Sample::new(drawn(&sample.sorted, &mut random)));
        over.median() / under.median()
    });
    Ratio { value: over.median() / under.median(), interval: interval_of(resampled) }
}

fn interval_of(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let found = Sample::new(values);
    let tail = 100.0 * (1.0 - CONFIDENCE) / 2.0;
    [tail, 100.0 - tail].map(|rank| found.value_at(rank))
}

fn drawn(values: &[f64], random: &mut StdRng) -> Vec<f64> {
    values.iter().map(|_| values[random.random_range(0..values.len())]).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn deviation(values: &[f64]) -> f64 {
    let (mean, n) = (mean(values), values.len());
    if n < 2 { 0.0 } else { (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1) as f64).sqrt() }
}

/// The first number from `low` up to `high` that `is_before` does not hold for, `high` if it holds for all before it.
fn partition(mut low: usize, mut high: usize, is_before: impl Fn(usize) -> bool) -> usize {
    while low < high {
        let middle = low + (high - low) / 2;
        if is_before(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Sample {
        Sample::new((1..=n).map(|i| i as f64))
    }

    #[test]
    fn percentiles_lie_between_values_as_in_numpy() {
        let sample = Sample::new([4.0, 1.0, 3.0, 2.0]);
        for (rank, expected) in [(0.0, 1.0), (25.0, 1.75), (50.0, 2.5), (90.0, 3.7), (100.0, 4.0)] {
            assert!((sample.value_at(rank) - expected).abs() < 1e-12, "{rank}");
        }
    }

    #[test]
    fn too_few_values_certify_nothing() {
        for (rank, least) in [(90.0, 64), (95.0, 130), (99.0, 662), (99.9, 6_636)] {
            assert_eq!(numbers(least - 1).certified(rank), None, "{rank} of {}", least - 1);
            assert_eq!(numbers(least).certified(rank), Some(least as f64), "{rank} of {least}: the largest counts");
        }
    }

    #[test]
    fn what_is_certified_is_no_smaller_than_the_percentile() {
        for n in [64, 100, 1_000, 24_576] {
            let found = numbers(n).percentile(90.0);
            let certified = found.certified.expect("enough values");
            assert!(certified >= found.value, "{n}: {certified} {}", found.value);
        }
        // As published: 24,576 queries estimate p90 within half a percent.
        let found = numbers(24_576).percentile(90.0);
        assert!(found.certified.expect("enough") < 24_576.0 * 0.905);
    }

    #[test]
    fn intervals_hold_the_true_percentile_as_often_as_they_say() {
        let (mut random, trials) = (StdRng::seed_from_u64(5), 500);
        for (rank, n) in [(50.0, 40), (90.0, 200), (99.0, 2_000)] {
            let truth = -(1.0 - rank / 100.0f64).ln();
            let held = (0..trials).filter(|_| {
                let sample = Sample::new((0..n).map(|_| -(1.0 - random.random::<f64>()).ln()));
                let [low, high] = sample.interval(rank);
                (low..=high).contains(&truth)
            });
            let share = held.count() as f64 / trials as f64;
            assert!((0.93..=0.99).contains(&share), "p{rank} of {n}: {share}");
        }
    }

    #[test]
    fn outliers_are_counted_and_kept() {
        let sample = Sample::new((0..100).map(|i| 10.0 + f64::from(i % 10) / 10.0).chain([13.0, 500.0]));
        let summary = sample.summary().expect("values");
        assert_eq!(summary.outliers, Outliers { mild: 1, severe: 1 });
        assert_eq!((summary.count, summary.max), (102, 500.0));
        assert_eq!(Sample::new([1.0; 9]).outliers(), Outliers::default());
    }

    #[test]
    fn a_ratio_of_equal_samples_holds_one() {
        let sample = Sample::new((0..50).map(|i| 100.0 + f64::from(i % 7)));
        let found = ratio(&sample, &sample);
        assert!(found.value == 1.0 && found.interval[0] <= 1.0 && found.interval[1] >= 1.0, "{found:?}");
        let double = Sample::new(sample.sorted.iter().map(|value| value * 2.0));
        assert!(ratio(&double, &sample).interval[0] > 1.8);
    }

    #[test]
    fn an_empty_sample_says_nothing_and_a_single_value_itself() {
        assert_eq!(Sample::new([f64::NAN]).summary(), None);
        let one = Sample::new([7.0]).summary().expect("a value");
        assert_eq!((one.mean, one.deviation, one.percentiles[3].value, one.percentiles[3].certified), (7.0, 0.0, 7.0, None));
    }

    #[test]
    fn intervals_of_means_go_on_from_few_values_to_many() {
        let width = |n: usize| {
            let [low, high] = Sample::new((0..n).map(|i| (i % 100) as f64)).summary().expect("values").mean_interval;
            assert!(low < 49.5 && 49.5 < high);
            (high - low) * (n as f64).sqrt()
        };
        let (few, many) = (width(5_000), width(5_100));
        assert!((few / many - 1.0).abs() < 0.05, "{few} {many}");
    }
}
