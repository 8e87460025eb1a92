//! The slope of points that others scatter about, as the median of all slopes between two of them (Theil 1950, Sen 1968).

/// Of a standard normal distribution, what 0.975 lie below.
const NORMAL_975: f64 = 1.959_964;

/// How much a value grows by a unit of the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slope {
    /// The median of the slopes.
    pub value: f64,
    /// Holds it with a confidence of 0.95, by the variance of Kendall's statistic with ties.
    pub interval: [f64; 2],
}

impl Slope {
    /// Of pairs (x, y) whose x all differ; nothing of fewer than three.
    pub fn of(points: &[(f64, f64)]) -> Option<Self> {
        if points.len() < 3 {
            return None;
        }
        let pairs = points.iter().enumerate().flat_map(|(i, a)| points[i + 1..].iter().map(move |b| (b.1 - a.1) / (b.0 - a.0)));
        let mut slopes: Vec<f64> = pairs.collect();
        slopes.sort_by(f64::total_cmp);
        let (n, margin) = (slopes.len(), NORMAL_975 * kendall_variance(points).sqrt());
        let low = (((n as f64 - margin) / 2.0).floor() as usize).saturating_sub(1);
        let high = (((n as f64 + margin) / 2.0).ceil() as usize).min(n - 1);
        Some(Self { value: (slopes[(n - 1) / 2] + slopes[n / 2]) / 2.0, interval: [slopes[low], slopes[high]] })
    }
}

/// Of the number of rising pairs less that of falling ones, where nothing grows.
fn kendall_variance(points: &[(f64, f64)]) -> f64 {
    let mut values: Vec<f64> = points.iter().map(|point| point.1).collect();
    values.sort_by(f64::total_cmp);
    let of = |n: usize| (n * (n - 1) * (2 * n + 5)) as f64;
    let ties: f64 = values.chunk_by(|a, b| a == b).map(|equal| of(equal.len())).sum();
    (of(points.len()) - ties) / 18.0
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn one_wild_point_changes_nothing() {
        let mut points: Vec<_> = (0..20).map(|i| (f64::from(i), 3.0 * f64::from(i))).collect();
        points[7].1 = 1e6;
        let found = Slope::of(&points).expect("points");
        assert!((found.value - 3.0).abs() < 1e-9 && found.interval[0] <= 3.0 && found.interval[1] >= 3.0, "{found:?}");
        assert_eq!(Slope::of(&points[..2]), None);
        let flat = Slope::of(&[(0.0, 5.0), (1.0, 5.0), (2.0, 5.0)]).expect("points");
        assert_eq!((flat.value, flat.interval), (0.0, [0.0, 0.0]));
    }

    #[test]
    fn intervals_hold_the_true_slope_as_often_as_they_say() {
        let (mut random, trials) = (StdRng::seed_from_u64(3), 1_000);
        let held = (0..trials).filter(|_| {
            let points: Vec<_> = (0..20).map(|i| (f64::from(i), 0.5 * f64::from(i) + 8.0 * random.random::<f64>().ln())).collect();
            let [low, high] = Slope::of(&points).expect("points").interval;
            (low..=high).contains(&0.5)
        });
        let share = held.count() as f64 / f64::from(trials);
        assert!((0.93..=0.985).contains(&share), "{share}");
    }
}
