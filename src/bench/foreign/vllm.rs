//! The document of `vllm bench serve --save-result --save-detailed --percentile-metrics ttft,tpot,itl,e2el --metric-percentiles
//! 50,90,95,99`, as `vllm/benchmarks/serve.py` of vLLM at revision 009e6d4a1cd6 makes it: arrays in seconds, figures in
//! milliseconds, deviations of a population.
//!
//! Tokens of prompts are not counted here and stand as 0. `burstiness` is told of closed loads alone, where it means nothing. Queries
//! that told nothing before their end have 0 in `ttfts`, and no part in the figures of first tokens.

use serde_json::{Map, Value, json};

use super::{Times, answered, calendar, counted, duration_s};
use crate::bench::record::Record;
use crate::bench::report::Report;
use crate::bench::statistics::Sample;

const RANKS: [usize; 4] = [50, 90, 95, 99];

pub(super) fn document(report: &Report, records: &[Record]) -> Value {
    let counted = counted(records);
    let mut out = setup(report, counted.len());
    out.append(&mut results(report, &counted));
    out.append(&mut details(&counted));
    out.append(&mut figures(&answered(&counted)));
    out.into()
}

fn setup(report: &Report, n_queries: usize) -> Map<String, Value> {
    let [year, month, day, hour, minute, second] = calendar(report.started);
    let is_served = report.subject.provider.starts_with("http");
    let backend = if is_served { "openai-chat" } else { "blip2" };
    let rate = report.work.rate.map_or_else(|| json!("inf"), |rate| json!(rate));
    let mut out = object(json!({
        "date": format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}"),
        "endpoint_type": backend,
        "backend": backend,
        "label": report.work.scenario,
        "model_id": report.subject.model,
        "tokenizer_id": report.subject.model,
        "num_prompts": n_queries,
        "request_rate": rate,
        "max_concurrency": report.work.concurrency,
    }));
    if report.work.rate.is_none() {
        out.insert("burstiness".into(), json!(1.0));
    }
    out
}

fn results(report: &Report, counted: &[&Record]) -> Map<String, Value> {
    let answered = answered(counted);
    let (duration, n_tokens) = (duration_s(&answered), answered.iter().map(|record| record.n_tokens).sum::<usize>());
    let a_second = |n: usize| n as f64 / duration;
    object(json!({
        "duration": duration,
        "completed": answered.len(),
        "failed": counted.len() - answered.len(),
        "total_input_tokens": 0,
        "total_output_tokens": n_tokens,
        "request_throughput": a_second(answered.len()),
        "request_goodput": report.figures.counts.good.map(a_second),
        "output_throughput": a_second(n_tokens),
        "total_token_throughput": a_second(n_tokens),
        "max_output_tokens_per_s": most_tokens(&answered),
        "max_concurrent_requests": most_together(&answered),
        "rtfx": 0.0,
    }))
}

fn details(counted: &[&Record]) -> Map<String, Value> {
    let each = |of: &dyn Fn(&Record) -> Value| counted.iter().map(|record| of(record)).collect::<Value>();
    let seconds = |of: fn(&Record) -> f64| each(&|record| json!(of(record) / 1e3));
    let n_tokens = |record: &Record| if record.is_answered() { record.n_tokens } else { 0 };
    object(json!({
        "input_lens": each(&|_| json!(0)),
        "output_lens": each(&|record| json!(n_tokens(record))),
        "ttfts": seconds(|record| Times::of(record).first_token.unwrap_or(0.0)),
        "itls": each(&|record| record.gaps_ms.iter().map(|gap| gap / 1e3).collect()),
        "latencies": seconds(|record| record.done_ms - record.sent_ms),
        "start_times": seconds(|record| record.sent_ms),
        "queue_times": seconds(Record::lag_ms),
        "generated_texts": each(&|record| json!(record.output)),
        "errors": each(&|record| json!(record.error.as_deref().unwrap_or_default())),
    }))
}

fn figures(answered: &[&Record]) -> Map<String, Value> {
    let each = |of: fn(&Record) -> Option<f64>| Sample::new(answered.iter().filter_map(|record| of(record)));
    let samples = [
        ("ttft", each(|record| Times::of(record).first_token)),
        ("tpot", each(|record| Times::of(record).per_output_token(record))),
        ("itl", Sample::new(answered.iter().flat_map(|record| record.gaps_ms.iter().copied()))),
        ("e2el", each(|record| Some(Times::of(record).latency))),
    ];
    samples.iter().flat_map(|(name, sample)| figures_of(name, sample)).collect()
}

/// All are 0 where there are no values, as vLLM has it.
fn figures_of(name: &str, sample: &Sample) -> Vec<(String, Value)> {
    let nothing = Sample::new([0.0]);
    let sample = if sample.is_empty() { &nothing } else { sample };
    let summary = sample.summary().expect("there are values");
    let n = summary.count as f64;
    let deviation = summary.deviation * ((n - 1.0) / n).sqrt();
    let percentiles = sample.quantiles(100);
    let head = [("mean", summary.mean), ("median", sample.median()), ("std", deviation)];
    let head = head.map(|(kind, value)| (format!("{kind}_{name}_ms"), json!(value)));
    let ranks = RANKS.map(|rank| (format!("p{rank}_{name}_ms"), json!(percentiles[rank])));
    head.into_iter().chain(ranks).collect()
}

/// Of whole seconds from the first query on, the most tokens in one.
fn most_tokens(answered: &[&Record]) -> f64 {
    let start = answered.iter().map(|record| record.sent_ms).fold(f64::INFINITY, f64::min);
    let mut seconds = std::collections::HashMap::<u64, usize>::new();
    for record in answered {
        let Some(mut at) = record.first_token_ms else { continue };
        *seconds.entry(((at - start) / 1e3) as u64).or_default() += 1;
        for gap in &record.gaps_ms {
            at += gap;
            *seconds.entry(((at - start) / 1e3) as u64).or_default() += 1;
        }
    }
    seconds.into_values().max().unwrap_or(0) as f64
}

/// The most queries under way together; one that ends makes room for one that begins then.
fn most_together(answered: &[&Record]) -> usize {
    let mut events: Vec<(f64, i64)> = answered.iter().flat_map(|record| [(record.sent_ms, 1), (record.done_ms, -1)]).collect();
    events.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (mut together, mut most) = (0, 0);
    for (_, change) in events {
        together += change;
        most = most.max(together);
    }
    most as usize
}

fn object(value: Value) -> Map<String, Value> {
    let Value::Object(map) = value else { unreachable!("it is written as an object") };
    map
}

#[cfg(test)]
mod tests {
    use super::super::tests::{records, report};
    use super::*;

    fn written() -> Value {
        document(&report(), &records())
    }

    #[test]
    fn figures_count_from_when_queries_were_sent() {
        let found = written();
        // Latencies of 1500 and 250 ms; one first token after 100 ms; (1500 − 100) / 2 for each token behind it.
        for (name, expected) in [
            ("completed", 2.0),
            ("failed", 1.0),
            ("num_prompts", 3.0),
            ("duration", 1.5),
            ("total_output_tokens", 3.0),
            ("request_throughput", 2.0 / 1.5),
            ("request_goodput", 1.0 / 1.5),
            ("output_throughput", 2.0),
            ("mean_e2el_ms", 875.0),
            ("std_e2el_ms", 625.0),
            ("p99_e2el_ms", 1487.5),
            ("median_ttft_ms", 100.0),
            ("mean_tpot_ms", 700.0),
            ("p90_itl_ms", 850.0),
            ("max_output_tokens_per_s", 2.0),
            ("max_concurrent_requests", 2.0),
            ("max_concurrency", 2.0),
        ] {
            let value = found[name].as_f64().unwrap_or(f64::NAN);
            assert!((value - expected).abs() < 1e-9, "{name}: {value}, not {expected}");
        }
        assert_eq!((&found["request_rate"], &found["date"]), (&json!("inf"), &json!("20240229-123456")));
    }

    #[test]
    fn arrays_have_a_value_a_query_in_seconds() {
        let found = written();
        assert_eq!(found["ttfts"], json!([0.1, 0.0, 0.0]));
        assert_eq!(found["itls"], json!([[0.4, 0.9], [], []]));
        assert_eq!(found["latencies"], json!([1.5, 0.25, 0.25]));
        assert_eq!(found["queue_times"], json!([0.5, 0.0, 0.0]));
        assert_eq!(found["errors"], json!(["", "", "device lost"]));
    }

    #[test]
    fn a_schedule_has_its_rate() {
        let mut report = report();
        (report.work.concurrency, report.work.rate) = (None, Some(5.0));
        let found = document(&report, &records());
        assert_eq!((&found["request_rate"], &found["max_concurrency"], found.get("burstiness")), (&json!(5.0), &Value::Null, None));
    }
}
