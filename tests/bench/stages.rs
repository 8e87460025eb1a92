//! `blip2 bench stage` as its users meet it: which parts there are, how far each is from its floor, and what is refused.

use std::path::Path;

use serde_json::Value;

use crate::browser::Browser;
use crate::program::{Folder, bench as command, ends};

const OPT: &str = "models/demo-opt";
const T5: &str = "tests/bundles/t5";
const STAGE_1: &str = "tests/bundles/stage1";
const FEW: [&str; 8] = ["--drawn", "2", "--image-size", "64x48", "--duration", "0", "--warm-up", "0"];
/// A busy machine may be slower while its limits are sought than while stages run.
const NOISE: f64 = 0.5;

fn few<'a>(args: &[&'a str], model: &'a str) -> Vec<&'a str> {
    let limits: &[&str] = if args.contains(&"--limits") { &[] } else { &["--limits", "0"] };
    [&["stage", "--rounds", "3", "--model", model], &FEW[..], limits, args].concat()
}

fn stages(report: &Value) -> Vec<String> {
    report["figures"]["stages_ms"].as_array().unwrap().iter().map(|stage| stage[0].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_round_runs_every_part_of_a_request() {
    let folder = Folder::new("parts");
    for (model, args, expected) in [
        (OPT, &["--rows", "2,1,2", "--past", "40"][..], "prefill step_1x40 step_2x40 reorder_2x40 text"),
        (T5, &["--rows", "1", "--past", "300,5"], "encoder prefill step_1x5 step_1x300 text"),
        ("tests/bundles/instruct-llama", &["--task", "ask", "--rows", "1"], "prefill step_1x48 step_1x255 text"),
        (STAGE_1, &["--rows", "1", "--past", "9"], "embed_text match prefill step_1x9 text"),
    ] {
        let (_, report) = folder.run(&few(args, model));
        let expected = format!("decode_image preprocess vision qformer {expected}");
        assert_eq!(stages(&report).join(" "), expected, "{model}");
        let figures = &report["figures"];
        assert_eq!((&figures["counts"]["answered"], &report["work"]["scenario"]), (&3.into(), &"stage".into()));
        assert!(figures["unaccounted"].as_f64().unwrap().abs() < 0.02, "{model}: {}", figures["unaccounted"]);
        assert!(report.get("limits").is_none(), "nobody asked for them");
    }
}

#[test]
fn usual_steps_are_of_the_beams_and_as_far_as_positions_go() {
    let folder = Folder::new("usual");
    let (_, report) = folder.run(&few(&[], STAGE_1));
    let steps: Vec<String> = stages(&report).into_iter().filter(|stage| stage.starts_with("step")).collect();
    assert_eq!(steps.join(" "), "step_1x48 step_3x48 step_16x48 step_1x71 step_3x71 step_16x71");
    let (_, report) = folder.run(&few(&["--beams", "2", "--past", "50"], OPT));
    let steps: Vec<String> = stages(&report).into_iter().filter(|stage| stage.starts_with("step")).collect();
    assert_eq!(steps.join(" "), "step_1x50 step_2x50 step_16x50");
}

#[test]
fn parts_come_to_the_first_token_of_the_whole() {
    let folder = Folder::new("token");
    let outputs = |report: &Value| {
        let rows = report["timeline"].as_array().unwrap().iter();
        rows.map(|row| row["output"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (_, parts) = folder.run(&few(&["--rows", "1", "--past", "40"], OPT));
    let whole = ["single", "--queries", "3", "--beams", "1", "--tokens", "1", "--model", OPT];
    let (_, whole) = folder.run(&[&whole[..], &FEW[..]].concat());
    assert_eq!(outputs(&parts), outputs(&whole));
    assert!(!outputs(&parts)[0].is_empty());
}

#[test]
fn no_stage_is_faster_than_its_floor() {
    let folder = Folder::new("floor");
    for (model, precision) in [(OPT, "float32"), ("tests/bundles/int8-t5", "int8"), (STAGE_1, "float32")] {
        let html = folder.file("page.html");
        let args = few(&["--rows", "1,4", "--past", "48", "--limits", "0.4", "--html", &html], model);
        let (out, report) = folder.run(&args);
        let limits = &report["limits"];
        let peaks = &limits["peaks"];
        assert!(peaks["operations_per_second"][precision].as_f64().unwrap() > 1e9, "{peaks}");
        assert!(peaks["memory"].as_array().unwrap().iter().all(|buffer| buffer["bytes_per_second"].as_f64().unwrap() > 1e8));
        assert_eq!(limits["instruction_set"], report["machine"]["instruction_set"]);
        for limit in limits["stages"].as_array().unwrap() {
            let stage = limit["stage"].as_str().unwrap();
            if ["decode_image", "preprocess", "text"].contains(&stage) {
                assert!(limit.get("cost").is_none() && limit.get("floor").is_none(), "{limit}");
                continue;
            }
            let operations: u64 = limit["cost"]["operations"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum();
            assert_eq!(operations > 0, !stage.starts_with("reorder"), "{limit}");
            assert!(limit["floor"]["ms"].as_f64().unwrap() > 0.0, "{limit}");
            assert!(limit["achieved"].as_f64().unwrap() > NOISE, "{model}: {limit}");
        }
        assert!(out.contains("| step 4x48 | ") && out.contains("| text | – | – | – | – | – |"), "{out}");
        assert!(out.contains(&format!("at most ({}): ", limits["instruction_set"].as_str().unwrap())), "{out}");
        assert!(std::fs::read_to_string(html).unwrap().contains("\"operations_per_second\""));
    }
}

#[test]
fn the_page_has_a_roof_and_a_point_for_every_stage_that_multiplies() {
    let folder = Folder::new("page");
    let html = folder.file("page.html");
    let args = few(&["--rows", "1,2", "--past", "48", "--limits", "0.1", "--html", &html], "tests/bundles/int8-vqa-opt");
    let (_, report) = folder.run(&args);
    let Some(browser) = Browser::find() else { return };
    let page = browser.drawn(Path::new(&html).parent().unwrap(), Path::new(&html), &[]);
    let stages = report["limits"]["stages"].as_array().unwrap();
    let multiply = stages.iter().filter(|limit| limit["cost"]["operations"].as_object().is_some_and(|all| !all.is_empty()));
    assert_eq!(page.matches("<circle").count(), multiply.count(), "{page}");
    assert!(page.contains("<h2>Roofline</h2>") && page.contains("<h2>Distance to the limit</h2>"));
    let roofs = report["limits"]["peaks"]["operations_per_second"].as_object().unwrap();
    assert!(roofs.len() == 2 && roofs.keys().all(|precision| page.contains(&format!(">{precision}: "))));
}

#[test]
fn stages_are_compared() {
    let folder = Folder::new("compare");
    let (_, mut report) = folder.run(&few(&["--rows", "1", "--past", "48"], T5));
    let stages = report["figures"]["stages_ms"].as_array_mut().unwrap();
    let vision = stages.iter_mut().find(|stage| stage[0] == "vision").unwrap();
    for percentile in vision[1]["percentiles"].as_array_mut().unwrap() {
        percentile["value"] = (percentile["value"].as_f64().unwrap() * 2.0).into();
    }
    let (before, slow) = (folder.file("report.json"), folder.file("slow.json"));
    std::fs::write(&slow, report.to_string()).unwrap();
    let compare = |condition, code| ends(&command(&["compare", &before, &slow, "--fail-if", condition]).output().unwrap(), code);
    let (out, err) = compare("stage_vision.p50>+50%", 1);
    assert!(out.contains("| stage_vision.p99 |") && err.contains("stage_vision.p50 changed by +100.0 %"), "{out}{err}");
    compare("stage_qformer.p50>+50%", 0);
    assert!(compare("stage_queue.p50>+5%", 2).1.contains("no `stage_queue.p50`"));
}

/// A copy of the stage-1 bundle without what writes.
fn silent(folder: &Folder) -> String {
    let (from, to) = (Path::new(env!("CARGO_MANIFEST_DIR")).join(STAGE_1), folder.path("silent"));
    std::fs::create_dir_all(&to).unwrap();
    let mut facts: Value = serde_json::from_slice(&std::fs::read(from.join("bundle.json")).unwrap()).unwrap();
    let files = facts["files"].as_object_mut().unwrap();
    files.retain(|file, _| !file.starts_with("golden") && file != "decoder.onnx");
    for file in files.keys() {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
    facts["graphs"].as_object_mut().unwrap().remove("decoder");
    facts["tasks"] = serde_json::json!(["match", "embed"]);
    ["prompts", "generation"].into_iter().for_each(|name| facts[name] = serde_json::json!({}));
    facts.as_object_mut().unwrap().remove("language");
    std::fs::write(to.join("bundle.json"), facts.to_string()).unwrap();
    to.to_str().unwrap().to_owned()
}

#[test]
fn a_bundle_that_does_not_write_has_the_parts_that_compare() {
    let folder = Folder::new("silent");
    let bundle = silent(&folder);
    let (_, report) = folder.run(&few(&["--task", "match", "--text", "a star"], &bundle));
    assert_eq!(stages(&report).join(" "), "decode_image preprocess vision qformer embed_text match");
    for args in [&["--rows", "2"][..], &["--past", "9"]] {
        let (_, err) = ends(&command(&few(args, &bundle)).output().unwrap(), 2);
        assert!(err.contains("stage1 writes nothing, so it has no decode step"), "{err}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_in_one_line() {
    for (args, code, part) in [
        (&["--rows", "0"][..], 2, "--rows"),
        (&["--past", "0"], 2, "--past"),
        (&["--past", "48,many"], 2, "--past"),
        (&["--past", "2048"], 2, "2048 positions before a step are none that t5 can have: it has 1 to 2047"),
        (&["--limits", "-1"], 2, "a number of seconds from 0"),
        (&["--tokens", "5"], 2, "--tokens is not for stages"),
        (&["--task", "match"], 4, "match"),
        (&["--text", "what?"], 2, "--text is not for --task caption"),
        (&["--url", "http://127.0.0.1:9/v1"], 2, "--url names a server, which shows no stages"),
        (&["--rows", "100000000", "--max-cache-bytes", "1000000"], 1, "1000000 may be used"),
    ] {
        let (out, err) = ends(&command(&few(args, T5)).output().unwrap(), code);
        assert!(out.is_empty() && err.contains(part), "{args:?}: {err}");
    }
    let (_, err) = ends(&command(&few(&["--past", "8"], STAGE_1)).output().unwrap(), 2);
    assert!(err.contains("it has 9 to 71"), "{err}");
    let (_, err) = ends(&command(&["stage", "README.md", "--model", T5]).output().unwrap(), 3);
    assert!(err.starts_with("blip2: README.md: is not a picture in a known format"), "{err}");
}
