//! When requests of an open loop arrive: a schedule that is made before the first one is sent, and does not wait for answers.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Gamma};

use super::BenchError;

/// What a schedule may hold, and the bytes of a file that has one.
pub(super) const MOST_ARRIVALS: usize = 10_000_000;
pub(super) const MOST_BYTES: u64 = 256 << 20;
/// Clocks count further, but nobody waits for it.
const MOST_SECONDS: f64 = 1e9;

/// How gaps between arrivals vary around their mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spacing {
    /// All gaps are equal.
    Constant,
    /// Arrivals do not know of each other.
    Poisson,
    /// Gamma-distributed gaps of this shape: below 1 they come in bursts, at 1 it is [`Spacing::Poisson`], above they even out.
    Gamma(f64),
}

/// Arrivals at a rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    per_second: f64,
    spacing: Spacing,
}

impl Rate {
    /// `per_second` and a shape must be above 0 and finite.
    pub fn new(per_second: f64, spacing: Spacing) -> Result<Self, BenchError> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if !positive(per_second) {
            return Err(BenchError::Rate(per_second));
        }
        match spacing {
            Spacing::Gamma(shape) if !positive(shape) => Err(BenchError::Burstiness(shape)),
            _ => Ok(Self { per_second, spacing }),
        }
    }

    /// Arrivals from the start of a run until `end`. The same seed gives the same schedule.
    pub fn schedule(self, end: Duration, seed: u64) -> Result<Vec<Duration>, BenchError> {
        let (mut random, mean) = (StdRng::seed_from_u64(seed), 1.0 / self.per_second);
        let shape = match self.spacing {
            Spacing::Constant => None,
            Spacing::Poisson => Some(1.0),
            Spacing::Gamma(shape) => Some(shape),
        };
        let of_shape = |shape| Gamma::new(shape, mean / shape).map_err(|_| BenchError::Burstiness(shape));
        let gaps = shape.map(of_shape).transpose()?;
        let mut at = 0.0;
        let mut schedule = Vec::new();
        loop {
            at += gaps.map_or(mean, |gaps| gaps.sample(&mut random));
            // Gaps of extreme shapes are no numbers.
            if at.is_nan() || at >= end.as_secs_f64().min(MOST_SECONDS) {
                return Ok(schedule);
            }
            if schedule.len() == MOST_ARRIVALS {
                return Err(BenchError::TooMany(self.per_second, end.as_secs_f64()));
            }
            schedule.push(Duration::from_secs_f64(at));
        }
    }
}

/// Arrivals of a file: seconds from the start, one a line, in order; empty lines and those that begin with `#` say nothing.
pub fn trace(path: &Path) -> Result<Vec<Duration>, BenchError> {
    let unreadable = |source| BenchError::Unreadable { path: path.to_owned(), source };
    let mut content = String::new();
    File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_string(&mut content)).map_err(unreadable)?;
    if content.len() as u64 > MOST_BYTES {
        return Err(BenchError::LongTrace(path.to_owned()));
    }
    let mut schedule: Vec<Duration> = Vec::new();
    for (line, text) in (1..).zip(content.lines().map(str::trim)) {
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let bad = |why| BenchError::Trace { path: path.to_owned(), line, text: text.to_owned(), why };
        let seconds = text.parse().ok().filter(|seconds| *seconds <= MOST_SECONDS);
        let at = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let at = at.ok_or_else(|| bad("is no number of seconds from 0 to 1e9"))?;
        if schedule.last().is_some_and(|last| *last > at) {
            return Err(bad("lies before the line above it"));
        }
        schedule.push(at);
    }
    if schedule.is_empty() { Err(BenchError::EmptyTrace(path.to_owned())) } else { Ok(schedule) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gaps(rate: Rate) -> Vec<f64> {
        let schedule = rate.schedule(Duration::from_secs(2_000), 3).expect("not too many");
        schedule.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect()
    }

    #[test]
    fn gaps_have_the_mean_and_the_spread_of_their_spacing() {
        for (spacing, variation) in
            [(Spacing::Constant, 0.0), (Spacing::Poisson, 1.0), (Spacing::Gamma(0.25), 2.0), (Spacing::Gamma(4.0), 0.5)]
        {
            let gaps = gaps(Rate::new(10.0, spacing).expect("a rate"));
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            assert!((mean - 0.1).abs() < 0.005, "{spacing:?}: {mean}");
            assert!((variance.sqrt() / mean - variation).abs() < 0.05, "{spacing:?}: {}", variance.sqrt() / mean);
        }
    }

    #[test]
    fn a_seed_makes_one_schedule() {
        let (rate, end) = (Rate::new(50.0, Spacing::Poisson).expect("a rate"), Duration::from_secs(5));
        let schedule = |seed| rate.schedule(end, seed).expect("not too many");
        assert_eq!(schedule(1), schedule(1));
        assert_ne!(schedule(1), schedule(2));
        assert!(schedule(1).iter().all(|at| *at < end));
    }

    #[test]
    fn rates_that_make_no_sense_are_refused() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(Rate::new(bad, Spacing::Constant).is_err(), "{bad}");
            assert!(Rate::new(1.0, Spacing::Gamma(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn schedules_end() {
        let schedule = |rate, spacing| Rate::new(rate, spacing).expect("a rate").schedule(Duration::MAX, 0);
        assert!(schedule(1e-10, Spacing::Constant).expect("few").is_empty());
        let many = schedule(1.0, Spacing::Constant).expect_err("30 years").to_string();
        assert!(many.contains("more than 10000000"), "{many}");
        assert!(schedule(1e-300, Spacing::Gamma(1e-300)).expect("no numbers").is_empty());
    }

    #[test]
    fn traces_are_read_and_what_is_wrong_is_named() {
        let path = std::env::temp_dir().join(format!("blip2-trace-{}", std::process::id()));
        for (content, expected) in [
            ("# at\n0\n0.5\n\n0.5\n2e0\n", Ok(4)),
            ("0\n2\n1\n", Err("line 3")),
            ("0\n-1\n", Err("line 2")),
            ("zero", Err("line 1")),
            ("NaN", Err("line 1")),
            ("1e19", Err("line 1")),
            ("# nothing\n", Err("no arrivals")),
        ] {
            std::fs::write(&path, content).expect("a temporary file");
            match (trace(&path), expected) {
                (Ok(found), Ok(n)) => assert_eq!(found.len(), n),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (found, _) => panic!("{content:?}: {found:?}"),
            }
        }
        std::fs::remove_file(&path).expect("it was written");
    }
}
