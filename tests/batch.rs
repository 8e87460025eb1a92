//! Many pictures through the binary: the same answers as one by one, in the order in which they were named, whatever the batch.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use blip2::pixels::{Limits, Pixels};
use blip2::runtime::{RuntimeError, RuntimeOptions};
use blip2::{Engine, Error, Picture, Request, Task};
use serde_json::{Value, json};

const WRITING: [&str; 8] = [
    "models/demo-opt",
    "models/demo-t5",
    "models/demo-vqa",
    "models/demo-itm",
    "tests/bundles/t5",
    "tests/bundles/instruct-llama",
    "tests/bundles/vqa-opt",
    "tests/bundles/stage1",
];
const QUESTIONS: [&str; 2] = ["how many objects are there?", "is there a star?"];
const TEXTS: [&str; 3] = ["a red star", "three objects, one is an orange star", "a blue ring at the left"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Good pictures of several kinds, some of them twice.
fn pictures() -> Vec<String> {
    let samples = (0..6).chain([2, 0]).map(|index| format!("models/samples/{index}.png"));
    samples.chain(["tests/pictures/photo.jpg", "tests/pictures/wide.png"].map(str::to_owned)).collect()
}

/// With bad ones at the ends and between.
fn with_bad_ones() -> Vec<String> {
    let mut all = pictures();
    all.insert(5, "README.md".into());
    all.insert(5, "models".into());
    all.insert(0, "nowhere.png".into());
    all.push("Cargo.toml".into());
    all
}

fn command<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(args).env_remove("BLIP2_MODEL").env("BLIP2_PROVIDER", "cpu").current_dir(root());
    command
}

#[track_caller]
fn ends(output: &Output, code: i32) -> (String, String) {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert_eq!(output.status.code(), Some(code), "{err}");
    assert!(!err.contains("panicked"), "{err}");
    (out, err)
}

#[track_caller]
fn json_lines(args: &[&str], code: i32) -> (Vec<Value>, String) {
    let (out, err) = ends(&command(args.iter().copied()).output().unwrap(), code);
    (out.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), err)
}

fn parts(line: &Value) -> Value {
    json!([line["image"], line["question"], line["text"], line["tokens"], line["finish_reason"], line["score"]])
}

/// What each picture gets in a batch of one, and that larger ones change nothing of it.
fn same_in_every_batch(command: &[&str], n_lines: usize) {
    let images = with_bad_ones();
    let named: Vec<&str> = images.iter().map(String::as_str).collect();
    let run = |batch: &str| {
        let (lines, err) = json_lines(&[command, &["--json", "--batch", batch], &named].concat(), 3);
        assert_eq!(lines.len(), pictures().len() * n_lines, "{command:?}: {err}");
        let said: Vec<String> = err.lines().map(str::to_owned).collect();
        (lines, said)
    };
    let (wanted, said) = run("1");
    for (index, picture) in pictures().iter().enumerate() {
        assert!(wanted[index * n_lines..][..n_lines].iter().all(|line| line["image"] == **picture), "{command:?}");
    }
    assert_eq!(said.len(), 4, "{said:?}");
    for batch in ["3", "8"] {
        let (found, said_now) = run(batch);
        assert_eq!(
            found.iter().map(parts).collect::<Vec<_>>(),
            wanted.iter().map(parts).collect::<Vec<_>>(),
            "{command:?} {batch}"
        );
        assert_eq!(said_now, said);
    }
}

#[test]
fn captions_are_the_same_in_every_batch() {
    for bundle in WRITING {
        same_in_every_batch(&["caption", "--model", bundle], 1);
    }
    same_in_every_batch(&["caption", "--beams", "1"], 1);
}

#[test]
fn a_caption_in_a_batch_is_the_one_it_gets_alone() {
    let wanted = std::fs::read_to_string(root().join("models/samples/captions.txt")).unwrap();
    let wanted: Vec<&str> = wanted.lines().map(|line| line.split_once(": ").unwrap().1).collect();
    let images = pictures();
    let (lines, _) = json_lines(&[&["caption", "--json"], &images.iter().map(String::as_str).collect::<Vec<_>>()[..6]].concat(), 0);
    for (line, wanted) in lines.iter().zip(wanted) {
        assert_eq!(line["text"], wanted);
    }
}

#[test]
fn answers_about_many_pictures_are_the_same_in_every_batch() {
    let images = with_bad_ones();
    let options: Vec<String> = images.iter().map(|image| format!("--image={image}")).collect();
    let run = |model: &str, batch: &str| {
        let named = options.iter().map(String::as_str);
        let args: Vec<&str> =
            ["ask", "--model", model, "--json", "--batch", batch].into_iter().chain(named).chain(QUESTIONS).collect();
        json_lines(&args, 3)
    };
    for model in WRITING.into_iter().filter(|model| !model.ends_with("itm") && !model.ends_with("stage1")) {
        let (wanted, said) = run(model, "1");
        let labels: Vec<_> = wanted.iter().map(|line| (line["image"].clone(), line["question"].clone())).collect();
        let named = pictures().into_iter().flat_map(|image| QUESTIONS.map(|question| (json!(image), json!(question))));
        assert_eq!(labels, named.collect::<Vec<_>>());
        for batch in ["3", "8"] {
            let (found, said_now) = run(model, batch);
            assert_eq!(
                found.iter().map(parts).collect::<Vec<_>>(),
                wanted.iter().map(parts).collect::<Vec<_>>(),
                "{model} {batch}"
            );
            assert_eq!(said_now, said);
        }
    }
    let alone = json_lines(&["ask", "--json", "models/samples/1.png", QUESTIONS[0]], 0).0;
    assert_eq!(run("models/demo-opt", "8").0[2]["tokens"], alone[0]["tokens"]);
    let (out, _) = ends(&command(["ask", "--image", &pictures()[0], "--image", &pictures()[1], QUESTIONS[0]]).output().unwrap(), 0);
    assert!(out.starts_with("models/samples/0.png: three\nmodels/samples/1.png: "), "{out}");
}

fn near(a: &Value, b: &Value) -> bool {
    (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-5
}

#[test]
fn many_pictures_are_matched_with_many_texts() {
    for model in ["models/demo-itm", "tests/bundles/stage1"] {
        let model = ["match", "--model", model, "--json"];
        let alone = |picture: &String| json_lines(&[&model[..], &[picture], &TEXTS].concat(), 0).0;
        let wanted: Vec<Value> = pictures().iter().flat_map(alone).collect();
        for batch in ["1", "3", "8"] {
            let images = with_bad_ones();
            let options: Vec<String> = images.iter().map(|image| format!("--image={image}")).collect();
            let options: Vec<&str> = options.iter().map(String::as_str).collect();
            let (found, said) =
                json_lines(&[&model[..], &["--batch", batch], &options, &TEXTS[..2], &[" "], &TEXTS[2..]].concat(), 3);
            assert!(said.contains("text 3, ` `: the text is empty") && said.contains("nowhere.png: cannot be read"), "{said}");
            assert_eq!(found.len(), wanted.len());
            for (found, wanted) in found.iter().zip(&wanted) {
                assert_eq!((&found["image"], &found["text"]), (&wanted["image"], &wanted["text"]));
                for key in ["itm_probability", "itm_logit", "itc_similarity"] {
                    assert!(near(&found[key], &wanted[key]), "{key} in a batch of {batch}: {found} instead of {wanted}");
                }
            }
        }
    }
    let (out, _) =
        ends(&command(["match", "--model", "models/demo-itm", "--image", &pictures()[0], TEXTS[0], TEXTS[1]]).output().unwrap(), 0);
    assert!(out.lines().count() == 2 && !out.contains("samples"), "one picture needs no name: {out}");
}

#[test]
fn vectors_of_many_pictures_keep_their_places() {
    let images = with_bad_ones();
    let named: Vec<&str> = images.iter().map(String::as_str).collect();
    let run = |batch| json_lines(&[&["embed", "image", "--model", "models/demo-itm", "--batch", batch], &named[..]].concat(), 3).0;
    let wanted = run("1");
    assert_eq!(wanted.iter().map(|line| line["image"].as_str().unwrap()).collect::<Vec<_>>(), pictures());
    for (found, wanted) in run("4").iter().zip(&wanted) {
        let pairs = found["embedding"].as_array().unwrap().iter().zip(wanted["embedding"].as_array().unwrap());
        assert!(pairs.into_iter().all(|(a, b)| near(a, b)));
    }
    let file = std::env::temp_dir().join(format!("blip2-batch-{}.npy", std::process::id()));
    let list = named.join("\n");
    let args = ["embed", "image", "--model", "models/demo-itm", "--images-from", "-", "--npy", file.to_str().unwrap()];
    let (_, said) = ends(&fed(&args, &list), 3);
    assert!(said.contains("row 0 of") && said.contains(&format!("row {} of", images.len() - 1)), "{said}");
    let array: ndarray::Array2<f32> = ndarray_npy::read_npy(&file).unwrap();
    std::fs::remove_file(file).unwrap();
    assert_eq!(array.nrows(), images.len());
    let good = (0..images.len()).filter(|row| !array[[*row, 0]].is_nan()).map(|row| images[row].clone());
    assert_eq!(good.collect::<Vec<_>>(), pictures());
}

/// What the command says with this on standard input.
fn fed(args: &[&str], input: &str) -> Output {
    let mut child =
        command(args.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn pictures_are_named_in_a_list() {
    let images = pictures();
    let wanted = ends(&command(["caption"].into_iter().chain(images.iter().map(String::as_str))).output().unwrap(), 0).0;
    let list: PathBuf = std::env::temp_dir().join(format!("blip2-list-{}.txt", std::process::id()));
    std::fs::write(&list, format!("{}\n\n{}", images[1..4].join("\n"), images[4..].join("\n"))).unwrap();
    let found = ends(&command(["caption", &images[0], "--images-from", list.to_str().unwrap()]).output().unwrap(), 0).0;
    std::fs::remove_file(&list).unwrap();
    assert_eq!(found, wanted);
    let (out, _) = ends(&fed(&["ask", "--images-from", "-", QUESTIONS[0]], &images[..2].join("\n")), 0);
    assert!(out.lines().count() == 2 && out.starts_with("models/samples/0.png: three\n"), "{out}");
    let (out, err) = ends(&fed(&["caption", "--images-from", "-"], "-\n"), 3);
    assert!(out.is_empty() && err.contains("./-: cannot be read"), "in a list it is a file: {err}");
    assert_eq!(ends(&fed(&["caption", "--images-from", "-"], ""), 0), (String::new(), String::new()));
    let says = |args: &[&str], code: i32, said: &str| {
        let (_, err) = ends(&command(args.iter().copied()).output().unwrap(), code);
        assert!(err.contains(said), "`{said}` is not in: {err}");
    };
    says(&["caption", "--images-from", "nowhere.txt"], 3, "nowhere.txt: cannot be read");
    says(&["caption", "--images-from", "models"], 3, "models: cannot be read");
    says(&["caption", "--images-from", "-", "-"], 2, "`-` is given as both");
    says(&["embed", "text", "--model", "models/demo-itm", "--images-from", "x", "a"], 2, "is for `embed image`");
    says(&["match", "--model", "models/demo-itm", "--image", "x.png"], 2, "IMAGE");
    for (batch, said) in [("0", "1 to 1024 pictures"), ("1025", "1 to 1024 pictures"), ("many", "invalid digit"), ("-1", "-1")] {
        says(&["caption", "--batch", batch, &images[0]], 2, said);
    }
}

#[test]
fn every_picture_can_have_its_own_texts() {
    let image = |index: usize| format!("models/samples/{index}.png");
    for (command, model, key, texts) in
        [("ask", "models/demo-opt", "question", &QUESTIONS[..]), ("match", "models/demo-itm", "text", &TEXTS)]
    {
        // A picture twice, with one text, several, and none that can be read.
        let good = [(0, vec![texts[0]]), (1, texts.to_vec()), (0, vec![texts[1]]), (2, vec![texts[1], texts[0]])];
        let alone = |(index, texts): &(usize, Vec<&str>)| {
            json_lines(&[&[command, "--model", model, "--json", &image(*index)], &texts[..]].concat(), 0).0
        };
        let wanted: Vec<Value> = good.iter().flat_map(alone).collect();
        let mut lines: Vec<String> =
            good.iter().map(|(index, texts)| json!({"image": image(*index), key: texts}).to_string()).collect();
        lines[0] = json!({"image": image(0), key: texts[0], "id": 7}).to_string();
        lines.insert(1, json!({"image": image(1), key: [" "]}).to_string());
        lines.insert(2, "[1]\r".into());
        lines.insert(3, json!({ "image": image(1) }).to_string());
        lines.insert(4, json!({"image": image(1), key: [texts[0], 3]}).to_string());
        lines.insert(5, json!({ key: texts[0] }).to_string());
        lines.insert(6, String::new());
        lines.insert(7, json!({"image": "nowhere.png", key: texts}).to_string());
        for batch in ["1", "3"] {
            let args = [command, "--model", model, "--json", "--batch", batch, "--pairs", "-"];
            let (out, err) = ends(&fed(&args, &lines.join("\n")), 3);
            let found: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert_eq!(found.len(), wanted.len(), "{out}{err}");
            for (found, wanted) in found.iter().zip(&wanted) {
                assert_eq!(parts(found), parts(wanted), "in a batch of {batch}");
                assert!(command == "ask" || near(&found["itm_logit"], &wanted["itm_logit"]), "{found} instead of {wanted}");
            }
            let said = [
                format!("models/samples/1.png: {key} 1, ` `: the {key} is empty"),
                "line 3 of standard input: no JSON object; a pair is".to_owned(),
                format!("line 4 of standard input: no `{key}`; a pair is {{\"image\": \"FILE\", \"{key}\": \"TEXT\"}}"),
                format!("line 5 of standard input: no `{key}`"),
                "line 6 of standard input: no `image`".to_owned(),
                "nowhere.png: cannot be read".to_owned(),
            ];
            let told: Vec<&str> = err.lines().filter(|line| line.starts_with("blip2: ")).collect();
            assert_eq!(told.len(), said.len(), "{err}");
            assert!(told.iter().zip(&said).all(|(told, said)| told.contains(said)), "{err}");
        }
        let (_, err) = ends(&fed(&[command, "--model", model, "--pairs", "-", &image(0), texts[0]], ""), 2);
        assert!(err.contains("cannot be used with"), "{err}");
        assert_eq!(ends(&fed(&[command, "--model", model, "--pairs", "-"], ""), 0), (String::new(), String::new()));
    }
    let pair = json!({"image": image(0), "question": QUESTIONS[0]}).to_string();
    let (out, _) = ends(&fed(&["ask", "--pairs", "-"], &pair), 0);
    assert_eq!(out, format!("{}: {} three\n", image(0), QUESTIONS[0]));
}

#[test]
fn what_is_done_is_written_before_more_is_named() {
    let mut child = command(["caption", "--images-from", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut into, mut lines) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines());
    for picture in pictures() {
        writeln!(into, "{picture}").unwrap();
        let line = lines.next().unwrap().unwrap();
        assert!(line.starts_with(&format!("{picture}: ")), "{line}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_picture_that_a_graph_fails_on_does_no_harm_to_its_neighbours() {
    for model in ["models/demo-opt", "models/demo-itm"] {
        let mut engine = Engine::open(&root().join(model), &RuntimeOptions::default()).unwrap();
        let pixels = |index: usize| {
            let picture = Picture::open(&root().join(&pictures()[index]), &Limits::default()).unwrap();
            Pixels::from_pictures(&[&picture], &engine.bundle().facts().image).unwrap()
        };
        let (first, mut broken, last) = (pixels(0), pixels(1), pixels(2));
        broken.0.fill(f32::NAN);
        let seen = engine.seer().see_each(&[&first, &broken, &last]);
        assert!(matches!(seen[1], Err(Error::Runtime(RuntimeError::NotANumber { .. }))), "{model}");
        for (seen, pixels) in [(&seen[0], &first), (&seen[2], &last)] {
            let alone = engine.seer().see_each(&[pixels]).remove(0).unwrap();
            let mut caption = |sight| {
                let request = Request { sight, task: Task::Caption, generation: Default::default() };
                engine.ask(&[request], |_, _| std::ops::ControlFlow::Continue(())).remove(0).unwrap().tokens
            };
            assert_eq!(caption(seen.as_ref().unwrap()), caption(&alone), "{model}");
        }
    }
}
