//! `blip2 bench soak`, `sweep` and `tune` as their users meet them, and the settings files that other commands take.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::program::{bench, blip2, ends, folder, number};

const T5: &str = "tests/bundles/t5";
const STAGE_1: &str = "tests/bundles/stage1";
/// Few small pictures and no warm-up: what is right with them is right with more.
const FEW: [&str; 8] = ["--drawn", "4", "--image-size", "64x48", "--duration", "0", "--warm-up", "0"];
const SHORT: [&str; 4] = ["--queries", "8", "--tokens", "3"];

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_soak_tells_of_memory_and_of_latency_over_time() {
    let folder = folder("soak");
    let [json, html] = ["soak.json", "soak.html"].map(|name| folder.join(name).to_str().unwrap().to_owned());
    let few = ["--drawn", "4", "--image-size", "64x48", "--warm-up", "0", "--tokens", "2", "--beams", "1", "--duration", "3"];
    let args = [&["soak", "--model", T5, "--json", &json, "--html", &html], &few[..]].concat();
    let (out, _) = ends(&bench(&args).output().unwrap(), 0);
    let report = read(Path::new(&json));
    assert_eq!((&report["work"]["scenario"], &report["work"]["arrivals"]), (&"soak".into(), &"4 at a time".into()));
    assert!(out.contains("latency: queries of the last tenth took") && number(&report["drift"]["ratio"]["value"]) > 0.0, "{out}");
    if cfg!(target_os = "linux") {
        let samples = report["memory"]["samples"].as_array().unwrap();
        assert!((10..=500).contains(&samples.len()), "{}", samples.len());
        assert!(samples.windows(2).all(|pair| number(&pair[0][0]) < number(&pair[1][0])));
        // The kernel counts pages of a thread in batches, so that a sample may lie a little above the peak.
        assert!(samples.iter().all(|sample| number(&sample[1]) <= 1.02 * number(&report["peak_resident_bytes"])));
        assert!(out.contains("MB an hour (") && !out.contains("memory grows"), "{out}");
        assert!(std::fs::read_to_string(html).unwrap().contains("\"samples\":[["));
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn settings_are_measured_in_turns_and_each_has_its_report() {
    let folder = folder("sweep");
    let [into, html] = ["all", "all.html"].map(|name| folder.join(name).to_str().unwrap().to_owned());
    let options = ["--vary", "threads=1,2", "--vary", "beams=1,2", "--rounds", "3", "--into", &into, "--html", &html];
    let (out, _) =
        ends(&bench(&[&["sweep"], &options[..], &["single", "--model", T5], &FEW, &SHORT].concat()).output().unwrap(), 0);
    let sweep = read(&Path::new(&into).join("sweep.json"));
    assert_eq!((&sweep["schema"], &sweep["version"], &sweep["is_complete"]), (&"blip2-sweep".into(), &1.into(), &true.into()));
    let settings = sweep["settings"].as_array().unwrap();
    let names: Vec<_> = settings.iter().map(|setting| setting["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["threads=1 beams=1", "threads=1 beams=2", "threads=2 beams=1", "threads=2 beams=2"]);
    for (i, setting) in settings.iter().enumerate() {
        assert!(out.contains(&format!("| {} | ", names[i])), "{out}");
        let turns = setting["turns"].as_array().unwrap();
        let report = read(&Path::new(&into).join(setting["report"].as_str().unwrap()));
        assert_eq!((turns.len(), &report["label"], &report["is_complete"]), (3, &setting["name"], &true.into()));
        let of_turns: u64 = turns.iter().map(|turn| turn["queries"].as_u64().unwrap()).sum();
        assert_eq!((of_turns, report["figures"]["counts"]["answered"].as_u64()), (9, Some(9)), "8 queries in 3 turns");
        assert_eq!(report["subject"]["threads"], if i < 2 { 1 } else { 2 });
        assert_eq!(report["work"]["search"], if i % 2 == 0 { "1 beams, 3 tokens" } else { "2 beams, 3 tokens" });
        // What a turn does a second is what all do: time between turns counts for nothing.
        let rates: Vec<f64> = turns.iter().map(|turn| number(&turn["rates"]["images"])).collect();
        let (least, most) = (rates.iter().copied().fold(f64::INFINITY, f64::min), rates.iter().copied().fold(0.0, f64::max));
        let all = number(&report["figures"]["rates"]["images"]);
        assert!((least * 0.999..=most * 1.001).contains(&all), "{all}: {rates:?}");
        assert_eq!(setting["latency"].is_null(), i == 0, "the first is what others are compared with");
    }
    assert!(number(&sweep["noise"]) >= 0.0 && out.contains("noise floor"));
    assert_eq!(std::fs::read_to_string(html).unwrap().matches("\"blip2-bench\"").count(), 4);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_bundle_is_as_fast_as_itself() {
    let folder = folder("itself");
    let json = folder.join("sweep.json");
    let model = format!("model={T5},{T5}");
    let options = ["--vary", &model, "--rounds", "6", "--json", json.to_str().unwrap()];
    let many = ["single", "--queries", "48", "--tokens", "3", "--beams", "1"];
    ends(&bench(&[&["sweep"], &options[..], &many, &FEW].concat()).output().unwrap(), 0);
    let sweep = read(&json);
    for ratio in ["latency", "images"] {
        let interval = &sweep["settings"][1][ratio]["interval"];
        let [low, high] = [0, 1].map(|edge| number(&interval[edge]));
        // One interval in twenty would miss 1 by a little.
        assert!(low < 1.25 && high > 0.8, "{ratio}: {low} to {high}, noise {}", sweep["noise"]);
    }
    assert!(sweep["settings"][0]["report"].is_null(), "no folder was named");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_process_for_each_turn_finds_the_same() {
    let folder = folder("apart");
    let reports = [&[][..], &["--apart"]].map(|how| {
        let into = folder.join(format!("into{}", how.len()));
        let options = [&["--vary", "threads=1,2", "--rounds", "2", "--into", into.to_str().unwrap()], how].concat();
        let offline = ["offline", "--concurrency", "2", "--model", T5];
        ends(&bench(&[&["sweep"], &options[..], &offline, &FEW, &SHORT].concat()).output().unwrap(), 0);
        let sweep = read(&into.join("sweep.json"));
        assert_eq!(sweep["apart"], how.len() == 1);
        let left = std::fs::read_dir(&into).unwrap().count();
        assert_eq!(left, 3, "two reports and sweep.json");
        read(&into.join("2-threads=2.json"))
    });
    for field in [&["figures", "outputs"][..], &["figures", "counts"], &["is_complete"], &["label"], &["work"]] {
        let [together, apart] = [0, 1].map(|i| field.iter().fold(&reports[i], |value, name| &value[*name]));
        assert_eq!(together, apart, "{field:?}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_setting_that_is_refused_leaves_the_others() {
    let folder = folder("refused");
    let json = folder.join("sweep.json");
    let model = format!("model={STAGE_1},{T5},nowhere,{STAGE_1}");
    let options = ["--vary", &model, "--rounds", "2", "--json", json.to_str().unwrap()];
    let embed = ["single", "--task", "embed", "--queries", "8"];
    let (out, err) = ends(&bench(&[&["sweep"], &options[..], &embed, &FEW].concat()).output().unwrap(), 2);
    let lines: Vec<&str> = err.lines().collect();
    assert!(lines.len() == 2 && lines[0].contains("model=tests/bundles/t5: ") && lines[1].contains("model=nowhere: "), "{err}");
    assert!(lines[0].contains("embed") && out.contains("| model=tests/bundles/t5 | – |"), "{err}{out}");
    let sweep = read(&json);
    assert!(sweep["settings"][1]["failure"].as_str().unwrap().contains("embed") && sweep["is_complete"] == false);
    assert!(sweep["settings"][3]["latency"]["value"].is_number());
    std::fs::remove_dir_all(folder).unwrap();
}

#[cfg(unix)]
#[test]
fn a_stopped_sweep_keeps_what_it_measured() {
    use std::os::unix::process::CommandExt as _;
    for to_all in [true, false] {
        let folder = folder(&format!("stopped-{to_all}"));
        let options = ["--vary", "threads=1,2", "--rounds", "1000", "--into", folder.to_str().unwrap()];
        let mut command = bench(&[&["sweep"], &options[..], &["single", "--model", T5, "--queries", "4000"], &FEW].concat());
        let child = command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // The last has begun to load then; a few turns take less than what is waited besides.
        while !folder.join("2-threads=2.json").exists() {
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_secs(8));
        // A terminal's Ctrl-C reaches all, other signals one.
        let whom = if to_all { format!("-{}", child.id()) } else { child.id().to_string() };
        Command::new("kill").args(["-INT", "--", &whom]).status().unwrap();
        let (out, err) = ends(&child.wait_with_output().unwrap(), 130);
        assert!(out.contains("not valid: not all turns") && err.contains("stopping"), "{out}{err}");
        let sweep = read(&folder.join("sweep.json"));
        for setting in sweep["settings"].as_array().unwrap() {
            let report = read(&folder.join(setting["report"].as_str().unwrap()));
            assert!(report["is_complete"] == false && setting["failure"].is_null(), "{setting}");
            assert!(
                report["figures"]["counts"]["answered"].as_u64() >= Some(4) && !setting["turns"].as_array().unwrap().is_empty()
            );
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_process_that_dies_leaves_the_others() {
    let folder = folder("dies");
    let options = ["--vary", "threads=1,2,1", "--rounds", "40", "--into", folder.to_str().unwrap()];
    let some = ["--queries", "80", "--tokens", "3", "--beams", "1"];
    let mut command = bench(&[&["sweep"], &options[..], &["single", "--model", T5], &some, &FEW].concat());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let children = || std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    while children().split_whitespace().count() < 3 {
        std::thread::sleep(Duration::from_millis(20));
    }
    Command::new("kill").args(["-KILL", children().split_whitespace().nth(1).unwrap()]).status().unwrap();
    let (out, err) = ends(&child.wait_with_output().unwrap(), 2);
    assert!(err.lines().count() == 1 && err.contains("threads=2: it ended by signal: 9"), "{err}");
    let sweep = read(&folder.join("sweep.json"));
    let n_turns: Vec<_> = [0, 2].map(|i| sweep["settings"][i]["turns"].as_array().unwrap().len()).into();
    assert!(n_turns == [40, 40] && sweep["settings"][1]["figures"].is_null() && out.contains("| threads=2 | – |"), "{out}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn sweeps_that_make_no_sense_are_refused_in_one_line() {
    let two = ["--vary", "threads=1,2"];
    for (args, part) in [
        (&["--vary", "threads", "single"][..], "`threads` names no option with its values"),
        (&["--vary", "threads=", "single"], "names no option with its values"),
        (&["--vary", "threads=1", "single"], "there is one setting"),
        (&["--vary", "threads=1,2", "--vary", "threads=3", "single"], "names threads twice"),
        (&["--vary", "colour=red,blue", "single"], "colour=red: unexpected argument '--colour' found"),
        (&["--vary", "threads=1,none", "single"], "threads=none: invalid value 'none'"),
        (&["--rounds", "0", two[0], two[1], "single"], "2 rounds at least"),
        (&[two[0], two[1], "single", "--threads", "2"], "cannot be used multiple times"),
        (&[two[0], two[1], "double"], "unrecognized subcommand 'double'"),
        (&[two[0], two[1], "soak"], "not measured in turns"),
        (&[two[0], two[1], "single", "--json", "one.json"], "`bench sweep --into DIR` keeps them"),
        (&[two[0], two[1], "server", "--rate", "0"], "0 is no rate"),
        (&[two[0], two[1], "server", "--rate", "9", "--queries", "3", "--duration", "0"], "arrivals are too few for 5 turns"),
    ] {
        let (out, err) = ends(&bench(&[&["sweep"], args].concat()).output().unwrap(), 2);
        assert!(err.contains(part), "{args:?}: {err}{out}");
    }
    for args in [&["--into", "README.md"][..], &["--json", "nowhere/sweep.json"]] {
        let (out, err) = ends(&bench(&[&["sweep"], args, &two, &["single", "--model", T5]].concat()).output().unwrap(), 1);
        assert!(out.is_empty() && err.lines().count() == 1 && err.contains("cannot be written"), "{err}");
    }
}

#[test]
fn what_is_tuned_is_what_other_commands_take() {
    let folder = folder("tune");
    let file = folder.join("settings.json");
    let path = file.to_str().unwrap();
    for (goal, n_sweeps) in [("latency", 1), ("throughput", 2)] {
        let embed = ["--model", STAGE_1, "--task", "embed", "--queries", "20"];
        let args = [&["tune", "--for", goal, "--write", path, "--rounds", "2"], &embed[..], &FEW].concat();
        let (out, _) = ends(&bench(&args).output().unwrap(), 0);
        let found = read(&file);
        assert_eq!((&found["schema"], &found["goal"]), (&"blip2-settings".into(), &goal.into()));
        let n_threads = std::thread::available_parallelism().unwrap().get();
        let n_sweeps = if n_threads == 1 { n_sweeps - 1 } else { n_sweeps };
        assert_eq!(found["tried"].as_array().unwrap().len(), n_sweeps, "{out}");
        let shown = |n: &Value| n.as_u64().map_or("the default".into(), |n| n.to_string());
        let last = format!("best: threads {}, batch {}", shown(&found["threads"]), shown(&found["batch"]));
        assert_eq!(out.lines().last(), Some(&*last));
        for sweep in found["tried"].as_array().unwrap() {
            let settings = sweep["settings"].as_array().unwrap();
            let chosen = if settings[0]["options"][0][0] == "threads" { &found["threads"] } else { &found["batch"] };
            let Some(setting) = settings.iter().find(|setting| setting["options"][0][1] == chosen.to_string().as_str()) else {
                assert!(chosen.is_null());
                continue;
            };
            let (latency, images) = (&setting["latency"]["interval"], &setting["images"]["interval"]);
            let is_sure = if goal == "latency" { number(&latency[1]) < 1.0 } else { number(&images[0]) > 1.0 };
            assert!(is_sure, "the default stays unless another is surely better: {setting}");
        }
        let (_, err) = ends(&blip2(&["doctor", "--settings", path, "--model", STAGE_1]).output().unwrap(), 0);
        assert!(!err.contains("warning"), "{err}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn settings_are_defaults_that_typed_options_override() {
    let folder = folder("settings");
    let file = folder.join("settings.json");
    let path = file.to_str().unwrap();
    let embed = ["--model", STAGE_1, "--task", "embed", "--queries", "2"];
    let tune = ["tune", "--for", "latency", "--write", path, "--rounds", "2"];
    ends(&bench(&[&tune, &embed[..], &FEW].concat()).output().unwrap(), 0);
    let mut settings = read(&file);
    (settings["threads"], settings["batch"]) = (1.into(), 300.into());
    std::fs::write(&file, settings.to_string()).unwrap();
    let json = folder.join("report.json");
    let offline = ["bench", "offline", "--json", json.to_str().unwrap()];
    let own = ["--settings", path];
    for (more, threads, arrivals) in
        [(&[][..], 1, "300 at a time"), (&["--threads", "2"], 2, "300 at a time"), (&["--concurrency", "5"], 1, "5 at a time")]
    {
        let (_, err) = ends(&blip2(&[&offline, &own[..], &embed, &FEW, more].concat()).output().unwrap(), 0);
        let report = read(&json);
        assert_eq!((&report["subject"]["threads"], &report["work"]["arrivals"]), (&threads.into(), &arrivals.into()));
        assert!(err.is_empty(), "{err}");
    }
    let (out, _) = ends(&blip2(&["doctor"]).env("BLIP2_SETTINGS", path).output().unwrap(), 0);
    assert!(out.contains("threads      1 inside an operator, as --settings say"), "{out}");
    // How many pictures a caption takes together shows where memory leaves no room for them.
    let little = ["caption", "models/samples/0.png", "--model", STAGE_1, "--memory-limit", "60MB"];
    let (_, err) = ends(&blip2(&[&little, &own[..]].concat()).output().unwrap(), 0);
    assert!(err.contains("of 300 pictures together"), "{err}");

    settings["machine"]["usable_processors"] = 512.into();
    std::fs::write(&file, settings.to_string()).unwrap();
    for model in [STAGE_1, T5] {
        let (out, err) =
            ends(&blip2(&["caption", "models/samples/0.png", "--model", model, "--settings", path]).output().unwrap(), 0);
        let warned: Vec<_> = err.lines().filter(|line| line.contains("--settings may be wrong here: they were found")).collect();
        assert!(warned.len() == 1 && warned[0].contains("512 processors; this is") && !out.is_empty(), "{err}");
        assert_eq!(warned[0].contains("another bundle"), model == T5, "{err}");
    }
    for (content, part) in
        [("{}", "holds no settings"), (r#"{"schema":"blip2-settings","version":7}"#, "version 7, and this program")]
    {
        std::fs::write(&file, content).unwrap();
        let (_, err) = ends(&blip2(&["caption", "models/samples/0.png", "--settings", path]).output().unwrap(), 2);
        assert!(err.contains(part) && err.contains(path), "{err}");
    }
    let (_, err) = ends(&blip2(&["doctor", "--settings", "nowhere.json"]).output().unwrap(), 2);
    assert!(err.contains("nowhere.json cannot be read: No such file"), "{err}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn tuning_that_makes_no_sense_is_refused_in_one_line() {
    for (args, code, part) in [
        (&["--write", "x.json"][..], 2, "--for"),
        (&["--for", "speed", "--write", "x.json"], 2, "speed"),
        (&["--for", "latency", "--write", "nowhere/x.json", "--model", T5], 1, "nowhere/x.json cannot be written"),
        (&["--for", "latency", "--write", "x.json", "--model", "nowhere"], 4, "nowhere"),
        (&["--for", "latency", "--write", "x.json", "--threads", "2", "--model", T5], 2, "threads"),
    ] {
        let (_, err) = ends(&bench(&[&["tune"], args].concat()).output().unwrap(), code);
        assert!(err.contains(part), "{args:?}: {err}");
    }
    let (_, err) =
        ends(&bench(&["tune", "--for", "latency", "--write", "x.json", "--url", "http://127.0.0.1:9/v1"]).output().unwrap(), 2);
    assert!(err.contains("--url names a server"), "{err}");
    assert!(!Path::new(env!("CARGO_MANIFEST_DIR")).join("x.json").exists());
}
