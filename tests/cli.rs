//! The binary as a user meets it, on the demo bundle and on damaged copies of it.

#![allow(clippy::unwrap_used)]

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn demo() -> PathBuf {
    root().join("models/demo-opt")
}

fn sample(index: usize) -> String {
    root().join(format!("models/samples/{index}.png")).to_str().unwrap().to_owned()
}

fn command<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(args).env_remove("BLIP2_MODEL").env("BLIP2_PROVIDER", "cpu").current_dir(root());
    command
}

fn blip2<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>) -> Output {
    command(args).output().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The command must end with `code`, say `said` in one line, and not panic.
#[track_caller]
fn fails<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>, code: i32, said: &str) -> Output {
    let output = blip2(args);
    let text = err(&output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.contains(said), "`{said}` is not in: {text}");
    assert!(!text.contains("panicked") && !text.contains("RUST_BACKTRACE"), "{text}");
    output
}

#[track_caller]
fn works<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>) -> String {
    let output = blip2(args);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    out(&output)
}

#[track_caller]
fn json_lines<I: AsRef<OsStr>>(args: impl IntoIterator<Item = I>) -> Vec<Value> {
    works(args).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A folder that goes away with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("blip2-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, content: &[u8]) -> OsString {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        path.into()
    }

    /// A copy of the demo bundle whose facts `edit` may change.
    fn bundle(&self, edit: impl FnOnce(&mut Value)) -> PathBuf {
        let to = self.0.join("bundle");
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            std::fs::create_dir_all(to.join(&folder)).unwrap();
            for entry in std::fs::read_dir(demo().join(&folder)).unwrap() {
                let inside = folder.join(entry.unwrap().file_name());
                if demo().join(&inside).is_dir() {
                    folders.push(inside);
                } else {
                    std::fs::copy(demo().join(&inside), to.join(&inside)).unwrap();
                }
            }
        }
        let mut facts = serde_json::from_slice(&std::fs::read(to.join("bundle.json")).unwrap()).unwrap();
        edit(&mut facts);
        std::fs::write(to.join("bundle.json"), facts.to_string()).unwrap();
        to
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn one_picture_gives_one_line() {
    let text = works(["caption", &sample(0)]);
    assert_eq!(text.lines().count(), 1);
    assert!(text.trim().len() > 5, "{text}");
}

#[test]
fn the_samples_get_their_captions() {
    let wanted = std::fs::read_to_string(root().join("models/samples/captions.txt")).unwrap();
    let pictures: Vec<String> = wanted.lines().map(|line| format!("models/samples/{}", line.split(": ").next().unwrap())).collect();
    assert!(pictures.len() >= 5);
    let found = works(["caption"].into_iter().map(str::to_owned).chain(pictures));
    assert_eq!(found.replace("models/samples/", ""), wanted);
}

#[test]
fn json_has_the_documented_keys() {
    let lines = json_lines(["caption", "--json", &sample(0), &sample(1)]);
    assert_eq!(lines.len(), 2);
    for (index, line) in lines.iter().enumerate() {
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["finish_reason", "first_token_ms", "image", "score", "text", "timings_ms", "tokens"]);
        assert_eq!(line["image"], sample(index));
        assert_eq!(line["finish_reason"], "stop");
        assert!(line["tokens"].as_array().unwrap().len() > 2);
        let timings = line["timings_ms"].as_object().unwrap();
        for stage in ["decode_image", "preprocess", "vision", "qformer", "prefill", "decode", "total"] {
            assert!(timings[stage].as_f64().unwrap() > 0.0, "{stage}");
        }
    }
    let line = &json_lines(["ask", "--json", &sample(0), "how many objects are there?"])[0];
    assert_eq!(line["question"], "how many objects are there?");
}

#[test]
fn questions_together_get_the_answers_they_get_alone() {
    let questions = ["how many objects are there?", "what colour is it?", "is there a star?", "where is the ring?", "what shape?"];
    let together = json_lines(["ask", "--json", &sample(1)].into_iter().chain(questions));
    assert_eq!(together.len(), questions.len());
    for (line, question) in together.iter().zip(questions) {
        let alone = &json_lines(["ask", "--json", &sample(1), question])[0];
        assert_eq!((&line["tokens"], &line["question"]), (&alone["tokens"], &json!(question)));
    }
    let text = works(["ask", &sample(1)].into_iter().chain(questions));
    for (line, question) in text.lines().zip(questions) {
        assert!(line.starts_with(&format!("{question} ")), "{line}");
    }
}

#[test]
fn lengths_are_limited_on_request() {
    let short = &json_lines(["caption", "--json", "--max-new-tokens", "2", &sample(0)])[0];
    assert_eq!((short["tokens"].as_array().unwrap().len(), &short["finish_reason"]), (2, &json!("length")));
    let whole = json_lines(["caption", "--json", &sample(0)])[0]["tokens"].as_array().unwrap().len();
    let least = (whole + 4).to_string();
    let long = &json_lines(["caption", "--json", "--max-new-tokens", "40", "--min-new-tokens", &least, &sample(0)])[0];
    assert!(long["tokens"].as_array().unwrap().len() > whole + 4);
    let endless = ["caption", "--json", "--max-new-tokens", "100000", "--min-new-tokens", "100000", &sample(0)];
    let line = &json_lines(endless)[0];
    assert_eq!(line["finish_reason"], "length", "the model's positions end the text");
}

#[test]
fn a_default_limit_gives_way_to_a_larger_minimum() {
    let facts: Value = serde_json::from_slice(&std::fs::read(demo().join("bundle.json")).unwrap()).unwrap();
    let least = facts["generation"]["caption"]["max_new_tokens"].as_u64().unwrap() + 10;
    let line = &json_lines(["caption", "--json", "--min-new-tokens", &least.to_string(), &sample(0)])[0];
    assert_eq!(line["tokens"].as_array().unwrap().len() as u64, least);
    assert!(line.get("warnings").is_none(), "{line}");
    let output = blip2(["caption", "--json", "--min-new-tokens", "5000", &sample(0)]);
    assert!(err(&output).contains("warning: at least 5000 new tokens are wanted; this model's positions leave room for"));
    let line: Value = serde_json::from_str(&out(&output)).unwrap();
    assert!(line["warnings"][0].as_str().unwrap().starts_with("at least 5000 new tokens"), "{line}");
    let scratch = Scratch::new();
    let bundle = scratch.bundle(|facts| facts["generation"]["caption"]["min_new_tokens"] = json!(8));
    let args = ["caption", "--json", "--max-new-tokens", "3", "--model", bundle.to_str().unwrap(), &sample(0)];
    assert_eq!(json_lines(args)[0]["tokens"].as_array().unwrap().len(), 3, "the bundle's minimum gives way to what was typed");
}

#[test]
fn token_ids_are_those_of_the_vocabulary() {
    let told = |option: &str, ids: &str, said: &str| {
        fails(["caption", "--json", "--log-probs", "0", "--max-new-tokens", "1", option, ids, &sample(0)], 2, said);
    };
    for option in ["--suppress-tokens", "--begin-suppress-tokens", "--forced-bos-token", "--forced-eos-tokens"] {
        let name = option.trim_start_matches("--");
        told(option, "999999", &format!("{name}: token 999999 is not in the vocabulary, whose 456 tokens count from 0"));
        told(option, "4294967296", "4294967295");
        told(option, "-1", "argument '-1'");
        told(option, "", "invalid");
    }
    told("--suppress-tokens", "3,456", "token 456 is not in the vocabulary");
    fails(["caption", "--suppress-tokens", "5", "--forced-eos-tokens", "5", &sample(0)], 2, "forces tokens that are suppressed");
}

#[test]
fn memory_has_a_limit_that_is_reckoned_out() {
    for many in ["1000000000", "18446744073709551615"] {
        fails(["caption", "--beams", many, &sample(0)], 2, "of memory,");
        fails(["caption", "--sample", "--num-return", many, &sample(0)], 2, "of memory,");
    }
    let ask = |beams| ["ask", "--beams", beams, "--max-cache-bytes", "2000000", "models/samples/0.png", "what?", "what?", "what?"];
    fails(ask("9"), 2, "9 rows of 64 positions at 4096 bytes");
    assert_eq!(works(ask("3")).lines().count(), 3, "what has no room beside others waits");
    let huge = "1000000000000";
    for option in ["--top-k", "--no-repeat-ngram", "--max-new-tokens"] {
        works(["caption", "--sample", option, huge, &sample(0)]);
    }
    let line = &json_lines(["caption", "--json", "--log-probs", huge, "--max-new-tokens", "2", &sample(0)])[0];
    assert_eq!(line["log_probs"][0]["alternatives"].as_array().unwrap().len(), 456);
}

#[test]
fn several_texts_come_best_first() {
    let line = &json_lines(["caption", "--json", "--beams", "4", "--num-return", "3", &sample(0)])[0];
    let candidates = line["candidates"].as_array().unwrap();
    assert_eq!(candidates.len(), 3);
    assert_eq!((&candidates[0]["text"], &candidates[0]["score"]), (&line["text"], &line["score"]));
    let scores: Vec<f64> = candidates.iter().map(|candidate| candidate["score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    let text = works(["caption", "--beams", "4", "--num-return", "3", &sample(0)]);
    assert_eq!(text.lines().collect::<Vec<_>>(), candidates.iter().map(|c| c["text"].as_str().unwrap()).collect::<Vec<_>>());
    let default = &json_lines(["caption", "--json", &sample(0)])[0];
    let five = &json_lines(["caption", "--json", "--beams", "5", &sample(0)])[0];
    assert_eq!((&five["tokens"], &five["score"]), (&default["tokens"], &default["score"]), "the bundle asks for five beams");
    let greedy = &json_lines(["caption", "--json", "--beams", "1", &sample(0)])[0];
    assert!(greedy.get("score").is_none(), "one beam is greedy search");
}

#[test]
fn a_seed_draws_the_same_texts_alone_and_beside_others() {
    let drawn =
        |seed: &str, n: &str| works(["caption", "--sample", "--temperature", "3", "--seed", seed, "--num-return", n, &sample(0)]);
    let together = drawn("7", "4");
    assert_eq!(together, drawn("7", "4"));
    assert_eq!(together.lines().nth(2).unwrap(), drawn("9", "1").trim_end(), "the k-th text is drawn with seed + k");
    let distinct: std::collections::HashSet<&str> = together.lines().collect();
    assert!(distinct.len() > 1, "{together}");
}

#[test]
fn a_search_that_makes_no_sense_is_refused() {
    let cases: [(&[&str], &str); 12] = [
        (&["--beams", "1", "--num-return", "2"], "greedy search writes one text"),
        (&["--beams", "2", "--num-return", "3"], "3 texts are wanted of 2 beams"),
        (&["--beams", "0"], "the number of beams must be at least 1"),
        (&["--beams", "2", "--length-penalty", "nan"], "length penalty is NaN"),
        (&["--beams", "2", "--early-stopping", "soon"], "false, true and never are known"),
        (&["--repetition-penalty", "-1"], "repetition penalty is -1"),
        (&["--sample", "--temperature", "0"], "temperature is 0"),
        (&["--sample", "--temperature", "-1"], "temperature is -1"),
        (&["--sample", "--min-p", "-0.1"], "min-p is -0.1"),
        (&["--sample", "--top-p", "1.5"], "top-p is 1.5"),
        (&["--top-k", "5"], "--sample"),
        (&["--beams", "1", "--length-penalty", "0"], "are for beam search"),
    ];
    for (options, said) in cases {
        fails(["caption"].into_iter().chain(options.iter().copied()).chain([sample(0).as_str()]), 2, said);
    }
}

#[test]
fn threads_and_standard_input_change_nothing() {
    let plain = works(["caption", &sample(2)]);
    assert_eq!(works(["caption", "--threads", "1", &sample(2)]), plain);
    let mut child = command(["caption", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&std::fs::read(sample(2)).unwrap()).unwrap();
    assert_eq!(out(&child.wait_with_output().unwrap()), plain);
}

#[test]
fn there_are_as_many_threads_as_the_process_may_use() {
    assert!(works(["doctor", "--threads", "3"]).contains("\nthreads      3 inside an operator, as --threads says\n"));
    let doctor = ["-c", "0", env!("CARGO_BIN_EXE_blip2"), "doctor"];
    match Command::new("taskset").args(doctor).env("BLIP2_PROVIDER", "cpu").current_dir(root()).output() {
        Ok(bound) => {
            assert!(out(&bound).contains("\nthreads      1 inside an operator, one a core"), "{}{}", out(&bound), err(&bound))
        }
        Err(error) => eprintln!("skipped: taskset, which binds a process to one processor: {error}"),
    }
}

#[test]
fn a_prompt_of_ones_own_is_continued() {
    let asked = json_lines(["ask", "--json", &sample(0), "how many objects are there?"]);
    let facts: Value = serde_json::from_slice(&std::fs::read(demo().join("bundle.json")).unwrap()).unwrap();
    let template = facts["prompts"]["ask"].as_str().unwrap();
    let most = facts["generation"]["ask"]["max_new_tokens"].to_string();
    let raw = template.replace("{}", "how many objects are there?");
    let options = ["--length-penalty", "0", "--max-new-tokens", &most];
    let continued = json_lines([&["caption", "--json"], &options[..], &["--prompt", &raw, &sample(0)]].concat());
    assert_eq!(continued[0]["tokens"], asked[0]["tokens"]);
    let templated = json_lines(["ask", "--json", "--prompt", template, &sample(0), "how many objects are there?"]);
    assert_eq!(templated[0]["tokens"], asked[0]["tokens"]);
}

#[test]
fn pictures_that_cannot_be_used_say_why_and_the_others_are_captioned() {
    let scratch = Scratch::new();
    let png = std::fs::read(sample(0)).unwrap();
    let jpeg = std::fs::read(root().join("tests/pictures/photo.jpg")).unwrap();
    let bomb = scratch.file("bomb.png", &png_header(60_000, 60_000));
    let cases = [
        (scratch.0.join("missing.png").into(), "cannot be read: No such file"),
        (scratch.0.clone().into(), "is a folder, not a file"),
        (scratch.file("empty.png", b""), "is empty"),
        (scratch.file("letter.txt", b"Dear engine, this is not a picture."), "is not a picture in a known format"),
        (scratch.file("cut.png", &png[..png.len() / 2]), "is damaged or cut off"),
        (scratch.file("cut.jpg", &jpeg[..jpeg.len() / 2]), "is damaged or cut off"),
        (scratch.file("header.jpg", &jpeg[..3]), "is damaged or cut off"),
        (bomb, "is 60000×60000, more than the 89478485 pixels allowed"),
    ];
    for (path, said) in &cases {
        fails([OsStr::new("caption"), path], 3, said);
    }
    let mut all = vec![OsString::from("caption"), sample(0).into()];
    all.extend(cases.iter().map(|(path, _)| path.clone()));
    all.push(sample(1).into());
    let output = fails(all, 3, "is empty");
    assert_eq!(err(&output).lines().count(), cases.len(), "{}", err(&output));
    let text = out(&output);
    assert!(text.lines().count() == 2 && text.starts_with(&sample(0)) && text.contains(&sample(1)), "{text}");
    fails(["caption", "--max-bytes", "1000", &sample(0)], 3, "more than the 1000 bytes allowed");
    fails(["caption", "--max-pixels", "1000", &sample(0)], 3, "more than the 1000 pixels allowed");
    fails(["caption", "--max-side", "10", &sample(0)], 3, "a side of it longer than the 10 pixels allowed");
    let folder = std::env::temp_dir().join(format!("blip2-empty-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let empty = folder.join("empty.ppm").to_str().unwrap().to_owned();
    std::fs::write(&empty, "P6\n0 4\n255\n").unwrap();
    let output = fails(["caption", &empty, &sample(0)], 3, "is 0×4, without any pixel");
    assert!(out(&output).starts_with(&sample(0)), "the picture behind it has its caption");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn transparency_is_treated_as_the_bundle_or_the_command_line_says() {
    let embedding = |picture: &str, more: &[&str]| {
        let picture = root().join("tests/pictures").join(picture).to_str().unwrap().to_owned();
        let args = [&["embed", "image", "--model", "models/demo-itm", &picture], more].concat();
        json_lines(args)[0]["embedding"].clone()
    };
    let (white, stored) = (embedding("png_rgba.white.png", &[]), embedding("png_rgba.rgb.png", &[]));
    assert_ne!(white, stored);
    assert_eq!(embedding("png_rgba.png", &[]), white, "the bundle's way");
    assert_eq!(embedding("png_rgba.png", &["--alpha", "white"]), white);
    assert_eq!(embedding("png_rgba.png", &["--alpha", "drop"]), stored);
    fails(["caption", "--alpha", "black", &sample(0)], 2, "white and drop are known");
}

#[test]
fn a_damaged_picture_that_is_whole_is_captioned_with_a_warning() {
    let picture = root().join("tests/pictures/damaged_no_end.png");
    let output = blip2([OsStr::new("caption"), picture.as_ref()]);
    assert!(output.status.success() && !out(&output).is_empty(), "{}", err(&output));
    assert!(err(&output).contains("damaged_no_end.png: the end of the file is missing") && err(&output).lines().count() == 1);
}

#[test]
fn a_picture_that_does_not_become_a_square_is_named() {
    let scratch = Scratch::new();
    let bundle = scratch.bundle(|facts| facts["image"]["resize"] = json!("keep"));
    let picture = root().join("tests/pictures/wide.png");
    fails([OsStr::new("caption"), "--model".as_ref(), bundle.as_ref(), picture.as_ref()], 3, "wide.png: is 301×50 in the end");
}

/// A PNG that claims a size and holds nothing.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut chunk = b"IHDR".to_vec();
    chunk.extend(width.to_be_bytes());
    chunk.extend(height.to_be_bytes());
    chunk.extend([8, 2, 0, 0, 0]);
    let crc = chunk.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    });
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    png.extend(chunk);
    png.extend((!crc).to_be_bytes());
    png.extend(b"\0\0\0\0IDAT");
    png
}

#[test]
fn questions_that_cannot_be_asked_say_why() {
    fails(["ask", &sample(0), ""], 3, "the question is empty");
    fails(["ask", &sample(0), "what?", "  "], 3, "the question is empty");
    fails(["ask", &sample(0), "what is </s> here?"], 3, "`</s>`, which is a special token");
    let long = "how many ".repeat(4000);
    let output = fails(["ask", &sample(0), &long], 3, "query tokens this model has room for");
    assert!(err(&output).contains("the prompt has ") && err(&output).len() < 400, "{}", err(&output));
    fails(["caption", "--prompt", &long, &sample(0)], 3, "query tokens this model has room for");
}

#[test]
fn a_question_that_cannot_be_asked_does_not_keep_the_others_from_their_answers() {
    let question = "how many objects are there?";
    let alone = &json_lines(["ask", "--json", &sample(0), question])[0];
    let long = "how many ".repeat(4000);
    let asked = ["ask", "--json", &sample(0), " ", question, "what is </s>?", &long];
    let output = fails(asked, 3, "question 1, ` `: the question is empty");
    let said = err(&output);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 3, "{said}");
    assert!(lines[1].contains("question 3, `what is </s>?`: the text contains `</s>`"), "{said}");
    assert!(lines[2].contains("question 4, `how many how many") && lines[2].len() < 300, "{said}");
    let found: Value = serde_json::from_str(&out(&output)).unwrap();
    assert_eq!((&found["question"], &found["tokens"]), (&json!(question), &alone["tokens"]));
    let output = fails(["ask", &sample(0), "", "  "], 3, "question 2, `  `: the question is empty");
    assert_eq!(out(&output), "");
}

#[test]
fn nothing_that_others_wrote_breaks_a_line() {
    let scratch = Scratch::new();
    let picture = scratch.file("a\nb\u{1b}[2J.png", &std::fs::read(sample(0)).unwrap());
    let picture = picture.to_str().unwrap();
    let text = works(["caption", picture, picture]);
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(text.lines().all(|line| line.contains("/a\\nb\\u{1b}[2J.png: ")), "{text}");
    assert_eq!(json_lines(["caption", "--json", picture])[0]["image"], picture);
    let asked = works(["ask", &sample(0), "what\nis it?", "how\tmany?"]);
    assert_eq!(asked.lines().count(), 2, "{asked}");
    assert!(asked.starts_with("what\\nis it? ") && asked.contains("\nhow\\tmany? "), "{asked}");
    let output = fails(["caption", "no\nsuch\r  file.png"], 3, "no\\nsuch\\r  file.png: cannot be read");
    assert_eq!(err(&output).lines().count(), 1);
    let output = fails(["ask", &sample(0), "</s>\n\u{7}"], 3, "question 1, `</s>\\n\\u{7}`");
    assert_eq!(err(&output).lines().count(), 1);
    // The bell, as byte-level vocabularies spell it.
    let tokenizer: Value = serde_json::from_slice(&std::fs::read(demo().join("tokenizer.json")).unwrap()).unwrap();
    let bell = tokenizer["model"]["vocab"]["\u{107}"].to_string();
    let rung = ["--beams", "1", "--max-new-tokens", "3", "--forced-eos-tokens", &bell, &sample(0)];
    let text = works([&["caption"], &rung[..]].concat());
    assert!(text.ends_with("\\u{7}\n") && text.lines().count() == 1, "{text:?}");
    assert!(json_lines([&["caption", "--json"], &rung[..]].concat())[0]["text"].as_str().unwrap().ends_with('\u{7}'));
}

#[test]
fn a_wrong_command_line_is_explained() {
    fails(["caption"], 2, "IMAGE");
    fails(["ask", &sample(0)], 2, "QUESTION");
    fails(["paint", &sample(0)], 2, "unrecognized subcommand");
    fails(
        ["caption", "--provider", "abacus", &sample(0)],
        2,
        "auto, cpu, cuda, tensorrt, openvino, webgpu, tensorrt-rtx and plugin:NAME are known",
    );
    fails(["caption", "--provider", "plugin:", &sample(0)], 2, "`plugin:` needs a name");
    fails(["caption", "--provider", "openvino", "--precision", "int8", &sample(0)], 2, "float32, bfloat16, float16 are known");
    fails(["caption", "--provider", "webgpu", "--precision", "float32", &sample(0)], 2, "--precision is for openvino");
    fails(["caption", "--provider", "openvino", "--ep-option", "load_config", &sample(0)], 2, "the form KEY=VALUE");
    fails(["caption", "--provider", "openvino", "--ep-option", "a=b", &sample(0)], 2, "no option `a`; it takes load_config");
    fails(["caption", "--ep-option", "a=b", &sample(0)], 2, "provider `cpu` takes no --ep-option");
    fails(["doctor", "--provider", "cuda", "--ep-option", "a=b"], 2, "provider `cuda` takes no --ep-option");
    fails(["caption", "--allow-fallback=all", &sample(0)], 2, "nothing, operators, graphs are known");
    fails(["caption", "--threads", "0", &sample(0)], 2, "an operator runs on 1 thread at least");
    fails(["caption", "--threads", "100000", &sample(0)], 2, "100000 threads");
    fails(["caption", "--max-new-tokens", "3", "--min-new-tokens", "4", &sample(0)], 2, "at least 4 new tokens are wanted, and 3");
    for (template, found) in [("", 0), ("no place", 0), ("{} or {}", 2)] {
        for command in [["ask", &sample(0), "what?"].as_slice(), &["rank", &sample(0), "what?", "red"]] {
            fails([command, &["--prompt", template]].concat(), 2, &format!("needs one {{}}, which takes it; this one has {found}"));
        }
    }
    fails(["caption", "--rerank", "itm", "--itm-model", "models/demo-itm", &sample(0)], 2, "--num-return N asks for them");
    fails(["caption", "--beams", "3", "--num-return", "0", &sample(0)], 2, "num-return");
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        fails([OsStr::new("ask"), OsStr::new(&sample(0)), OsStr::from_bytes(b"what \xff?")], 2, "invalid UTF-8");
    }
}

#[test]
fn what_the_machine_lacks_is_named() {
    let scratch = Scratch::new();
    fails(["caption", "--onnxruntime", "/nowhere/libonnxruntime.so", &sample(0)], 5, "no ONNX Runtime library at /nowhere");
    let fake = scratch.file("libonnxruntime.so", b"not a library");
    fails([OsStr::new("caption"), OsStr::new("--onnxruntime"), &fake, OsStr::new(&sample(0))], 5, "ONNX Runtime cannot be loaded");
    let output = command(["doctor"]).env("ORT_DYLIB_PATH", "/nowhere").output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    let doctor = works(["doctor"]);
    assert!(doctor.contains("ONNX Runtime 1.") && doctor.contains("cpu          usable"), "{doctor}");
    let chosen = command(["caption", &sample(0)]).env_remove("BLIP2_PROVIDER").output().unwrap();
    let taken = doctor.lines().find_map(|line| line.strip_prefix("auto         takes ")).unwrap();
    assert!(err(&chosen).starts_with(&format!("blip2: runs on {taken}")) && err(&chosen).lines().count() == 1, "{}", err(&chosen));
    assert!(taken == "cuda" || err(&chosen).contains("cuda: "), "why not the others: {}", err(&chosen));
    for provider in ["cuda", "tensorrt", "webgpu", "openvino", "tensorrt-rtx"] {
        if doctor.lines().any(|line| line.starts_with(provider) && line.contains("not usable")) {
            fails(["caption", "--provider", provider, &sample(0)], 5, &format!("provider `{provider}` "));
            fails(["doctor", "--provider", provider], 5, "usable");
        }
    }
}

#[test]
fn the_demo_bundle_gives_what_its_reference_gave() {
    let text = works(["verify"]);
    assert!(text.contains("tokens") && text.contains("first_logits") && !text.contains("WRONG"), "{text}");
    assert_eq!(works(["verify", "models/demo-opt"]), text);
    let facts: Value = serde_json::from_str(&works(["inspect", "--json"])).unwrap();
    assert_eq!(facts["format_version"], 4);
    let shown = works(["inspect", "tests/bundles/int8-vqa-opt"]);
    let says = [
        "decoder.onnx, computes in int8,",
        "loss         against float32",
        "features           ",
        "are chosen as in float32",
        "perplexity",
    ];
    assert!(says.iter().all(|said| shown.contains(said)), "{shown}");
    let shown = works(["inspect"]);
    assert!(
        !shown.contains("against float32")
            && shown.contains("query tokens")
            && shown.contains("resized to a square (bicubic), alpha white"),
        "{shown}"
    );
}

#[test]
fn a_bundle_that_contradicts_itself_says_where() {
    type Edit = fn(&mut Value);
    let cases: [(Edit, &str); 18] = [
        (|f| f["format_version"] = json!(99), "bundle format version 99, this engine reads version 4"),
        (|f| f["format_version"] = json!("new"), "bundle format version \"new\""),
        (|f| drop(f.as_object_mut().unwrap().remove("vision")), "missing field `vision`"),
        (|f| f["colour"] = json!("red"), "unknown field `colour`"),
        (|f| f["image"]["size"] = json!(97), "vision's input `pixel_values` is float32"),
        (|f| f["image"]["std"][1] = json!(0.0), "cannot normalise"),
        (|f| f["image"]["resize"] = json!({"shortest_edge": 0}), "sides from 1 to 4096 are possible"),
        (|f| f["image"]["resize"] = json!({"exact": {"width": 96, "height": 97}}), "without center_crop that never makes 96×96"),
        (|f| f["image"]["resize"] = json!({"shortest_edge": 95}), "without center_crop that never makes 96×96"),
        (|f| drop(f["graphs"].as_object_mut().unwrap().remove("qformer")), "needs a graph `qformer`"),
        (|f| f["qformer"]["n_queries"] = json!(5), "qformer's output `queries` is"),
        (|f| f["language"]["kv_cache"]["n_layers"] = json!(9), "nothing of decoder's input"),
        (|f| f["language"]["vocab_size"] = json!(457), "decoder's output `logits` is"),
        (|f| f["language"]["token_ids"]["eos"] = json!([1_000_000]), "token id 1000000"),
        (|f| f["language"]["token_ids"]["eos"] = json!([]), "no end token"),
        (|f| f["prompts"]["ask"] = json!("no hole"), "task ask"),
        (|f| f["files"]["../../etc/passwd"] = json!({"bytes": 1, "sha256": ""}), "is not inside the bundle"),
        (|f| f["requires"]["onnxruntime"] = json!("99.0"), "needs ONNX Runtime 99.0 or later"),
    ];
    for (edit, said) in cases {
        let scratch = Scratch::new();
        let bundle = scratch.bundle(edit);
        let code = if said.contains("99.0") { 5 } else { 4 };
        fails([OsStr::new("caption"), OsStr::new("--model"), bundle.as_ref(), OsStr::new(&sample(0))], code, said);
    }
}

#[test]
fn a_bundle_with_missing_or_changed_files_says_which() {
    let caption = |bundle: &Path, said: &str| {
        fails([OsStr::new("caption"), OsStr::new("--model"), bundle.as_ref(), OsStr::new(&sample(0))], 4, said);
    };
    let scratch = Scratch::new();
    caption(&scratch.0.join("nothing"), "no bundle there");

    std::fs::write(scratch.bundle(|_| ()).join("bundle.json"), "{\"format_version\": 2,").unwrap();
    caption(&scratch.0.join("bundle"), "bundle.json is not valid: EOF");

    std::fs::remove_file(scratch.bundle(|_| ()).join("qformer.onnx")).unwrap();
    caption(&scratch.0.join("bundle"), "qformer.onnx is missing");

    let data = scratch.bundle(|_| ()).join("vision.onnx.data");
    let mut bytes = std::fs::read(&data).unwrap();
    std::fs::write(&data, &bytes[1..]).unwrap();
    caption(&scratch.0.join("bundle"), "vision.onnx.data has ");

    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&data, &bytes).unwrap();
    fails([OsStr::new("verify"), scratch.0.join("bundle").as_ref()], 4, "vision.onnx.data has SHA-256");

    let graph = scratch.bundle(|_| ()).join("vision.onnx");
    let bytes = std::fs::read(&graph).unwrap();
    std::fs::write(&graph, vec![b'x'; bytes.len()]).unwrap();
    caption(&scratch.0.join("bundle"), "vision.onnx: is not an ONNX file");

    let tokenizer = scratch.bundle(|_| ()).join("tokenizer.json");
    let bytes = std::fs::read(&tokenizer).unwrap();
    std::fs::write(&tokenizer, vec![b' '; bytes.len()]).unwrap();
    caption(&scratch.0.join("bundle"), "tokenizer.json is not a tokenizer");
}

#[test]
fn a_graph_that_is_not_what_the_facts_say_is_refused() {
    let scratch = Scratch::new();
    let bundle = scratch.bundle(|facts| {
        let wider = facts["vision"]["n_positions"].as_u64().unwrap() + 1;
        facts["vision"]["n_positions"] = json!(wider);
        facts["graphs"]["vision"]["outputs"][0]["shape"][1] = json!(wider);
        facts["graphs"]["qformer"]["inputs"][0]["shape"][1] = json!(wider);
    });
    fails(
        [OsStr::new("caption"), OsStr::new("--model"), bundle.as_ref(), OsStr::new(&sample(0))],
        4,
        "bundle.json says float32 [batch",
    );
}

#[test]
fn verify_turns_red_where_a_stage_differs() {
    for stage in ["features", "queries", "first_logits"] {
        let scratch = Scratch::new();
        let mut changed = String::new();
        let bundle = scratch.bundle(|facts| {
            let golden: Value = serde_json::from_slice(&std::fs::read(demo().join("golden/golden.json")).unwrap()).unwrap();
            changed = golden["cases"][0][stage]["file"].as_str().unwrap().to_owned();
            let mut bytes = std::fs::read(demo().join(&changed)).unwrap();
            bytes[..4].copy_from_slice(&1e3f32.to_le_bytes());
            std::fs::write(scratch.0.join("changed"), &bytes).unwrap();
            facts["files"][&changed]["sha256"] = json!(sha256(&bytes));
        });
        std::fs::copy(scratch.0.join("changed"), bundle.join(&changed)).unwrap();
        let output = fails([OsStr::new("verify"), bundle.as_ref()], 4, "of the checks above failed");
        assert!(out(&output).lines().any(|line| line.starts_with("WRONG") && line.contains(stage)), "{}", out(&output));
    }
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_reader_that_goes_away_is_no_error_message() {
    let mut child =
        command(["caption", "--json", &sample(0), &sample(1)]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), err(&output).as_str()), (Some(1), ""));
}
