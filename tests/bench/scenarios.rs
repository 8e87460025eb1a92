//! `blip2 bench` as its users meet it: every scenario and task, what it leaves behind, what it refuses, and a stop in the middle.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::program::{bench as command, ends, folder};

const T5: &str = "tests/bundles/t5";
const STAGE_1: &str = "tests/bundles/stage1";
/// Few small pictures and no warm-up: what is right with them is right with more.
const FEW: [&str; 8] = ["--drawn", "4", "--image-size", "64x48", "--duration", "0", "--warm-up", "0"];

/// The report of a run.
#[track_caller]
fn report(folder: &Path, args: &[&str]) -> Value {
    let json = folder.join("report.json");
    let args = [args, &["--json", json.to_str().unwrap()]].concat();
    ends(&command(&args).output().unwrap(), 0);
    serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap()
}

fn few<'a>(scenario: &[&'a str], model: &'a str) -> Vec<&'a str> {
    [scenario, &["--model", model], &FEW].concat()
}

#[test]
fn every_scenario_gives_the_answers_that_the_others_give() {
    let folder = folder("scenarios");
    let trace = folder.join("trace.txt");
    std::fs::write(&trace, "0\n0.01\n0.02\n0.02\n0.05\n0.3\n0.3\n0.31\n").unwrap();
    let scenarios: [&[&str]; 5] = [
        &["single", "--queries", "8"],
        &["multi", "--pictures", "4", "--queries", "2"],
        &["offline", "--concurrency", "6", "--queries", "8"],
        &["server", "--rate", "100", "--queries", "8", "--burstiness", "inf"],
        &["server", "--trace", trace.to_str().unwrap()],
    ];
    let reports = scenarios.map(|scenario| report(&folder, &few(scenario, T5)));
    let digests: Vec<&str> = reports.iter().map(|report| report["figures"]["outputs"].as_str().unwrap()).collect();
    for (scenario, report) in scenarios.iter().zip(&reports) {
        let figures = &report["figures"];
        assert_eq!(figures["counts"]["failed"], 0, "{scenario:?}");
        assert!(figures["latencies_ms"]["end_to_end"]["count"].as_u64().unwrap() >= 2, "{scenario:?}");
    }
    // Queries of several pictures have several outputs, so that their digest is another one.
    assert_eq!([digests[0], digests[2], digests[3]], [digests[0]; 3]);
    assert_eq!(digests[0], digests[4]);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn every_task_is_measured() {
    let folder = folder("tasks");
    for (args, model, writes) in [
        (&["single", "--queries", "4", "--task", "caption", "--tokens", "5", "--beams", "1"][..], T5, true),
        (&["single", "--queries", "4", "--task", "ask", "--text", "what?", "--text", "how many?"], T5, true),
        (&["single", "--queries", "4", "--task", "match", "--text", "a star", "--text", "a ring"], STAGE_1, false),
        (&["single", "--queries", "4", "--task", "embed"], STAGE_1, false),
    ] {
        let report = report(&folder, &few(args, model));
        let figures = &report["figures"];
        assert_eq!((&figures["counts"]["answered"], &figures["counts"]["failed"]), (&4.into(), &0.into()), "{args:?}");
        assert_eq!(figures["rates"]["tokens"].as_f64().unwrap() > 0.0, writes, "{args:?}");
        let stages: Vec<&str> = figures["stages_ms"].as_array().unwrap().iter().map(|stage| stage[0].as_str().unwrap()).collect();
        let last = if writes { "decode" } else { stages[stages.len() - 1] };
        assert!(stages.starts_with(&["queue", "decode_image", "preprocess", "vision"]) && stages.ends_with(&[last]), "{stages:?}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_fast_wrong_engine_is_seen() {
    let folder = folder("truths");
    let pictures: Vec<String> = (0..6).map(|i| format!("models/samples/{i}.png")).collect();
    let pictures: Vec<&str> = pictures.iter().map(String::as_str).collect();
    let wrong = folder.join("wrong.json");
    std::fs::write(&wrong, r#"{"0.png": ["a dog"], "3.png": ["a dog", "at the left there is a blue ring"]}"#).unwrap();
    let model = ["single", "--model", "models/demo-opt", "--queries", "6", "--duration", "0", "--warm-up", "0"];
    let right = report(&folder, &[&model[..], &pictures].concat());
    assert_eq!(right["figures"]["truth"], serde_json::json!({"n_true": 6, "n_known": 6}));
    std::fs::rename(folder.join("report.json"), folder.join("right.json")).unwrap();
    let less = report(&folder, &[&model[..], &pictures, &["--truths", wrong.to_str().unwrap()]].concat());
    assert_eq!(less["figures"]["truth"], serde_json::json!({"n_true": 1, "n_known": 2}));
    let [a, b] = ["right.json", "report.json"].map(|name| folder.join(name));
    let (out, err) =
        ends(&command(&["compare", a.to_str().unwrap(), b.to_str().unwrap(), "--fail-if", "true<-1%"]).output().unwrap(), 1);
    assert!(out.contains("| true | 1.000 | 0.500 |") && err.contains("true changed by -50.0 %"), "{out}{err}");
    let (_, err) = ends(&command(&[&model[..], &pictures, &["--truths", "README.md"]].concat()).output().unwrap(), 2);
    assert!(err.contains("README.md: it lists no answers"), "{err}");
    let (out, _) = ends(
        &command(&[&model[..], &pictures, &["--task", "ask", "--text", "how many objects are there?"]].concat()).output().unwrap(),
        0,
    );
    assert!(out.contains("6 of 6 answers are true"), "{out}");
    std::fs::remove_dir_all(folder).unwrap();
}

/// Fields of a value that a schema does not describe.
fn undescribed(root: &Value, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let schema = match schema["$ref"].as_str() {
        Some(name) => root.pointer(name.trim_start_matches('#')).unwrap(),
        None => schema["anyOf"].as_array().map_or(schema, |kinds| &kinds[0]),
    };
    if schema["$ref"].is_string() {
        return undescribed(root, schema, value, at, found);
    }
    let fields = value.as_object().into_iter().flatten();
    for (name, value) in fields {
        let (field, at) = (&schema["properties"][name], format!("{at}/{name}"));
        let free = &schema["additionalProperties"];
        match (field.is_object(), free.is_object()) {
            (true, _) if field["description"].is_string() => undescribed(root, field, value, &at, found),
            (false, true) => undescribed(root, free, value, &at, found),
            _ => found.push(at),
        }
    }
    for (i, item) in value.as_array().into_iter().flatten().enumerate() {
        let items = if schema["items"].is_object() { &schema["items"] } else { &schema["prefixItems"][i] };
        undescribed(root, items, item, &format!("{at}/{i}"), found);
    }
}

#[test]
fn every_field_of_a_report_is_described() {
    let folder = folder("schema");
    let (out, _) = ends(&command(&["schema"]).output().unwrap(), 0);
    let mut schema: Value = serde_json::from_str(&out).unwrap();
    let scenarios: [&[&str]; 2] = [&["single", "--queries", "4", "--slo", "e2e=500"], &["stage", "--rounds", "2", "--rows", "1"]];
    let reports = scenarios.map(|scenario| report(&folder, &few(scenario, T5)));
    let find = |schema: &Value| {
        let mut found = Vec::new();
        reports.iter().for_each(|report| undescribed(schema, schema, report, "", &mut found));
        found
    };
    assert_eq!(find(&schema), [""; 0]);
    schema["$defs"]["Percentile"]["properties"].as_object_mut().unwrap().remove("certified");
    assert!(find(&schema).iter().any(|at| at.ends_with("percentiles/0/certified")), "{:?}", find(&schema));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_start_is_measured_to_the_answer() {
    let folder = folder("startup");
    let written =
        |report: &Value| report["timeline"].as_array().unwrap().iter().map(|row| row["output"].clone()).collect::<Vec<_>>();
    let beside = written(&report(&folder, &few(&["single", "--queries", "2"], T5)));
    for cold in [&["startup"][..], &["startup", "--cold"]] {
        let json = folder.join("report.json");
        let args = [&few(cold, T5)[..], &["--queries", "2", "--json", json.to_str().unwrap()]].concat();
        ends(&command(&args).env("TMPDIR", &folder).output().unwrap(), 0);
        let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
        let stages = report["figures"]["stages_ms"].as_array().unwrap();
        assert!(stages[0][0] == "start_and_load" && stages[0][1]["min"].as_f64().unwrap() > 1.0, "{stages:?}");
        assert_eq!(written(&report), beside);
    }
    // Pictures that were drawn for it are gone.
    let left: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().ends_with("drawn")), "{left:?}");
    for (args, part) in [
        (&["startup", "--task", "embed", "--model", STAGE_1][..], "not for --task embed"),
        (&["startup", "--url", "http://127.0.0.1:9/v1"], "which is not started"),
    ] {
        let (_, err) = ends(&command(args).output().unwrap(), 2);
        assert!(err.contains(part), "{err}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn every_form_of_output_tells_the_same() {
    let folder = folder("outputs");
    let file = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let [jsonl, csv, markdown, html] = ["each.jsonl", "each.csv", "each.md", "each.html"].map(file);
    let outputs = ["--jsonl", &jsonl, "--csv", &csv, "--markdown", &markdown, "--html", &html];
    let report = report(&folder, &[&few(&["single", "--queries", "6", "--slo", "e2e=0.001"], T5)[..], &outputs].concat());
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let lines: Vec<Value> = read(&jsonl).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 6);
    let latencies: Vec<f64> =
        lines.iter().map(|line| line["done_ms"].as_f64().unwrap() - line["scheduled_ms"].as_f64().unwrap()).collect();
    let end_to_end = &report["figures"]["latencies_ms"]["end_to_end"];
    let mean = latencies.iter().sum::<f64>() / 6.0;
    assert!((end_to_end["mean"].as_f64().unwrap() - mean).abs() < 1e-6);
    assert!(read(&csv).lines().any(|line| line.starts_with("end_to_end_ms,6,")));
    assert!(read(&markdown).contains("| end to end |") && read(&html).contains("\"blip2-bench\""));
    assert_eq!(report["figures"]["counts"]["good"], 0, "nothing ends within a microsecond");
    assert!(report["machine"]["usable_processors"].as_u64() >= Some(1) && report["subject"]["model_sha256"].is_string());
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_stage_is_missing_nowhere() {
    let folder = folder("stages");
    let report = report(&folder, &few(&["single", "--queries", "12"], "models/demo-opt"));
    let unaccounted = report["figures"]["unaccounted"].as_f64().unwrap();
    // A debug build spends more of its time between stages, where nothing is optimised.
    let most = if cfg!(debug_assertions) { 0.25 } else { 0.02 };
    assert!((-0.001..most).contains(&unaccounted), "{unaccounted}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_change_for_the_worse_ends_with_1() {
    let folder = folder("compare");
    let report = report(&folder, &few(&["single", "--queries", "4"], T5));
    let write = |name: &str, change: &dyn Fn(&mut Value)| {
        let (path, mut changed) = (folder.join(name), report.clone());
        change(&mut changed);
        std::fs::write(&path, changed.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let same = write("same.json", &|_| {});
    let slow =
        write("slow.json", &|report| report["figures"]["latencies_ms"]["end_to_end"]["percentiles"][3]["value"] = 1e6.into());
    let elsewhere = write("elsewhere.json", &|report| report["machine"]["instruction_set"] = "amx".into());
    let newer = write("newer.json", &|report| report["version"] = 99.into());
    let compare = |args: &[&str], code| ends(&command(&[&["compare", &same], args].concat()).output().unwrap(), code);
    assert!(compare(&[&same, "--fail-if", "p99>+5%"], 0).0.contains("| end_to_end.p99 |"));
    assert!(compare(&[&slow, "--fail-if", "p99>+5%"], 1).1.contains("p99>+5%: end_to_end.p99 changed by"));
    compare(&[&slow, "--fail-if", "p50>+5%"], 0);
    assert!(compare(&[&elsewhere], 2).1.contains("(amx); --anyway"));
    assert!(compare(&[&elsewhere, "--anyway"], 0).1.contains("warning"));
    assert!(compare(&[&newer], 2).1.contains("version 99"));
    assert!(compare(&[&slow, "--fail-if", "p98>+5%"], 2).1.contains("no `end_to_end.p98`"));
    let html = folder.join("both.html");
    ends(&command(&["page", &same, &slow, "--html", html.to_str().unwrap()]).output().unwrap(), 0);
    assert!(std::fs::read_to_string(html).unwrap().matches("\"blip2-bench\"").count() == 2);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn what_makes_no_sense_is_refused_in_one_line() {
    let folder = folder("refused");
    let backwards = folder.join("backwards.txt");
    std::fs::write(&backwards, "1\n0.5\n").unwrap();
    let backwards = backwards.to_str().unwrap();
    for (args, code, part) in [
        (&["server", "--rate", "0"][..], 2, "0 is no rate"),
        (&["server", "--rate", "-3"], 2, "-3 is no rate"),
        (&["server", "--rate", "1e300", "--queries", "9"], 2, "1e300 queries a second are more than 10000000 in 10 s"),
        (&["server", "--rate", "1e-300", "--drawn", "1"], 2, "at 1e-300 queries a second none comes in"),
        (&["single", "--drawn", "100000000000"], 2, "from 1 to 10000"),
        (&["offline", "--concurrency", "1000000000"], 2, "from 1 to 10000"),
        (&["multi", "--pictures", "100000000000"], 2, "from 1 to 10000"),
        (&["server", "--rate", "NaN"], 2, "NaN is no rate"),
        (&["server", "--rate", "1", "--burstiness", "0"], 2, "0 is no burstiness"),
        (&["server", "--trace", backwards], 2, "line 2: `0.5` lies before the line above it"),
        (&["server", "--trace", "nowhere.txt"], 2, "nowhere.txt cannot be read"),
        (&["single", "--duration", "-1"], 2, "a number of seconds from 0"),
        (&["single", "--queries", "0"], 2, "--queries"),
        (&["single", "--slo", "fast"], 2, "`fast` is no limit"),
        (&["single", "--image-size", "0x9"], 2, "is no size"),
        (&["single", "--task", "embed"], 4, "embed"),
        (&["single", "--task", "caption", "--text", "what?"], 2, "--text is not for --task caption"),
        (&["single", "nowhere.png"], 3, "nowhere.png"),
        (&["single", "--json", "nowhere/report.json"], 1, "nowhere/report.json cannot be written"),
        (&["single", "README.md", "--queries", "2", "--duration", "0"], 2, "no query got an answer"),
    ] {
        let model = ["--model", T5, "--warm-up", "0"];
        let (out, err) = ends(&command(&[args, &model].concat()).output().unwrap(), code);
        assert!(out.is_empty() && err.contains(part), "{args:?}: {err}");
    }
    let (_, err) = ends(&command(&["single", "--url", "http://127.0.0.1:9/v1", "--drawn", "1"]).output().unwrap(), 2);
    assert!(err.contains("http://127.0.0.1:9/v1/models: "), "{err}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[cfg(unix)]
#[test]
fn a_stopped_run_keeps_what_it_measured() {
    let folder = folder("stopped");
    let (json, jsonl) = (folder.join("report.json"), folder.join("each.jsonl"));
    let few = few(&["single", "--queries", "1000000"], T5);
    let mut command = command(&[&few[..], &["--json", json.to_str().unwrap(), "--jsonl", jsonl.to_str().unwrap()]].concat());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while std::fs::read_to_string(&jsonl).map_or(0, |lines| lines.lines().count()) < 5 {
        std::thread::sleep(Duration::from_millis(20));
    }
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    let (out, err) = ends(&child.wait_with_output().unwrap(), 130);
    assert!(out.contains("not valid: the run was stopped") && err.contains("stopping"), "{out}{err}");
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert!(report["is_complete"] == false && report["figures"]["counts"]["answered"].as_u64() >= Some(5));
    std::fs::remove_dir_all(folder).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_loses_only_its_own_file() {
    let folder = folder("full");
    let csv = folder.join("each.csv");
    let few = few(&["single", "--queries", "4"], T5);
    let run =
        |full: &[&str], code| ends(&command(&[&few[..], full, &["--csv", csv.to_str().unwrap()]].concat()).output().unwrap(), code);
    let (out, err) = run(&["--jsonl", "/dev/full"], 0);
    assert!(out.contains("4 answered") && err.contains("/dev/full cannot be written"), "{err}");
    std::fs::remove_file(&csv).unwrap();
    let (out, err) = run(&["--json", "/dev/full"], 1);
    assert!(out.contains("4 answered") && err.contains("/dev/full cannot be written") && csv.exists(), "{err}");
    std::fs::remove_dir_all(folder).unwrap();
}
