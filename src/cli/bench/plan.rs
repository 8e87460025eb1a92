//! What a scenario means: how queries come, and how long the engine warms up.

use std::time::{Duration, Instant};

use super::{Measure, Task};
use crate::bench::load::{Length, Load, Run};
use crate::bench::record::Record;
use crate::bench::report::Work;
use crate::bench::statistics::Sample;

/// As few as have a median that says something.
const WINDOW: usize = 5;
/// Medians of the last three windows that lie this close are stable.
const STABLE: f64 = 0.1;

pub(super) struct Plan {
    pub scenario: &'static str,
    pub load: Load,
    /// Pictures in a query.
    pub n_pictures: usize,
    /// How queries come, in words.
    pub arrivals: String,
    /// Queries of the warm-up between two looks at whether latencies stay.
    pub window: usize,
}

impl Plan {
    pub fn closed(scenario: &'static str, concurrency: usize, n_pictures: usize) -> Self {
        let arrivals = if concurrency == 1 { "one at a time".into() } else { format!("{concurrency} at a time") };
        Self { scenario, load: Load::Closed(concurrency), n_pictures, arrivals, window: WINDOW }
    }

    /// Queries that are measured at least, where so many are wanted.
    pub fn n_queries(&self, wanted: usize) -> usize {
        match &self.load {
            Load::Closed(_) => wanted,
            Load::Open(schedule) => schedule.len(),
        }
    }

    /// Sends queries one by one, or as many together as the load does, until their latencies stay or the time is over.
    pub fn warm_up(&self, run: &mut Run<'_>, time: Duration) -> Vec<Record> {
        let (start, mut records, mut medians) = (Instant::now(), Vec::new(), Vec::new());
        let concurrency = if let Load::Closed(n) = self.load { n } else { 1 };
        while start.elapsed() < time && !run.is_stopped() {
            let window =
                run.go(&Load::Closed(concurrency), Length { queries: self.window.max(concurrency), time: Duration::ZERO }, true);
            let latencies = Sample::new(window.iter().filter(|record| record.is_answered()).map(Record::latency_ms));
            records.extend(window);
            if latencies.is_empty() {
                break; // measuring will say why
            }
            medians.push(latencies.median());
            if is_stable(&medians) {
                break;
            }
        }
        records
    }

    /// Queries a second, of a schedule that has a length.
    fn rate(&self) -> Option<f64> {
        let Load::Open(schedule) = &self.load else { return None };
        let end = schedule.last().filter(|end| !end.is_zero())?;
        Some(schedule.len() as f64 / end.as_secs_f64())
    }

    pub fn work(&self, measure: &Measure, n_inputs: usize) -> Work {
        Work {
            scenario: self.scenario.into(),
            task: measure.inputs.task.name().into(),
            inputs: n_inputs,
            pictures: self.n_pictures,
            arrivals: self.arrivals.clone(),
            concurrency: if let Load::Closed(n) = self.load { Some(n) } else { None },
            rate: self.rate(),
            seed: measure.seed,
            search: measure.inputs.search().filter(|_| self.scenario != "stage"),
            objectives: measure.slo,
        }
    }
}

impl Task {
    pub fn name(self) -> &'static str {
        match self {
            Self::Caption => "caption",
            Self::Ask => "ask",
            Self::Match => "match",
            Self::Embed => "embed",
        }
    }
}

fn is_stable(medians: &[f64]) -> bool {
    let Some(last) = medians.len().checked_sub(3).map(|first| &medians[first..]) else { return false };
    let (least, most) = last.iter().fold((f64::INFINITY, 0.0f64), |(least, most), median| (least.min(*median), most.max(*median)));
    most <= least * (1.0 + STABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_medians_within_a_tenth_are_stable() {
        for (medians, expected) in [
            (&[10.0, 10.0][..], false),
            (&[30.0, 10.0, 10.0], false),
            (&[30.0, 10.0, 10.5, 10.9], true),
            (&[10.0, 10.0, 10.0, 12.0], false),
        ] {
            assert_eq!(is_stable(medians), expected, "{medians:?}");
        }
    }
}
