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
    command.arg(name).args(["--model", &bundle(model)]).args(rest).env_remove("BLIP2_MODEL").current_dir(root());
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
    std::fs::remove_file(&file).unwrap();
    fails("stage1", &["embed", "image", "--npy", &file, &sample(0), "missing.png"], 3, "missing.png");
    assert!(!Path::new(&file).exists(), "an array with a row too few would be taken for the whole");
    fails("stage1", &["embed", "text", "--npy", "/nowhere/x.npy", "a"], 1, "cannot be written");
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
        // The language model reads the same both times; what differs came through the Q-Former.
        let raw =
            |question: &str| rows(name, &["ask", "--json", "--prompt", "a red star", &sample(0), question])[0]["tokens"].clone();
        let differs = raw(questions[0]) != raw(questions[2]);
        assert_eq!(differs, name == "vqa-opt", "{name}: InstructBLIP's Q-Former reads the prompt, BLIP-2's the question");
    }
}

#[test]
fn several_texts_are_put_in_order_by_another_bundle() {
    let options = ["--beams", "4", "--num-return", "4", "--rerank", "itm", "--itm-model", &bundle("stage1")];
    let row = &rows("t5", &[&["caption", "--json"], &options[..], &[&sample(0)]].concat())[0];
    let candidates = row["candidates"].as_array().unwrap();
    let found: Vec<f64> = candidates.iter().map(|candidate| number(candidate, "itm_probability")).collect();
    assert!(found.len() == 4 && found.is_sorted_by(|a, b| a >= b), "{found:?}");
    assert_eq!(row["text"], candidates[0]["text"]);
    let text = candidates[0]["text"].as_str().unwrap();
    let matched = &rows("stage1", &["match", "--json", &sample(0), text])[0];
    assert!((number(matched, "itm_probability") - found[0]).abs() < 1e-5);
    fails("t5", &["caption", "--rerank", "itm", &sample(0)], 2, "--itm-model");
    fails("t5", &["caption", "--rerank", "itm", "--itm-model", &bundle("t5"), &sample(0)], 4, "cannot match");
}
