//! Whether a process that works for hours takes more and more memory, or becomes slower.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::environment::resident_bytes;
use super::record::Record;
use super::slope::Slope;
use super::statistics::{Ratio, Sample, ratio};

/// More samples are thinned to half as many.
const MOST_SAMPLES: usize = 500;
const FIRST_INTERVAL: Duration = Duration::from_millis(100);
/// Caches and heaps fill in the first tenth of a run.
const SETTLING: f64 = 0.1;
/// Neighbouring samples are nearly equal; medians of so many blocks are taken for independent.
const BLOCKS: usize = 20;
const FEWEST_BLOCKS: usize = 8;
/// Growth of a smaller share an hour is no objection,
const LEAST_SHARE: f64 = 0.01;
/// nor that of fewer bytes within the run: records that are kept take some.
const LEAST_BYTES: f64 = 16.0 * 1024.0 * 1024.0;

/// Resident memory of the process while it was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Memory {
    /// Seconds from the end of the warm-up, and bytes; 500 at most.
    pub samples: Vec<(f64, u64)>,
    /// How it grows; none of too few samples.
    pub growth: Option<Growth>,
}

/// How memory grows behind the first tenth of the time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Growth {
    /// Bytes an hour: the median of the slopes between medians of 20 blocks (Theil and Sen).
    pub bytes_per_hour: f64,
    /// Holds it with 0.95 (Sen 1968, with ties).
    pub interval: [f64; 2],
    /// Seconds that it was seen over.
    pub seen_s: f64,
    /// What was resident in the middle of them.
    pub resident_bytes: u64,
}

/// How latency changes over a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Drift {
    /// The median of the first tenth of the queries, in milliseconds.
    pub first_ms: f64,
    /// That of the last tenth.
    pub last_ms: f64,
    /// The last divided by the first.
    pub ratio: Ratio,
}

/// Looks at this process's memory now and then, on a thread of its own.
pub struct Watch {
    end: Sender<()>,
    thread: JoinHandle<Vec<(f64, u64)>>,
}

/// What was seen, and how long until the next look.
struct Samples {
    taken: Vec<(f64, u64)>,
    interval: Duration,
}

impl Samples {
    /// One more, where the system tells. Of too many every second stays, and from then on half as many are taken.
    fn add(&mut self, sample: Option<(f64, u64)>) {
        self.taken.extend(sample);
        if self.taken.len() > MOST_SAMPLES {
            self.taken = std::mem::take(&mut self.taken).into_iter().step_by(2).collect();
            self.interval *= 2;
        }
    }
}

impl Watch {
    /// From now on.
    pub fn start() -> Self {
        let (end, ended) = channel();
        let thread = std::thread::spawn(move || {
            let (start, mut samples) = (Instant::now(), Samples { taken: Vec::new(), interval: FIRST_INTERVAL });
            loop {
                samples.add(resident_bytes().map(|bytes| (start.elapsed().as_secs_f64(), bytes)));
                if ended.recv_timeout(samples.interval) != Err(RecvTimeoutError::Timeout) {
                    return samples.taken;
                }
            }
        });
        Self { end, thread }
    }

    /// Nothing where the system does not tell.
    pub fn end(self) -> Option<Memory> {
        drop(self.end);
        let samples = self.thread.join().expect("it only reads and notes");
        (!samples.is_empty()).then(|| Memory { growth: Growth::of(&samples), samples })
    }
}

impl Growth {
    fn of(samples: &[(f64, u64)]) -> Option<Self> {
        let (first, last) = (samples.first()?.0, samples.last()?.0);
        let settled: Vec<_> = samples.iter().filter(|(at, _)| *at >= first + SETTLING * (last - first)).collect();
        let size = settled.len().div_ceil(BLOCKS);
        let median = |values: &mut dyn Iterator<Item = f64>| Sample::new(values).median();
        let blocks = settled
            .chunks(size.max(2))
            .map(|block| (median(&mut block.iter().map(|(at, _)| *at)), median(&mut block.iter().map(|(_, bytes)| *bytes as f64))));
        let blocks: Vec<(f64, f64)> = blocks.collect();
        let Slope { value, interval } = Slope::of(&blocks).filter(|_| blocks.len() >= FEWEST_BLOCKS)?;
        Some(Self {
            bytes_per_hour: value * 3600.0,
            interval: interval.map(|slope| slope * 3600.0),
            seen_s: last - settled[0].0,
            resident_bytes: median(&mut settled.iter().map(|(_, bytes)| *bytes as f64)) as u64,
        })
    }

    /// What is to be said of growth that matters even if it is as slow as its interval allows: a step somewhere in the middle is none.
    pub fn objection(&self) -> Option<String> {
        let surely = self.interval[0];
        let matters = surely > LEAST_SHARE * self.resident_bytes as f64 && surely * self.seen_s / 3600.0 > LEAST_BYTES;
        let [low, high] = self.interval.map(|bytes| bytes / 1e6);
        matters.then(|| format!("memory grows by {:.1} MB an hour ({low:.1} to {high:.1})", self.bytes_per_hour / 1e6))
    }
}

impl std::fmt::Display for Growth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [slope, low, high] = [self.bytes_per_hour, self.interval[0], self.interval[1]].map(|bytes| bytes / 1e6);
        write!(f, "{:.0} MB resident, {slope:+.1} MB an hour ({low:+.1} to {high:+.1})", self.resident_bytes as f64 / 1e6)
    }
}

impl Drift {
    /// Of the queries that count; nothing of fewer than twenty.
    pub fn of(records: &[Record]) -> Option<Self> {
        let mut answered: Vec<&Record> = records.iter().filter(|record| !record.warm_up && record.is_answered()).collect();
        answered.sort_by(|a, b| a.scheduled_ms.total_cmp(&b.scheduled_ms));
        let n = answered.len() / 10;
        if n < 2 {
            return None;
        }
        let [first, last] = [&answered[..n], &answered[answered.len() - n..]]
            .map(|tenth| Sample::new(tenth.iter().map(|record| record.latency_ms())));
        Some(Self { first_ms: first.median(), last_ms: last.median(), ratio: ratio(&last, &first) })
    }
}

impl std::fmt::Display for Drift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Ratio { value, interval: [low, high] } = self.ratio;
        write!(f, "queries of the last tenth took {value:.3} times those of the first ({low:.3} to {high:.3})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: f64 = 1e6;

    /// Hours of samples: what is resident, in megabytes by hour, with noise that neighbours share.
    fn samples(hours: f64, resident: impl Fn(f64) -> f64) -> Vec<(f64, u64)> {
        let sample = |i: usize| {
            let at = hours * i as f64 / 400.0;
            let noise = [0.0, 0.7, -0.4, 1.1, -0.9][i / 3 % 5] + (i % 11) as f64 * 0.05;
            (at * 3600.0, ((resident(at) + noise) * MB) as u64)
        };
        (0..=400).map(sample).collect()
    }

    fn growth(samples: &[(f64, u64)]) -> Growth {
        Growth::of(samples).expect("enough samples")
    }

    #[test]
    fn planted_growth_is_found_and_held_by_its_interval() {
        for planted in [-20.0, 5.0, 36.0, 400.0] {
            let found = growth(&samples(2.0, |hour| 900.0 + planted * hour));
            let [low, high] = found.interval.map(|bytes| bytes / MB);
            assert!((low..=high).contains(&planted) && high - low < 4.0, "{planted}: {low} to {high}");
            let matters = planted > 9.0;
            assert_eq!(found.objection().is_some(), matters, "{planted}");
        }
        let said = growth(&samples(2.0, |hour| 900.0 + 36.0 * hour)).objection().expect("it matters");
        assert!(said.starts_with("memory grows by 36.") || said.starts_with("memory grows by 35."), "{said}");
    }

    #[test]
    fn what_settles_or_steps_once_is_no_growth() {
        let settles = |hour: f64| 500.0 - 200.0 * (-hour * 60.0).exp();
        let steps = |hour: f64| if hour < 1.1 { 500.0 } else { 560.0 };
        let one_peak = |hour: f64| if (0.9..1.0).contains(&hour) { 900.0 } else { 500.0 };
        for found in [growth(&samples(2.0, |_| 500.0)), growth(&samples(2.0, settles)), growth(&samples(2.0, one_peak))] {
            assert!(found.interval[0] <= 0.0 && found.interval[1] >= 0.0 && found.objection().is_none(), "{found}");
        }
        assert_eq!(growth(&samples(2.0, steps)).objection(), None);
    }

    #[test]
    fn a_few_seconds_do_not_tell_of_hours() {
        let found = growth(&samples(0.001, |hour| 50.0 + hour * 3_000.0));
        assert!(found.bytes_per_hour > 1e9 && found.objection().is_none(), "3 MB in 4 seconds: {found}");
        assert_eq!(Growth::of(&[(0.0, 1), (1.0, 2)]), None);
    }

    #[test]
    fn samples_of_days_are_few_and_evenly_spread() {
        let mut samples = Samples { taken: Vec::new(), interval: FIRST_INTERVAL };
        let mut at = Duration::ZERO;
        while at < Duration::from_secs(200_000) {
            samples.add(Some((at.as_secs_f64(), 1)));
            at += samples.interval;
        }
        let gaps: Vec<f64> = samples.taken.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
        assert!((250..=500).contains(&samples.taken.len()), "{}", samples.taken.len());
        assert!(gaps.iter().all(|gap| (gap - gaps[0]).abs() < 1e-6), "{gaps:?}");
    }

    #[test]
    fn this_process_is_watched() {
        let watch = Watch::start();
        std::thread::sleep(Duration::from_millis(350));
        let memory = watch.end();
        if cfg!(target_os = "linux") {
            let samples = memory.expect("Linux tells").samples;
            assert!((2..=5).contains(&samples.len()) && samples.iter().all(|(_, bytes)| *bytes > 1 << 20), "{samples:?}");
        }
    }

    #[test]
    fn latency_that_grows_shows_in_its_last_tenth() {
        let record = |i: usize| Record {
            scheduled_ms: i as f64 * 100.0,
            done_ms: i as f64 * 100.0 + 10.0 + i as f64 * 0.01 + (i % 5) as f64 * 0.1,
            ..Record::default()
        };
        let mut records: Vec<_> = (0..1_000).map(record).collect();
        records.reverse();
        let Ratio { value, interval } = Drift::of(&records).expect("enough").ratio;
        assert!((1.8..2.0).contains(&value) && interval[0] > 1.7, "{value} {interval:?}");
        assert_eq!(Drift::of(&records[..19]), None);
    }
}
