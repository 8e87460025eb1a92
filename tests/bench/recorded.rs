//! `blip2 bench report` and `--format`: what records say without the run that left them, and in the forms of other tools.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::program::{Folder, bench as command, ends, number};

const RUN: [&str; 15] = [
    "--model",
    "tests/bundles/t5",
    "--drawn",
    "4",
    "--image-size",
    "64x48",
    "--duration",
    "0",
    "--warm-up",
    "0",
    "--beams",
    "1",
    "--tokens",
    "5",
    "--queries",
];

#[track_caller]
fn bench(args: &[&str], code: i32) -> (String, String) {
    ends(&command(args).output().unwrap(), code)
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn lines(path: &str) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A run of `n` queries with its report and its records.
fn run(folder: &Folder, n: &str, more: &[&str]) -> (String, String) {
    let (report, records) = (folder.file("run.json"), folder.file("run.jsonl"));
    let outputs = ["--json", &report, "--jsonl", &records];
    bench(&[&["single"], &RUN[..], &[n], &outputs, more].concat(), 0);
    (report, records)
}

#[test]
fn records_give_the_report_of_their_run() {
    let folder = Folder::new("again");
    let (report, records) = run(&folder, "12", &["--slo", "e2e=10000"]);
    let before = json(&report);
    let about = ["command", "started", "took_s", "is_complete", "machine", "load", "subject", "work", "peak_resident_bytes"];
    let about: serde_json::Map<_, _> = about.iter().map(|name| ((*name).to_owned(), before[*name].clone())).collect();
    let about = folder.write("about.json", &Value::from(about).to_string());
    let again = folder.file("again.json");
    bench(&["report", &records, "--about", &about, "--json", &again], 0);
    assert_eq!(json(&again), before, "nothing is lost on the way");
    let (table, _) = bench(&["compare", &report, &again, "--fail-if", "p99>+0%"], 0);
    assert!(table.contains("| end_to_end.p99 |"), "{table}");
    bench(&["report", &records, "--about", &about, "--slo", "e2e=0.001", "--json", &again], 0);
    assert_eq!(json(&again)["figures"]["counts"]["good"], 0, "limits that are typed come first");
}

#[test]
fn records_alone_are_of_an_unknown_run() {
    let folder = Folder::new("alone");
    let (report, records) = run(&folder, "6", &[]);
    let again = folder.file("again.json");
    let (table, err) = bench(&["report", &records, "--json", &again], 0);
    assert!(table.contains("not valid: the run was stopped") && err.contains("--about tells more"), "{table}{err}");
    let (before, after) = (json(&report), json(&again));
    assert_eq!(before["figures"], after["figures"]);
    assert_eq!((&after["subject"]["model"], &after["work"]["scenario"]), (&json!("unknown"), &json!("unknown")));
    assert_eq!((&after["work"]["inputs"], &after["is_complete"]), (&json!(4), &json!(false)));
    let (began, took) = (number(&before["started"]), number(&before["took_s"]));
    assert!((began..=began + took + 2.0).contains(&number(&after["started"])), "{began} {took} {}", after["started"]);
}

#[cfg(unix)]
#[test]
fn a_run_that_was_killed_leaves_records_that_can_be_read() {
    let folder = Folder::new("killed");
    let records = folder.file("run.jsonl");
    let mut command = command(&[&["single"], &RUN[..], &["1000000", "--jsonl", &records]].concat());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while std::fs::read_to_string(&records).map_or(0, |lines| lines.lines().count()) < 5 {
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    let whole = std::fs::read_to_string(&records).unwrap();
    let whole: Vec<&str> = whole.lines().take(5).collect();
    let cut = folder.write("cut.jsonl", &format!("{}\n{}", whole[..4].join("\n"), &whole[4][..30]));
    let (table, err) = bench(&["report", &cut], 0);
    assert!(
        table.contains("4 answered, 0 failed") && err.contains("cut.jsonl: the last line is cut short and left out"),
        "{table}{err}"
    );
    let about = folder.write("about.json", r#"{"is_complete": true}"#);
    assert!(bench(&["report", &cut, "--about", &about], 0).0.contains("not valid: the run was stopped"));
}

#[test]
fn what_is_no_record_is_told_in_one_line() {
    let folder = Folder::new("refused");
    let line = r#"{"index":0,"input":"a","n_pictures":1,"scheduled_ms":0,"sent_ms":0,"done_ms":5,"n_tokens":0,"output":""}"#;
    let warm_up = line.replace("\"index\":0", "\"index\":0,\"warm_up\":true");
    let failed = line.replace("\"index\":0", "\"index\":0,\"error\":\"device lost\"");
    let [good, empty, warm_up, failed, broken] = [
        ("good", line.to_owned()),
        ("empty", String::new()),
        ("warm_up", warm_up),
        ("failed", failed),
        ("broken", format!("{line}\n\n{{}}\n{line}\n")),
    ]
    .map(|(name, content)| folder.write(name, &content));
    let [misspelt, no_work] =
        [("misspelt", r#"{"took": 1}"#), ("no_work", r#"{"work": {}}"#)].map(|(name, content)| folder.write(name, content));
    for (args, code, part) in [
        (&[&*empty][..], 2, "empty: there is no record in it"),
        (&[&warm_up], 2, "warm_up: every record in it is one of the warm-up"),
        (&[&failed], 2, "failed: no query got an answer: device lost"),
        (&[&broken], 2, "broken: line 3 is no record: missing field `index`"),
        (&["nowhere.jsonl"], 2, "nowhere.jsonl cannot be read"),
        (&["README.md"], 2, "README.md: line 1 is no record"),
        (&[&good, "--about", "nowhere.json"], 2, "nowhere.json cannot be read"),
        (&[&good, "--about", &misspelt], 2, "misspelt: it does not tell about records: unknown field `took`"),
        (&[&good, "--about", &no_work], 2, "no_work: it does not tell about records: missing field `scenario`"),
        (&[&good, "--slo", "fast"], 2, "`fast` is no limit"),
        (&[&good, "--format", "xml"], 2, "`xml` is none of blip2, aiperf, vllm"),
        (&[&good, "--jsonl", &good], 2, "good: the records would be overwritten"),
        (&[&good, "--json", "nowhere/report.json"], 1, "nowhere/report.json cannot be written"),
    ] {
        let (out, err) = bench(&[&["report"], args].concat(), code);
        assert!(out.is_empty() && err.contains(part), "{args:?}: {err}");
    }
}

/// Percentile between two values, as numpy has it.
fn percentile(values: &[f64], rank: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = rank / 100.0 * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + place.fract() * (above - below)
}

#[test]
fn other_tools_find_their_own_fields() {
    let folder = Folder::new("formats");
    let records = run(&folder, "9", &[]).1;
    let [vllm, aiperf, each] = ["vllm.json", "aiperf.json", "aiperf.jsonl"].map(|name| folder.file(name));
    bench(&["report", &records, "--format", "vllm", "--json", &vllm], 0);
    bench(&["report", &records, "--format", "aiperf", "--json", &aiperf, "--jsonl", &each], 0);
    let (vllm, aiperf, each, records) = (json(&vllm), json(&aiperf), lines(&each), lines(&records));
    let of = |name: &str| records.iter().map(|record| number(&record[name])).collect::<Vec<_>>();
    let latencies: Vec<f64> = of("done_ms").iter().zip(of("sent_ms")).map(|(done, sent)| done - sent).collect();
    let close = |a: &Value, b: f64| assert!((number(a) - b).abs() < 1e-6, "{a}, not {b}");
    for rank in [50.0, 90.0, 99.0] {
        let expected = percentile(&latencies, rank);
        close(&vllm[format!("p{rank}_e2el_ms")], expected);
        close(&aiperf["request_latency"][format!("p{rank}")], expected);
    }
    close(&vllm["total_output_tokens"], 45.0);
    close(&aiperf["total_osl"]["avg"], 45.0);
    assert_eq!((each.len(), &each[0]["metrics"]["output_sequence_length"]), (9, &json!({"value": 5, "unit": "tokens"})));
    close(&each[3]["metrics"]["request_latency"]["value"], latencies[3]);
    assert_eq!(vllm["generated_texts"][0], records[0]["output"]);
}

/// Both count the tokens behind the first. vLLM ends with the answer, a report with its last token.
#[test]
fn time_per_token_of_streamed_texts_is_that_of_vllm_but_for_the_end() {
    let folder = Folder::new("tpot");
    let (report, records) = run(&folder, "9", &[]);
    let vllm = folder.file("vllm.json");
    bench(&["report", &records, "--format", "vllm", "--json", &vllm], 0);
    let (report, vllm, records) = (json(&report), json(&vllm), lines(&records));
    let sum = |values: &Value| values.as_array().unwrap().iter().map(number).sum::<f64>();
    let ends = records.iter().map(|record| {
        (number(&record["done_ms"]) - number(&record["first_token_ms"]) - sum(&record["gaps_ms"]))
            / (number(&record["n_tokens"]) - 1.0)
    });
    let ends = ends.sum::<f64>() / records.len() as f64;
    let (ours, theirs) =
        (number(&report["figures"]["latencies_ms"]["time_per_output_token"]["mean"]), number(&vllm["mean_tpot_ms"]));
    assert!(ends >= 0.0 && (theirs - ours - ends).abs() < 1e-6, "{theirs} − {ours} is not {ends}");
    let gaps = &report["figures"]["latencies_ms"]["inter_token"]["percentiles"][0]["value"];
    assert!((number(gaps) - number(&vllm["median_itl_ms"])).abs() < 1e-6);
}

#[test]
fn a_run_writes_the_forms_of_other_tools_itself() {
    let folder = Folder::new("itself");
    for (args, name, rate, together) in [
        (&["offline", "--concurrency", "3"][..], "closed", json!("inf"), json!(3)),
        (&["server", "--rate", "200", "--burstiness", "inf"], "open", json!(200.0), Value::Null),
    ] {
        let written = folder.file(name);
        bench(&[args, &RUN[..], &["6", "--format", "vllm", "--json", &written]].concat(), 0);
        let found = json(&written);
        match (&found["request_rate"], &rate) {
            (Value::Number(found), Value::Number(wanted)) => {
                assert!((found.as_f64().unwrap() / wanted.as_f64().unwrap() - 1.0).abs() < 0.3, "{found}");
            }
            (found, wanted) => assert_eq!(found, wanted),
        }
        assert_eq!(
            (&found["max_concurrency"], &found["completed"]),
            (&together, &json!(found["latencies"].as_array().unwrap().len()))
        );
    }
    let each = folder.file("each.jsonl");
    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as f64;
    bench(&[&["single"], &RUN[..], &["3", "--format", "aiperf", "--jsonl", &each]].concat(), 0);
    let after = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as f64;
    let stamps: Vec<f64> = lines(&each).iter().map(|line| number(&line["metadata"]["request_start_ns"])).collect();
    assert!(stamps.is_sorted() && stamps.iter().all(|at| (before..after).contains(at)), "{stamps:?}");
    let report = folder.file("closed");
    assert!(bench(&["compare", &report, &report], 2).1.contains("no JSON of `blip2 bench`"));
}

#[test]
fn records_of_another_program_stand_beside_ours() {
    let folder = Folder::new("beside");
    let report = run(&folder, "6", &[]).0;
    let record = |i: usize| {
        let (sent, stages) = (i as f64 * 50.0, json!([["vision", 30.0], ["decode", 10.0]]));
        json!({"index": i, "input": "a.png", "n_pictures": 1, "scheduled_ms": sent, "sent_ms": sent, "done_ms": sent + 40.0, "n_tokens": 5,
            "output": "a ring", "stages_ms": stages})
        .to_string()
    };
    let records = folder.write("other.jsonl", &(0..5).map(record).collect::<Vec<_>>().join("\n"));
    let work = json(&report)["work"].clone();
    let about = json!({"is_complete": true, "work": work, "subject": {"engine": "another", "model": "m", "provider": "p", "precisions": []}});
    let (about, other) = (folder.write("about.json", &about.to_string()), folder.file("other.json"));
    bench(&["report", &records, "--about", &about, "--json", &other], 0);
    let (table, err) = bench(&["compare", &report, &other], 0);
    assert!(table.contains("| end_to_end.p50 |") && err.is_empty(), "{table}{err}");
    assert!(Path::new(&other).is_file() && json(&other)["figures"]["stages_ms"][0][0] == "vision");
    assert_eq!(json(&other)["figures"]["objections"], json!([]));
}
