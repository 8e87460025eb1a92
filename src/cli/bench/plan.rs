//! What a scenario means: how queries come, and how long the engine warms up.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use super::{Measure, Task};
use crate::bench::keep::MOST_OF_LONG_RUNS;
use crate::bench::load::{Length, Load, Run};
use crate::bench::record::Record;
use crate::bench::report::Work;
use crate::bench::statistics::Sample;
use crate::cli::Failure;

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
    /// Whether it goes on for hours, and memory is watched.
    pub soaks: bool,
}

/// Queries of a turn for each that is under way together: fewer are mostly beginning and end.
const IN_A_TURN: usize = 4;

impl Plan {
    pub fn closed(scenario: &'static str, concurrency: usize, n_pictures: usize) -> Self {
        let arrivals = if concurrency == 1 { "one at a time".into() } else { format!("{concurrency} at a time") };
        Self { scenario, load: Load::Closed(concurrency), n_pictures, arrivals, window: WINDOW, soaks: false }
    }

    /// Queries that are measured at least, where so many are wanted.
    pub fn n_queries(&self, wanted: usize) -> usize {
        match &self.load {
            Load::Closed(_) => wanted,
            Load::Open(schedule) => schedule.len(),
        }
    }

    /// Records that are kept of those that count.
    pub fn most_records(&self) -> usize {
        if self.soaks { MOST_OF_LONG_RUNS } else { usize::MAX }
    }

    /// Refuses turns in which nothing would come.
    pub fn fit_for(self, turns: Option<NonZeroU16>) -> Result<Self, Failure> {
        match (&self.load, turns.map(|n| usize::from(n.get()))) {
            (Load::Open(schedule), Some(n)) if schedule.len() < n => {
                Err(Failure::Usage(format!("{} arrivals are too few for {n} turns", schedule.len())))
            }
            _ => Ok(self),
        }
    }

    /// The load in `n` turns, and how long each is at least. A schedule is cut into pieces of nearly as many arrivals each.
    pub fn turns(&self, n: u16, whole: Length) -> Vec<(Load, Length)> {
        let (time, n) = (whole.time / u32::from(n), usize::from(n));
        let queries = whole.queries.div_ceil(n);
        match &self.load {
            Load::Closed(concurrency) => {
                let queries = if *concurrency > 1 { queries.max(IN_A_TURN * concurrency) } else { queries };
                vec![(Load::Closed(*concurrency), Length { queries, time }); n]
            }
            Load::Open(schedule) => {
                let piece = |i: usize| {
                    let [from, to] = [i, i + 1].map(|i| schedule.len() * i / n);
                    let before = from.checked_sub(1).map_or(Duration::ZERO, |last| schedule[last]);
                    let times = schedule[from..to].iter().map(|at| *at - before).collect();
                    (Load::Open(times), Length { queries: 0, time: Duration::ZERO })
                };
                (0..n).map(piece).collect()
            }
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
    fn turns_make_the_whole() {
        let whole = Length { queries: 10, time: Duration::from_secs(9) };
        let turns = Plan::closed("single", 1, 1).turns(3, whole);
        assert!(turns.len() == 3 && turns.iter().all(|(_, one)| one.queries == 4 && one.time == Duration::from_secs(3)));
        assert!(Plan::closed("offline", 8, 1).turns(3, whole).iter().all(|(_, one)| one.queries == 32));
        let schedule: Vec<_> = [0, 1, 3, 6, 10].map(Duration::from_secs).into();
        let plan = Plan { load: Load::Open(schedule), ..Plan::closed("server", 1, 1) };
        let found: Vec<Vec<u64>> = plan
            .turns(2, whole)
            .iter()
            .map(|(load, _)| match load {
                Load::Open(times) => times.iter().map(Duration::as_secs).collect(),
                Load::Closed(_) => Vec::new(),
            })
            .collect();
        assert_eq!(found, [vec![0, 1], vec![2, 5, 9]]);
    }

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
