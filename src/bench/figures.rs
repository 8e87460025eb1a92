//! Records → what a report says: latencies, rates, where the time went, and whether the run may be believed.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::record::Record;
use super::statistics::{Sample, Summary};
use super::truths::Truth;
use crate::bundle::hexadecimal;

/// A generator that lags by more than this share of the median latency measures itself.
const MOST_LAG: f64 = 0.01;
/// Of a query's time, what no stage may account for.
const MOST_UNACCOUNTED: f64 = 0.02;

/// What answers must keep to count as good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Objectives {
    /// The latest end, in milliseconds.
    pub end_to_end_ms: Option<f64>,
    /// The latest first token.
    pub time_to_first_token_ms: Option<f64>,
    /// The longest mean time of a token behind the first.
    pub time_per_output_token_ms: Option<f64>,
}

/// What was measured of all queries that are no warm-up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Figures {
    /// Latencies by name, in milliseconds.
    pub latencies_ms: BTreeMap<String, Summary>,
    /// Each stage of a query, in milliseconds, in the order of the way.
    pub stages_ms: Vec<(String, Summary)>,
    /// The share of time between sending and end that no stage accounts for; none where stages are not told.
    pub unaccounted: Option<f64>,
    /// What was done a second.
    pub rates: Rates,
    /// How many queries came to what.
    pub counts: Counts,
    /// How many answers are true, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truth: Option<Truth>,
    /// SHA-256 over inputs and outputs in the order of inputs: equal where the same work gave the same answers.
    pub outputs: String,
    /// Why the run is not valid; nothing if it is.
    pub objections: Vec<String>,
}

/// What was done a second, from the first arrival to the last end.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Rates {
    /// Queries with an answer.
    pub queries: f64,
    /// Pictures in them.
    pub images: f64,
    /// Tokens that were written.
    pub tokens: f64,
    /// Queries that kept the objectives, where there are any.
    pub good: Option<f64>,
}

/// How many queries came to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Counts {
    /// Sent.
    pub sent: usize,
    /// With an answer.
    pub answered: usize,
    /// With an error.
    pub failed: usize,
    /// With an answer that kept the objectives, where there are any.
    pub good: Option<usize>,
    /// Before counting began.
    pub warm_up: usize,
}

impl Objectives {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn hold(&self, record: &Record) -> bool {
        let within = |limit: Option<f64>, found: Option<f64>| limit.is_none_or(|limit| found.is_none_or(|found| found <= limit));
        record.is_answered()
            && within(self.end_to_end_ms, Some(record.latency_ms()))
            && within(self.time_to_first_token_ms, record.time_to_first_token_ms())
            && within(self.time_per_output_token_ms, record.time_per_output_token_ms())
    }
}

/// What is counted of every query, whether or not its record is kept.
#[derive(Clone, Debug)]
pub struct Totals {
    objectives: Objectives,
    counts: Counts,
    n_images: usize,
    n_tokens: usize,
    /// The first arrival and the last end, of queries with an answer.
    span_ms: [f64; 2],
    truth: Option<Truth>,
    /// Distinct pairs of input and output, so that longer runs over the same inputs agree.
    pairs: BTreeSet<(String, String)>,
}

impl Totals {
    /// Of nothing yet.
    pub fn new(objectives: Objectives) -> Self {
        let counts = Counts { sent: 0, answered: 0, failed: 0, good: (!objectives.is_empty()).then_some(0), warm_up: 0 };
        Self { objectives, counts, n_images: 0, n_tokens: 0, span_ms: [f64::INFINITY, 0.0], truth: None, pairs: BTreeSet::new() }
    }

    /// One more.
    pub fn add(&mut self, record: &Record) {
        if record.warm_up {
            self.counts.warm_up += 1;
            return;
        }
        self.counts.sent += 1;
        if !record.is_answered() {
            self.counts.failed += 1;
            return;
        }
        self.counts.answered += 1;
        let good = usize::from(self.objectives.hold(record));
        self.counts.good = self.counts.good.map(|n| n + good);
        self.n_images += record.n_pictures;
        self.n_tokens += record.n_tokens;
        self.truth = Truth::sum(self.truth.into_iter().chain(record.truth));
        self.span_ms = [self.span_ms[0].min(record.scheduled_ms), self.span_ms[1].max(record.done_ms)];
        self.pairs.insert((record.input.clone(), record.output.clone()));
    }

    /// Queries that count.
    pub fn n_sent(&self) -> usize {
        self.counts.sent
    }

    /// Pictures with an answer.
    pub fn n_images(&self) -> usize {
        self.n_images
    }

    /// What was done a second.
    pub fn rates(&self) -> Rates {
        let [begin, end] = self.span_ms;
        let a_second = |n: usize| n as f64 / ((end - begin) / 1e3);
        Rates {
            queries: a_second(self.counts.answered),
            images: a_second(self.n_images),
            tokens: a_second(self.n_tokens),
            good: self.counts.good.map(a_second),
        }
    }

    fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for part in self.pairs.iter().flat_map(|(input, output)| [input, output]) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hexadecimal(hash.finalize())
    }
}

/// Of all records of a run, warm-up included; nothing if no query has an answer.
pub fn figures(records: &[Record], objectives: Objectives) -> Option<Figures> {
    let mut totals = Totals::new(objectives);
    records.iter().for_each(|record| totals.add(record));
    figures_of(records, &totals)
}

/// The same where records are a sample of those that were counted.
pub fn figures_of(records: &[Record], totals: &Totals) -> Option<Figures> {
    let counted: Vec<_> = records.iter().filter(|record| !record.warm_up).collect();
    let answered: Vec<_> = counted.iter().copied().filter(|record| record.is_answered()).collect();
    let latencies_ms = latencies(&answered);
    let median = latencies_ms.get("end_to_end")?.percentiles[0].value;
    let unaccounted = unaccounted(&answered);
    let Counts { sent, failed, .. } = totals.counts;
    let lost = (failed > 0).then(|| format!("{failed} of {sent} queries failed"));
    Some(Figures {
        stages_ms: stages(&answered),
        rates: totals.rates(),
        truth: totals.truth,
        outputs: totals.digest(),
        objections: objections(&counted, median, unaccounted).chain(lost).collect(),
        latencies_ms,
        unaccounted,
        counts: totals.counts,
    })
}

/// Of latencies by name, what each half percent of the sample lies below.
pub fn quantiles(records: &[Record]) -> BTreeMap<String, Vec<f64>> {
    let counted: Vec<_> = records.iter().filter(|record| !record.warm_up && record.is_answered()).collect();
    samples(&counted)
        .filter(|(_, sample)| !sample.is_empty())
        .map(|(name, sample)| (name.to_owned(), sample.quantiles(200)))
        .collect()
}

/// The first records that count, as many as a plot can show, without their tokens.
pub fn timeline(records: &[Record]) -> Vec<Record> {
    let counted = records.iter().filter(|record| !record.warm_up);
    let mut found: Vec<Record> = counted.map(|record| Record { tokens: Vec::new(), ..record.clone() }).collect();
    found.sort_by_key(|record| record.index);
    found.truncate(100);
    found
}

fn latencies(answered: &[&Record]) -> BTreeMap<String, Summary> {
    samples(answered).filter_map(|(name, sample)| Some((name.to_owned(), sample.summary()?))).collect()
}

fn samples(answered: &[&Record]) -> impl Iterator<Item = (&'static str, Sample)> {
    let each = |of: fn(&Record) -> Option<f64>| Sample::new(answered.iter().filter_map(|record| of(record)));
    [
        ("end_to_end", each(|record| Some(record.latency_ms()))),
        ("time_to_first_token", each(Record::time_to_first_token_ms)),
        ("time_per_output_token", each(Record::time_per_output_token_ms)),
        ("inter_token", Sample::new(answered.iter().flat_map(|record| record.gaps_ms.iter().copied()))),
        ("schedule_lag", each(|record| Some(record.lag_ms()))),
    ]
    .into_iter()
}

fn stages(answered: &[&Record]) -> Vec<(String, Summary)> {
    let mut found: Vec<(String, Vec<f64>)> = Vec::new();
    for (name, time) in answered.iter().flat_map(|record| &record.stages_ms) {
        match found.iter_mut().find(|(known, _)| known == name) {
            Some((_, times)) => times.push(*time),
            None => found.push((name.clone(), vec![*time])),
        }
    }
    found.into_iter().filter_map(|(name, times)| Some((name, Sample::new(times).summary()?))).collect()
}

fn unaccounted(answered: &[&Record]) -> Option<f64> {
    let told = answered.iter().filter(|record| !record.stages_ms.is_empty());
    let (left, whole) =
        told.fold((0.0, 0.0), |(left, whole), record| (left + record.unaccounted_ms(), whole + record.done_ms - record.sent_ms));
    (whole > 0.0).then(|| left / whole)
}

fn objections(counted: &[&Record], median: f64, unaccounted: Option<f64>) -> impl Iterator<Item = String> {
    let lag = Sample::new(counted.iter().map(|record| record.lag_ms())).percentile(99.0).value;
    let late = (lag > MOST_LAG * median).then(|| {
        format!("queries were sent late: 99 % within {lag:.3} ms, more than {} % of the median latency", MOST_LAG * 100.0)
    });
    let hidden = unaccounted
        .filter(|share| *share > MOST_UNACCOUNTED)
        .map(|share| format!("{:.1} % of the time belong to no stage, more than {} %", share * 100.0, MOST_UNACCOUNTED * 100.0));
    [late, hidden].into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(index: usize, scheduled: f64, sent: f64, done: f64) -> Record {
        Record {
            index,
            input: format!("{index}.png"),
            n_pictures: 1,
            scheduled_ms: scheduled,
            sent_ms: sent,
            done_ms: done,
            n_tokens: 4,
            stages_ms: vec![("vision".into(), done - sent)],
            output: "a red star".into(),
            ..Record::default()
        }
    }

    #[test]
    fn a_stall_shows_in_latencies_though_few_queries_were_sent_meanwhile() {
        // One a hundredth of a second; at 5 s everything stands still for one second and is then sent at once.
        let records: Vec<_> = (0..1_000)
            .map(|i| {
                let due = f64::from(i) * 10.0;
                let sent = if (5_000.0..6_000.0).contains(&due) { 6_000.0 } else { due };
                record(i as usize, due, sent, sent + 5.0)
            })
            .collect();
        let found = figures(&records, Objectives::default()).expect("answers");
        let p99 = found.latencies_ms["end_to_end"].percentiles[3].value;
        assert!((880.0..=1_005.0).contains(&p99), "{p99}");
        assert!(found.objections.iter().any(|why| why.contains("sent late")), "{:?}", found.objections);
    }

    #[test]
    fn warm_up_and_failures_are_kept_apart() {
        let mut records: Vec<_> = (0..10).map(|i| record(i, i as f64 * 10.0, i as f64 * 10.0, i as f64 * 10.0 + 5.0)).collect();
        records[0] = Record { warm_up: true, done_ms: 5_000.0, ..records[0].clone() };
        records[9].error = Some("device lost".into());
        let found = figures(&records, Objectives { end_to_end_ms: Some(4.0), ..Objectives::default() }).expect("answers");
        assert_eq!(found.counts, Counts { sent: 9, answered: 8, failed: 1, good: Some(0), warm_up: 1 });
        assert_eq!(found.latencies_ms["end_to_end"].max, 5.0);
        assert_eq!(found.objections, ["1 of 9 queries failed"]);
    }

    #[test]
    fn rates_count_from_the_first_arrival_to_the_last_end() {
        let records: Vec<_> = (0..4).map(|i| record(i, i as f64 * 500.0, i as f64 * 500.0, i as f64 * 500.0 + 500.0)).collect();
        let found = figures(&records, Objectives::default()).expect("answers").rates;
        assert_eq!((found.queries, found.images, found.tokens, found.good), (2.0, 2.0, 8.0, None));
    }

    #[test]
    fn time_that_no_stage_tells_is_an_objection() {
        let mut records: Vec<_> = (0..4).map(|i| record(i, 0.0, 0.0, 100.0)).collect();
        records.iter_mut().for_each(|record| record.stages_ms[0].1 = 90.0);
        let found = figures(&records, Objectives::default()).expect("answers");
        assert!((found.unaccounted.expect("stages") - 0.1).abs() < 1e-9);
        assert!(found.objections[0].starts_with("10.0 % of the time"), "{:?}", found.objections);
    }

    #[test]
    fn outputs_hash_alike_in_any_order_and_number() {
        let records: Vec<_> = (0..3).map(|i| record(i, 0.0, 0.0, 1.0)).collect();
        let again: Vec<_> = records.iter().rev().chain(&records).cloned().collect();
        let hash = |records: &[Record]| figures(records, Objectives::default()).expect("answers").outputs;
        assert_eq!(hash(&records), hash(&again));
        let mut other = records.clone();
        other[1].output = "a blue star".into();
        assert_ne!(hash(&records), hash(&other));
    }

    #[test]
    fn nothing_answered_gives_no_figures() {
        assert!(figures(&[], Objectives::default()).is_none());
    }
}
