//! Every family of bundles and every command that needs one, on small bundles with random weights (`tests/bundles`, made by
//! `tests/bundles/make.py`). What they write makes no sense; that it equals the reference is recorded in each bundle.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn bundle(name: &str) -> String {
    root().join("tests/bundles").join(name).to_str().unwrap().to_owned()
}

fn sample(index: usize) -> String {
    root().join(format!("models/samples/{index}.png")).to_str().unwrap().to_owned()
}

fn blip2(model: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    let (name, rest) = args.split_first().unwrap();
    command
        .arg(name)
        .args(["--model", &bundle(model)])
        .args(rest)
        .env_remove("BLIP2_MODEL")
        .env("BLIP2_PROVIDER", "cpu")
        .current_dir(root());
    command.output().unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn works(model: &str, args: &[&str]) -> String {
    let output = blip2(model, args);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn rows(model: &str, args: &[&str]) -> Vec<Value> {
    works(model, args).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[track_caller]
fn fails(model: &str, args: &[&str], code: i32, said: &str) {
    let output = blip2(model, args);
    let text = err(&output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.contains(said) && !text.contains("panicked"), "`{said}` is not in: {text}");
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"))
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("blip2-families-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const WRITERS: [&str; 4] = ["t5", "instruct-llama", "vqa-opt", "stage1"];

#[test]
fn every_family_gives_what_its_reference_gave() {
    for name in WRITERS {
        let text = works(name, &["verify"]);
        assert!(text.contains("gives what its reference gave"), "{text}");
    }
}

#[test]
fn a_bundle_says_what_it_can_do() {
    fails("t5", &["match", &sample(0), "a star"], 4, "this bundle cannot match; it can caption, ask");
    fails("t5", &["embed", "text", "a star"], 4, "this bundle cannot embed; it can caption, ask");
    fails("stage1", &["ask", &sample(0), "what?"], 4, "this bundle cannot ask; it can match, embed, caption");
    fails("stage1", &["rank", &sample(0), "what?", "red"], 4, "this bundle cannot ask");
    fails("stage1", &["caption", "--prompt", "a photo of", &sample(0)], 3, "captions take no prompt");
}

#[test]
fn texts_are_matched_together_as_alone() {
    let texts = ["a red star", "a large blue ring left of a small green square", "a"];
    let together = rows("stage1", &["match", "--json", &sample(0), texts[0], texts[1], texts[2]]);
    for (row, text) in together.iter().zip(texts) {
        let alone = &rows("stage1", &["match", "--json", &sample(0), text])[0];
        assert_eq!(row["text"], text);
        for key in ["itm_probability", "itm_logit", "itc_similarity"] {
            assert!((number(row, key) - number(alone, key)).abs() < 1e-5, "{key}: {row}, alone {alone}");
        }
        assert!((0.0..=1.0).contains(&number(row, "itm_probability")) && number(row, "itc_similarity").abs() <= 1.0001);
    }
    assert_ne!(together[0]["itc_similarity"], together[1]["itc_similarity"]);
    fails("stage1", &["match", &sample(0), " "], 3, "the text is empty");
    let long = "a red star and ".repeat(30);
    let output = blip2("stage1", &["match", &sample(0), &long]);
    let warning = err(&output);
    assert!(output.status.success() && warning.contains("the rest is not read"), "{warning}");
    assert!(warning.len() < 200 && warning.contains("a red star and a red star and"), "{warning}");
}

#[test]
fn similarity_is_the_largest_cosine_of_the_embeddings() {
    let image = &rows("stage1", &["embed", "image", "--per-query", &sample(1)])[0];
    let text = &rows("stage1", &["embed", "text", "a red star"])[0];
    let vector = |value: &Value| value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<f64>>();
    let text = vector(&text["embedding"]);
    let queries: Vec<Vec<f64>> = image["queries"].as_array().unwrap().iter().map(vector).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    assert!(queries.iter().chain([&text]).all(|v| (dot(v, v) - 1.0).abs() < 1e-4), "vectors have length 1");
    let largest = queries.iter().map(|query| dot(query, &text)).fold(f64::MIN, f64::max);
    let found = &rows("stage1", &["match", "--json", &sample(1), "a red star"])[0];
    assert!((largest - number(found, "itc_similarity")).abs() < 1e-4);
    let pooled = vector(&rows("stage1", &["embed", "image", &sample(1)])[0]["embedding"]);
    let mean: Vec<f64> = (0..text.len()).map(|k| queries.iter().map(|query| query[k]).sum::<f64>()).collect();
    assert!((dot(&pooled, &mean) / dot(&mean, &mean).sqrt() - 1.0).abs() < 1e-4, "the pooled vector points where the mean points");
}

#[test]
fn embeddings_go_into_one_array() {
    let scratch = Scratch::new("npy");
    let file = scratch.0.join("x.npy").to_str().unwrap().to_owned();
    let shape = || {
        let bytes = std::fs::read(&file).unwrap();
        let header = String::from_utf8_lossy(&bytes[10..128.min(bytes.len())]).into_owned();
        header.split("'shape': ").nth(1).unwrap().split_inclusive(')').next().unwrap().to_owned()
    };
    works("stage1", &["embed", "image", "--npy", &file, &sample(0), &sample(1)]);
    assert_eq!(shape(), "(2, 24)");
    works("stage1", &["embed", "image", "--per-query", "--npy", &file, &sample(0), &sample(1)]);
    assert_eq!(shape(), "(2, 8, 24)");
    works("stage1", &["embed", "pair", "--npy", &file, &sample(0), "a star", "a ring", "a"]);
    assert_eq!(shape(), "(3, 8, 32)");
    fails("stage1", &["embed", "pair", &sample(0)], 2, "at least one text");
    fails("stage1", &["embed", "text", "--per-query", "a"], 2, "a text has one vector");
    for place in ["/nowhere/x.npy", scratch.0.to_str().unwrap()] {
        fails("stage1", &["embed", "text", "--npy", place, "a"], 1, "cannot be written");
    }
}

#[test]
fn what_has_no_vectors_keeps_its_place_in_the_array() {
    let scratch = Scratch::new("nan");
    let file = scratch.0.join("x.npy").to_str().unwrap().to_owned();
    let broken = scratch.0.join("broken.png").to_str().unwrap().to_owned();
    std::fs::write(&broken, b"no picture").unwrap();
    let kinds: [(&[&str], usize); 4] = [
        (&["image", "--npy", &file, &sample(0), &broken, &sample(1)], 1),
        (&["image", "--per-query", "--npy", &file, &broken, &sample(0), &sample(1)], 0),
        (&["text", "--npy", &file, "a star", "a ring", " "], 2),
        (&["pair", "--npy", &file, &sample(0), "a star", "[SEP]", "a ring"], 1),
    ];
    for (args, bad) in kinds {
        fails("stage1", &[&["embed"], args].concat(), 3, &format!("row {bad} of {file} is NaN: "));
        let is_nan = rows_that_are_nan(&file, 3);
        assert_eq!(is_nan, [bad == 0, bad == 1, bad == 2], "{args:?}");
    }
    fails("stage1", &["embed", "text", "--npy", &file, "", " "], 3, "row 1 of ");
    assert_eq!(rows_that_are_nan(&file, 2), [true, true]);
    let old = std::fs::read(&file).unwrap();
    fails("stage1", &["embed", "pair", "--npy", &file, &broken, "a star"], 3, "broken.png");
    assert_eq!(std::fs::read(&file).unwrap(), old, "without a picture there is no array");
    let left: Vec<_> = std::fs::read_dir(&scratch.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

fn rows_that_are_nan(file: &str, n_rows: usize) -> Vec<bool> {
    let bytes = std::fs::read(file).unwrap();
    let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let values: Vec<f32> = bytes[header..].chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
    let rows = values.chunks(values.len() / n_rows);
    rows.map(|row| if row.iter().any(|v| v.is_nan()) { row.iter().all(|v| v.is_nan()) } else { false }).collect()
}

#[test]
fn what_the_vocabulary_lacks_is_read_as_unknown_with_a_warning_or_refused_on_request() {
    let cases: [(&str, &[&str], &str); 5] = [
        ("stage1", &["match", "--json", &sample(0), "a 🎉 star"], "`🎉`, in: a 🎉 star"),
        ("stage1", &["embed", "text", "zwj a\u{200d}b"], "at all: `"),
        ("stage1", &["embed", "pair", &sample(0), "漢字"], "`漢`, `字`, in: 漢字"),
        ("t5", &["ask", "--json", &sample(0), "what\nis 漢字 {é}?"], "`漢字`, `é`, in: what\nis 漢字 {é}?"),
        ("t5", &["rank", "--json", &sample(0), "what?", "漢字"], "`漢字`, in: 漢字"),
    ];
    for (model, args, said) in cases {
        let output = blip2(model, args);
        let text = err(&output);
        assert!(output.status.success(), "{text}");
        let row: Value = serde_json::from_slice(&output.stdout).unwrap();
        let warnings = row["warnings"].as_array().unwrap();
        assert!(warnings.len() == 1 && warnings[0].as_str().unwrap().contains(said), "{row}");
        let (one, found) = (text.lines().count() == 1, text.starts_with("blip2: warning: not in the vocabulary"));
        assert!(one && found, "{text}");
        let strict = [args, &["--strict-text"]].concat();
        fails(model, &strict, 3, "which this model's vocabulary cannot write");
    }
    let both = works("vqa-opt", &["ask", "--json", &sample(0), "what is 🎉?"]);
    assert!(both.contains("`🎉`, in: what is 🎉?"), "the language model has bytes, the Q-Former's words do not: {both}");
    let quiet = blip2("t5", &["caption", "--json", "--strict-text", "--prompt", "a star", &sample(0)]);
    assert!(quiet.status.success() && err(&quiet).is_empty() && !String::from_utf8_lossy(&quiet.stdout).contains("warnings"));
    fails("t5", &["caption", "--strict-text", "--prompt", "漢", &sample(0)], 3, "`漢`");
    fails("t5", &["caption", "--bad-word", "漢", &sample(0)], 3, "`漢`");
    let several = blip2("t5", &["caption", "--prompt", "漢", &sample(0), &sample(1)]);
    assert_eq!(err(&several).lines().count(), 1, "one prompt, one warning: {}", err(&several));
}

#[test]
fn a_text_that_cannot_be_used_does_not_keep_the_others_from_theirs() {
    let cases: [(&str, &[&str], &[&str], &str); 4] = [
        ("stage1", &["match", "--json", &sample(0)], &["a star", "", "[SEP]", "a ring"], "text 2, ``: the text is empty"),
        ("stage1", &["embed", "text"], &["a star", "", "[SEP]", "a ring"], "text 3, `[SEP]`"),
        ("stage1", &["embed", "pair", &sample(0)], &["a star", "", "[SEP]", "a ring"], "text 3, `[SEP]`"),
        ("t5", &["rank", "--json", &sample(0), "what?"], &["red", " ", "</s>", "blue"], "answer 2, ` `: the text is empty"),
    ];
    for (model, args, texts, said) in cases {
        let output = blip2(model, &[args, texts].concat());
        assert_eq!((output.status.code(), err(&output).lines().count()), (Some(3), 2), "{}", err(&output));
        assert!(err(&output).contains(said), "{}", err(&output));
        let mut good = rows(model, &[args, &[texts[0], texts[3]]].concat());
        let mut found: Vec<Value> =
            String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for row in good.iter_mut().chain(&mut found) {
            row.as_object_mut().unwrap().remove("timings_ms");
        }
        assert_eq!(found, good);
        let output = blip2(model, &[args, &["", " "]].concat());
        assert_eq!((output.status.code(), output.stdout.len()), (Some(3), 0), "{}", err(&output));
    }
}

#[test]
fn candidates_are_ranked_by_the_likelihood_of_their_tokens() {
    for name in ["t5", "instruct-llama", "vqa-opt"] {
        let ask = ["rank", "--json", &sample(0), "what colour is the star?", "red", "left of a blue ring", "two"];
        let ranked = rows(name, &ask);
        let values: Vec<f64> = ranked.iter().map(|row| number(row, "log_likelihood")).collect();
        assert!(values.is_sorted_by(|a, b| a >= b) && values.iter().all(|v| *v < 0.0), "{name}: {values:?}");
        for row in &ranked {
            let alone = &rows(name, &["rank", "--json", &sample(0), "what colour is the star?", row["text"].as_str().unwrap()])[0];
            assert!((number(alone, "log_likelihood") - number(row, "log_likelihood")).abs() < 1e-3, "{name}: {alone}, {row}");
        }
        let normalized = rows(name, &["rank", "--json", "--normalize", &sample(0), ask[3], ask[4], ask[5], ask[6]]);
        let values: Vec<f64> = normalized.iter().map(|row| number(row, "log_likelihood") / number(row, "n_tokens")).collect();
        assert!(values.is_sorted_by(|a, b| a >= b), "{name}: {values:?}");
    }
    fails("t5", &["rank", &sample(0), "what?", "red", " "], 3, "the text is empty");
    fails("t5", &["rank", &sample(0), "", "red"], 3, "the question is empty");
}

#[test]
fn log_probabilities_are_those_that_searches_add_up() {
    for name in WRITERS {
        let greedy =
            &rows(name, &["caption", "--json", "--beams", "1", "--max-new-tokens", "6", "--log-probs", "3", &sample(0)])[0];
        let found = greedy["log_probs"].as_array().unwrap();
        assert_eq!(found.len(), greedy["tokens"].as_array().unwrap().len());
        for (token, found) in greedy["tokens"].as_array().unwrap().iter().zip(found) {
            assert_eq!(&found["token"], token, "{name}");
            assert_eq!(&found["alternatives"][0]["token"], token, "{name}: greedy search takes the best");
            assert!((number(found, "log_prob") - number(&found["alternatives"][0], "log_prob")).abs() < 1e-6);
            assert_eq!(found["alternatives"].as_array().unwrap().len(), 3);
        }
        let options = ["--beams", "3", "--length-penalty", "0", "--max-new-tokens", "6", "--log-probs", "0"];
        let beam = &rows(name, &[&["caption", "--json"], &options[..], &[&sample(0)]].concat())[0];
        let sum: f64 = beam["log_probs"].as_array().unwrap().iter().map(|token| number(token, "log_prob")).sum();
        assert!((sum - number(beam, "score")).abs() < 1e-3, "{name}: {sum}, score {}", beam["score"]);
    }
    fails("t5", &["caption", "--log-probs", "2", &sample(0)], 2, "--json");
}

#[test]
fn a_stop_string_ends_the_text_and_is_no_part_of_it() {
    for options in [&["--beams", "1"][..], &["--beams", "3"]] {
        let whole = &rows("t5", &[&["caption", "--json"], options, &[&sample(0)]].concat())[0];
        let text = whole["text"].as_str().unwrap();
        let middle: Vec<char> = text.chars().collect();
        let stop: String = middle[middle.len() / 2..middle.len() / 2 + 2].iter().collect();
        let cut = &rows("t5", &[&["caption", "--json", "--stop", &stop], options, &[&sample(0)]].concat())[0];
        let said = cut["text"].as_str().unwrap();
        assert!(!said.contains(&stop), "{stop:?} in {said:?}");
        if options[1] == "1" {
            assert!(cut["finish_reason"] == "stop" && text.starts_with(said) && said.len() < text.len(), "{text:?}, {said:?}");
        }
    }
}

#[test]
fn words_and_tokens_are_kept_out_or_forced() {
    let plain = &rows("instruct-llama", &["caption", "--json", "--beams", "1", "--max-new-tokens", "8", &sample(0)])[0];
    let tokens: Vec<String> = plain["tokens"].as_array().unwrap().iter().map(Value::to_string).collect();
    let with = |options: &[&str]| {
        let picture = sample(0);
        let args = [&["caption", "--json", "--beams", "1", "--max-new-tokens", "8"], options, &[&picture]].concat();
        let row = rows("instruct-llama", &args).remove(0);
        row["tokens"].as_array().unwrap().iter().map(Value::to_string).collect::<Vec<String>>()
    };
    assert!(!with(&["--suppress-tokens", &tokens[2]]).contains(&tokens[2]));
    assert_ne!(with(&["--begin-suppress-tokens", &tokens[0]])[0], tokens[0]);
    let forced = with(&["--forced-eos-tokens", "2"]);
    assert!(forced.last().unwrap() == "2", "{forced:?}");
    fails("instruct-llama", &["caption", "--stop", "", &sample(0)], 2, "need a text");
}

#[test]
fn a_question_changes_what_the_qformer_sees_and_questions_together_get_the_answers_they_get_alone() {
    for name in ["vqa-opt", "instruct-llama"] {
        let questions = ["what colour is the star?", "how many?", "where is the large red ring in the picture?"];
        let together = rows(name, &["ask", "--json", &sample(0), questions[0], questions[1], questions[2]]);
        for (row, question) in together.iter().zip(questions) {
            assert_eq!(row["tokens"], rows(name, &["ask", "--json", &sample(0), question])[0]["tokens"], "{name}");
        }
    }
    // The language model reads the same both times; what differs came through the Q-Former, which reads the question.
    let raw =
        |question: &str| rows("vqa-opt", &["ask", "--json", "--prompt", "a red star", &sample(0), question])[0]["tokens"].clone();
    assert_ne!(raw("what colour is the star?"), raw("where is the large red ring in the picture?"));
    fails("instruct-llama", &["ask", "--prompt", "a red star", &sample(0), "what?"], 2, "needs one {}");
}

#[test]
fn several_texts_are_put_in_order_by_another_bundle() {
    let options = ["--beams", "4", "--num-return", "4", "--rerank", "itm", "--itm-model", &bundle("stage1")];
    let row = &rows("t5", &[&["caption", "--json"], &options[..], &[&sample(0)]].concat())[0];
    let candidates = row["candidates"].as_array().unwrap();
    let found: Vec<f64> = candidates.iter().map(|candidate| number(candidate, "itm_probability")).collect();
    assert!(found.len() == 4 && found.is_sorted_by(|a, b| a >= b), "{found:?}");
    for key in ["text", "tokens", "score", "finish_reason"] {
        assert_eq!(row[key], candidates[0][key], "{key}");
    }
    let both = ["caption", "--json", "--num-return", "2", "--log-probs", "1"];
    fails("t5", &[&both[..], &options[4..], &[&sample(0)]].concat(), 2, "cannot be used with");
    let text = candidates[0]["text"].as_str().unwrap();
    let matched = &rows("stage1", &["match", "--json", &sample(0), text])[0];
    assert!((number(matched, "itm_probability") - found[0]).abs() < 1e-5);
    fails("t5", &["caption", "--rerank", "itm", &sample(0)], 2, "--itm-model");
    let itself = ["caption", "--num-return", "2", "--rerank", "itm", "--itm-model", &bundle("t5"), &sample(0)];
    fails("t5", &itself, 4, "cannot match");
}
