//! Settings that are measured in turns, A B C A B C …, so that whatever slows a machine meets all alike: their ratios, and how much a
//! setting differs from itself.

use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

use super::figures::{Objectives, Rates, Totals};
use super::keep::Kept;
use super::record::Record;
use super::report::Report;
use super::statistics::{CONFIDENCE, Ratio, Sample};

/// What one turn gave.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    /// The median latency, in milliseconds.
    pub median_ms: f64,
    /// What was done a second.
    pub rates: Rates,
    /// Queries with an answer.
    pub queries: usize,
}

/// Puts turns behind each other: each begins where the one before ended, as if nobody had waited.
#[derive(Default)]
pub struct Joined {
    n_queries: usize,
    ended_ms: f64,
}

impl Turn {
    /// Of the records of one turn; nothing if none has an answer.
    pub fn of(records: &[Record]) -> Option<Self> {
        let answered: Vec<&Record> = records.iter().filter(|record| record.is_answered()).collect();
        let latencies = Sample::new(answered.iter().map(|record| record.latency_ms()));
        if latencies.is_empty() {
            return None;
        }
        let mut totals = Totals::new(Objectives::default());
        records.iter().for_each(|record| totals.add(record));
        Some(Self { median_ms: latencies.median(), rates: totals.rates(), queries: answered.len() })
    }
}

impl Joined {
    /// The records of the next turn, in the places and times that they have among all.
    pub fn next(&mut self, mut turn: Vec<Record>) -> Vec<Record> {
        let (n_before, began_ms) = (self.n_queries, self.ended_ms);
        for record in &mut turn {
            record.index += n_before;
            record.scheduled_ms += began_ms;
            record.sent_ms += began_ms;
            record.first_token_ms = record.first_token_ms.map(|at| at + began_ms);
            record.done_ms += began_ms;
            self.n_queries = self.n_queries.max(record.index + 1);
            self.ended_ms = self.ended_ms.max(record.done_ms);
        }
        turn
    }
}

/// One report of several runs of the same, a turn each, with the records of each; nothing of none.
pub fn joined(parts: Vec<(Report, Vec<Record>)>) -> Option<Report> {
    let (mut joined, mut took_s, mut peak) = (Joined::default(), 0.0, None);
    let mut kept = Kept::new(parts.first()?.0.work.objectives, usize::MAX);
    let mut whole = None;
    for (report, records) in parts {
        let (warm_up, counted): (Vec<_>, Vec<_>) = records.into_iter().partition(|record| record.warm_up);
        warm_up.into_iter().chain(joined.next(counted)).for_each(|record| kept.add(record));
        took_s += report.took_s;
        peak = peak.max(report.peak_resident_bytes);
        let first = whole.take().unwrap_or_else(|| report.clone());
        whole = Some(Report { started: first.started, load: [first.load[0], report.load[1]], ..report });
    }
    let (quantiles, timeline) = (super::figures::quantiles(kept.records()), super::figures::timeline(kept.records()));
    Some(Report { figures: kept.figures()?, quantiles, timeline, took_s, peak_resident_bytes: peak, ..whole? })
}

/// The mean ratio of values that were found in the same rounds, with the interval of Student's t over their logarithms; nothing of fewer
/// than two rounds.
pub fn paired(over: &[f64], under: &[f64]) -> Option<Ratio> {
    let logs: Vec<f64> = over.iter().zip(under).map(|(over, under)| (over / under).ln()).filter(|log| log.is_finite()).collect();
    let n = logs.len() as f64;
    let mean = logs.iter().sum::<f64>() / n;
    let variance = logs.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let t = StudentsT::new(0.0, 1.0, n - 1.0).ok().filter(|_| logs.len() >= 2)?.inverse_cdf((1.0 + CONFIDENCE) / 2.0);
    let margin = t * (variance / n).sqrt();
    Some(Ratio { value: mean.exp(), interval: [(mean - margin).exp(), (mean + margin).exp()] })
}

/// By which share a setting's turn differs from its turn before, in the median over the turns of all settings: the noise floor. Nothing
/// where no setting had two turns.
pub fn noise<'a>(settings: impl IntoIterator<Item = &'a [f64]>) -> Option<f64> {
    let steps = settings.into_iter().flat_map(|turns| turns.windows(2).map(|pair| (pair[1] / pair[0]).ln().abs()));
    let steps = Sample::new(steps);
    (!steps.is_empty()).then(|| steps.median().exp_m1())
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::super::report::tests::report;
    use super::*;

    fn record(index: usize, begin: f64, end: f64) -> Record {
        let input = format!("{index}.png");
        Record { index, input, n_pictures: 1, scheduled_ms: begin, sent_ms: begin, done_ms: end, n_tokens: 2, ..Record::default() }
    }

    /// About a normal distribution.
    fn normal(random: &mut StdRng) -> f64 {
        (0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0
    }

    #[test]
    fn intervals_hold_the_planted_ratio_as_often_as_they_say() {
        let (mut random, trials) = (StdRng::seed_from_u64(1), 2_000);
        for (truth, rounds, noise) in [(1.0, 5, 0.02), (0.8, 3, 0.1), (1.7, 12, 0.05)] {
            let held = (0..trials).filter(|_| {
                // The machine slows down by a half meanwhile; the two settings of a round meet nearly the same.
                let base: Vec<f64> = (0..rounds).map(|i| 100.0 * (1.0 + 0.5 * f64::from(i) / f64::from(rounds))).collect();
                let mut measured = |truth: f64| -> Vec<f64> {
                    base.iter().map(|base| base * truth * (noise * normal(&mut random)).exp()).collect()
                };
                let (under, over) = (measured(1.0), measured(truth));
                let [low, high] = paired(&over, &under).expect("rounds").interval;
                (low..=high).contains(&truth)
            });
            let share = held.count() as f64 / f64::from(trials);
            assert!((0.935..=0.965).contains(&share), "{truth} in {rounds} rounds: {share}");
        }
    }

    #[test]
    fn drift_that_all_meet_widens_no_interval() {
        let under: Vec<f64> = (0..6).map(|i| 100.0 * 1.3f64.powi(i)).collect();
        let over: Vec<f64> = under.iter().map(|value| value * 0.9).collect();
        let Ratio { value, interval } = paired(&over, &under).expect("rounds");
        assert!((value - 0.9).abs() < 1e-9 && interval[1] - interval[0] < 1e-9, "{value} {interval:?}");
        assert!((noise([&under[..], &over]).expect("turns") - 0.3).abs() < 1e-9);
        assert_eq!((paired(&[1.0], &[1.0]), noise([&[1.0][..]])), (None, None));
    }

    #[test]
    fn the_noise_floor_is_what_one_setting_differs_from_itself() {
        let (a, b) = ([100.0, 102.0, 100.0, 102.0], [50.0, 51.0, 50.0, 51.0]);
        assert!((noise([&a[..], &b]).expect("turns") - 0.02).abs() < 1e-9);
    }

    #[test]
    fn turns_stand_behind_each_other() {
        let mut joined = Joined::default();
        let turn = || vec![record(0, 0.0, 40.0), record(1, 10.0, 90.0)];
        let found = [joined.next(turn()), joined.next(turn())].concat();
        assert_eq!(found.iter().map(|record| record.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!((found[2].scheduled_ms, found[3].done_ms, found[3].latency_ms()), (90.0, 180.0, 80.0));
        let one = Turn::of(&turn()).expect("answers");
        assert_eq!((one.median_ms, one.queries), (60.0, 2));
        let all = Turn::of(&found).expect("answers");
        assert!((one.rates.images - all.rates.images).abs() < 1e-9, "waiting between turns counts for nothing");
    }

    #[test]
    fn runs_of_a_turn_each_make_one_report() {
        let part = |ms: f64| (report(10), (0..10).map(|i| record(i, i as f64 * 100.0, i as f64 * 100.0 + ms)).collect());
        let found = joined(vec![part(10.0), part(20.0)]).expect("two");
        let summary = &found.figures.latencies_ms["end_to_end"];
        assert_eq!((summary.count, summary.min, summary.max, found.took_s), (20, 10.0, 20.0, 25.0));
        assert_eq!((found.timeline.len(), found.timeline[19].index), (20, 19));
        assert!(joined(Vec::new()).is_none());
    }
}
