//! `profile_export_aiperf.json` (schema 1.4) and lines of `profile_export.jsonl`, as AIPerf 0.13.0 writes them and its plots read them.
//!
//! A metric of single queries has all its figures, one of the whole run `avg` alone. Tokens of prompts are not counted here, so that what
//! is made of them is absent. Nothing claims to come from AIPerf: `aiperf_version` is absent too.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{Times, answered, calendar, counted, duration_s};
use crate::bench::record::Record;
use crate::bench::report::Report;
use crate::bench::statistics::Sample;

const SCHEMA: &str = "1.4";
const RANKS: [usize; 9] = [1, 5, 10, 25, 50, 75, 90, 95, 99];
const CHUNKS: &str = "inter_chunk_latency";

pub(super) fn document(report: &Report, records: &[Record]) -> Value {
    let counted = counted(records);
    let mut out = about(report, &counted);
    out.append(&mut of_queries(&answered(&counted)));
    out.append(&mut of_run(report, &counted));
    let warm_up: Vec<_> = records.iter().filter(|record| record.warm_up && record.is_answered()).collect();
    if !warm_up.is_empty() {
        out.insert("warmup_metrics".into(), of_queries(&warm_up).into());
    }
    out.into()
}

/// One query. A failed one has no metrics.
pub(super) fn line(record: &Record, zero: Duration) -> Value {
    let at = |ms: f64| (zero + Duration::from_secs_f64(ms.max(0.0) / 1e3)).as_nanos() as u64;
    let metrics = if record.is_answered() { metrics(record) } else { Vec::new() };
    let told = metrics.into_iter().map(|(name, unit, value)| (name.to_owned(), json!({"value": value, "unit": unit})));
    let error = record.error.as_ref().map(|why| json!({"type": "BenchError", "message": why}));
    json!({
        "metadata": {
            "session_num": record.index,
            "conversation_id": record.input,
            "turn_index": 0,
            "credit_issued_ns": at(record.scheduled_ms),
            "request_start_ns": at(record.sent_ms),
            "request_end_ns": at(record.done_ms),
            "worker_id": "blip2",
            "record_processor_id": "blip2",
            "benchmark_phase": if record.warm_up { "warmup" } else { "profiling" },
            "was_cancelled": false,
        },
        "metrics": told.collect::<Map<_, _>>(),
        "error": error,
    })
}

fn about(report: &Report, counted: &[&Record]) -> Map<String, Value> {
    let time = |seconds: u64| {
        let [year, month, day, hour, minute, second] = calendar(seconds);
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    };
    let endpoint = if report.subject.provider.starts_with("http") { "chat" } else { "blip2" };
    let mut out = Map::from_iter([
        ("schema_version".into(), json!(SCHEMA)),
        ("start_time".into(), json!(time(report.started))),
        ("end_time".into(), json!(time(report.started + report.took_s.max(0.0) as u64))),
        ("was_cancelled".into(), json!(!report.is_complete)),
        ("error_summary".into(), errors(counted)),
        ("run_info".into(), json!({"random_seed": report.work.seed, "cli_command": report.command.join(" ")})),
    ]);
    let phase = json!({"name": "profiling", "concurrency": report.work.concurrency, "requests": counted.len()});
    let config = json!({
        "models": {"items": [{"name": report.subject.model}]},
        "endpoint": {"type": endpoint},
        "phases": [phase],
    });
    out.insert("input_config".into(), config);
    out
}

/// Every error with how often it came.
fn errors(counted: &[&Record]) -> Value {
    let mut found = BTreeMap::<&str, usize>::new();
    counted.iter().filter_map(|record| record.error.as_deref()).for_each(|why| *found.entry(why).or_default() += 1);
    found.into_iter().map(|(why, n)| json!({"error_details": {"type": "BenchError", "message": why}, "count": n})).collect()
}

fn of_queries(answered: &[&Record]) -> Map<String, Value> {
    let mut found = BTreeMap::<&str, (&str, Vec<f64>)>::new();
    for (name, unit, value) in answered.iter().flat_map(|record| metrics(record)) {
        let values = &mut found.entry(name).or_insert_with(|| (unit, Vec::new())).1;
        match &value {
            Value::Array(several) => values.extend(several.iter().filter_map(Value::as_f64)),
            one => values.extend(one.as_f64()),
        }
    }
    found.into_iter().map(|(name, (unit, values))| (name.to_owned(), distribution(unit, values))).collect()
}

/// Of a query with an answer: metric, unit and value.
fn metrics(record: &Record) -> Vec<(&'static str, &'static str, Value)> {
    let times = Times::of(record);
    let per_token = times.per_output_token(record);
    let streamed = (!record.gaps_ms.is_empty()).then_some(&record.gaps_ms);
    let (n_tokens, n_pictures) = (record.n_tokens, record.n_pictures as f64);
    let tokens = (n_tokens > 0).then(|| json!(n_tokens));
    let pictures = (record.n_pictures > 0 && times.latency > 0.0).then_some(n_pictures);
    [
        Some(("request_latency", "ms", json!(times.latency))),
        times.first_token.map(|first| ("time_to_first_token", "ms", json!(first))),
        streamed.map(|gaps| ("time_to_second_token", "ms", json!(gaps[0]))),
        per_token.map(|time| ("inter_token_latency", "ms", json!(time))),
        streamed.map(|gaps| (CHUNKS, "ms", json!(gaps))),
        tokens.clone().map(|n| ("output_sequence_length", "tokens", n)),
        tokens.map(|n| ("output_token_count", "tokens", n)),
        per_token.filter(|time| *time > 0.0).map(|time| ("output_token_throughput_per_user", "tokens/sec/user", json!(1e3 / time))),
        pictures.map(|n| ("num_images", "images", json!(n as u64))),
        pictures.map(|n| ("image_throughput", "images/sec", json!(n * 1e3 / times.latency))),
        pictures.map(|n| ("image_latency", "ms/image", json!(times.latency / n))),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn of_run(report: &Report, counted: &[&Record]) -> Map<String, Value> {
    let answered = answered(counted);
    let (duration, n_failed) = (duration_s(&answered), counted.len() - answered.len());
    let n_tokens: usize = answered.iter().map(|record| record.n_tokens).sum();
    let good = report.figures.counts.good;
    [
        Some(("request_count", "requests", answered.len() as f64)),
        Some(("request_throughput", "requests/sec", answered.len() as f64 / duration)),
        Some(("benchmark_duration", "sec", duration)),
        (n_failed > 0).then_some(("error_request_count", "requests", n_failed as f64)),
        (n_tokens > 0).then_some(("total_osl", "tokens", n_tokens as f64)),
        (n_tokens > 0).then_some(("total_output_tokens", "tokens", n_tokens as f64)),
        (n_tokens > 0).then_some(("output_token_throughput", "tokens/sec", n_tokens as f64 / duration)),
        good.map(|n| ("good_request_count", "requests", n as f64)),
        good.map(|n| ("goodput", "requests/sec", n as f64 / duration)),
    ]
    .into_iter()
    .flatten()
    .map(|(name, unit, value)| (name.to_owned(), json!({"unit": unit, "avg": value})))
    .collect()
}

fn distribution(unit: &str, values: Vec<f64>) -> Value {
    let sample = Sample::new(values);
    let summary = sample.summary().expect("a metric has values");
    let percentiles = sample.quantiles(100);
    let mut out = Map::from_iter([
        ("unit".into(), json!(unit)),
        ("avg".into(), json!(summary.mean)),
        ("min".into(), json!(summary.min)),
        ("max".into(), json!(summary.max)),
        ("std".into(), json!(summary.deviation)),
        ("count".into(), json!(summary.count)),
        ("sum".into(), json!(summary.mean * summary.count as f64)),
    ]);
    out.extend(RANKS.map(|rank| (format!("p{rank}"), json!(percentiles[rank]))));
    out.into()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{records, report};
    use super::*;

    #[test]
    fn metrics_of_queries_have_all_figures_and_those_of_the_run_one() {
        let found = document(&report(), &records());
        for (name, field, expected) in [
            ("request_latency", "avg", 875.0),
            ("request_latency", "p99", 1487.5),
            ("request_latency", "count", 2.0),
            ("request_latency", "sum", 1750.0),
            ("time_to_first_token", "avg", 100.0),
            ("time_to_second_token", "avg", 400.0),
            ("inter_token_latency", "p50", 700.0),
            ("inter_chunk_latency", "max", 900.0),
            ("output_token_throughput_per_user", "avg", 1e3 / 700.0),
            ("image_latency", "min", 250.0),
            ("request_throughput", "avg", 2.0 / 1.5),
            ("output_token_throughput", "avg", 2.0),
            ("benchmark_duration", "avg", 1.5),
            ("error_request_count", "avg", 1.0),
            ("good_request_count", "avg", 1.0),
        ] {
            let value = found[name][field].as_f64().unwrap_or(f64::NAN);
            assert!((value - expected).abs() < 1e-9, "{name}.{field}: {value}, not {expected}");
        }
        assert_eq!(found["request_count"], json!({"unit": "requests", "avg": 2.0}));
        let deviation = found["request_latency"]["std"].as_f64().expect("it is there");
        assert!((deviation - 1250.0 / 2f64.sqrt()).abs() < 1e-9, "of a sample");
        assert_eq!(found["warmup_metrics"]["request_latency"]["avg"], 8_500.0);
        assert_eq!((&found["start_time"], &found["was_cancelled"]), (&json!("2024-02-29T12:34:56Z"), &json!(false)));
        assert_eq!(found["error_summary"][0]["error_details"]["message"], "device lost");
    }

    #[test]
    fn a_line_has_stamps_since_1970_and_no_metrics_of_a_failure() {
        let records = records();
        let found = line(&records[1], Duration::from_secs(1_700_000_000));
        let metadata = &found["metadata"];
        assert_eq!(metadata["credit_issued_ns"], 1_700_000_000_000_000_000_u64);
        assert_eq!(metadata["request_start_ns"], 1_700_000_000_500_000_000_u64);
        assert_eq!((&metadata["benchmark_phase"], &found["error"]), (&json!("profiling"), &Value::Null));
        assert_eq!(found["metrics"]["inter_chunk_latency"], json!({"value": [400.0, 900.0], "unit": "ms"}));
        let failed = line(&records[3], Duration::ZERO);
        assert_eq!((&failed["metrics"], &failed["error"]["message"]), (&json!({}), &json!("device lost")));
        assert_eq!(line(&records[0], Duration::ZERO)["metadata"]["benchmark_phase"], "warmup");
    }
}
