//! Bundles that are wrong, by accident or on purpose: each is refused in one sentence, or is as good as before.
//!
//! The mutations are made from the bundles of `tests/bundles`, fact by fact. `BLIP2_FUZZ=N` makes one in N of them instead of one in
//! `STRIDE`.

#![allow(clippy::unwrap_used)]

use std::error::Error as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blip2::bundle::Bundle;
use blip2::runtime::{Provider, ProviderChoice, Runtime, RuntimeOptions};
use blip2::{Engine, Error, verify};
use serde_json::{Value, json};

const BUNDLES: [&str; 5] = ["instruct-llama", "int8-vqa-opt", "stage1", "t5", "vqa-opt"];
/// One mutation in so many is tried; together with the bundles' number it has no common divisor, so that every kind is met.
const STRIDE: usize = 29;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn stride() -> usize {
    std::env::var("BLIP2_FUZZ").ok().and_then(|text| text.parse().ok()).unwrap_or(STRIDE)
}

/// A copy of a bundle that goes away with its owner. Files are links to the original until they are written.
struct Scratch(PathBuf);

impl Scratch {
    fn of(name: &str) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name_here = format!("blip2-bundles-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let (from, to) = (root().join("tests/bundles").join(name), std::env::temp_dir().join(name_here).join("bundle"));
        std::fs::create_dir_all(to.join("golden")).unwrap();
        for folder in ["", "golden"] {
            for entry in std::fs::read_dir(from.join(folder)).unwrap() {
                let inside = Path::new(folder).join(entry.unwrap().file_name());
                if from.join(&inside).is_file() && std::fs::hard_link(from.join(&inside), to.join(&inside)).is_err() {
                    std::fs::copy(from.join(&inside), to.join(&inside)).unwrap();
                }
            }
        }
        Self(to)
    }

    fn bytes(&self, file: &str) -> Vec<u8> {
        std::fs::read(self.0.join(file)).unwrap()
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_slice(&self.bytes(file)).unwrap()
    }

    /// Writes a file anew; the original that it may be a link to stays as it is.
    fn put(&self, file: &str, content: &[u8]) {
        let _ = std::fs::remove_file(self.0.join(file));
        std::fs::write(self.0.join(file), content).unwrap();
    }

    /// Writes a file and says so in `bundle.json`, hash and all.
    fn list(&self, file: &str, content: &[u8]) {
        use sha2::Digest;
        self.put(file, content);
        let hash: String = sha2::Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
        self.edit(|facts| facts["files"][file] = json!({"bytes": content.len(), "sha256": hash}));
    }

    fn edit(&self, edit: impl FnOnce(&mut Value)) {
        let mut facts = self.json("bundle.json");
        edit(&mut facts);
        self.put("bundle.json", facts.to_string().as_bytes());
    }

    /// Leaves the records of one picture, and of texts at most so many tokens.
    fn shorten_records(&self, n_tokens: usize) {
        let mut golden = self.json("golden/golden.json");
        let cases = golden["cases"].as_array_mut().unwrap();
        cases.retain(|case| case["image"] == "golden/0.png");
        for case in cases.iter_mut().filter(|case| case["tokens"].as_array().is_some_and(|tokens| tokens.len() > n_tokens)) {
            case["max_new_tokens"] = json!(n_tokens);
            case["tokens"].as_array_mut().unwrap().truncate(n_tokens);
        }
        self.list("golden/golden.json", golden.to_string().as_bytes());
    }

    /// Opens the bundle and loads everything.
    #[track_caller]
    fn load(&self, what: &str) -> Result<Engine, String> {
        tried(what, || {
            let bundle = Bundle::open(&self.0)?;
            Engine::load(bundle, Runtime::load(&options()).unwrap())
        })
    }

    #[track_caller]
    fn refused(&self, said: &str) {
        let found = self.load(said).err().unwrap_or_else(|| panic!("not refused: {said}"));
        assert!(found.contains(said), "`{said}` is not in: {found}");
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.0.parent().unwrap());
    }
}

fn options() -> RuntimeOptions {
    RuntimeOptions { provider: ProviderChoice::Only(Provider::Cpu), threads: std::num::NonZeroUsize::new(1), ..Default::default() }
}

/// What came of it: something, or one sentence about the bundle. Nothing panics and nothing takes long.
#[track_caller]
fn tried<T>(what: &str, act: impl FnOnce() -> Result<T, Error>) -> Result<T, String> {
    let start = Instant::now();
    let found = catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_| panic!("panicked: {what}"));
    assert!(start.elapsed() < Duration::from_secs(60), "{what} took {:?}", start.elapsed());
    found.map_err(|error| {
        let blamed = match &error {
            Error::Bundle(_) => true,
            // A graph that asks for too much and a machine that has too little look alike.
            Error::Runtime(error) => {
                error.blames_the_bundle() || error.source().is_some_and(|e| e.to_string().contains("allocate memory"))
            }
            Error::Unavailable(_) => error.to_string().contains("needs ONNX Runtime"),
            _ => false,
        };
        let said = error.to_string();
        assert!(blamed && said.len() < 1500 && said.lines().count() == 1, "{what}: {said}");
        said
    })
}

fn blip2(args: &[&str], bundle: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.arg(args[0]).arg("--model").arg(bundle).args(["--provider", "cpu"]).args(&args[1..]);
    command.env_remove("BLIP2_MODEL").current_dir(root()).output().unwrap()
}

/// The binary must end with 4 and one line, or with 0.
#[track_caller]
fn ends_well(args: &[&str], bundle: &Path) -> bool {
    let output = blip2(args, bundle);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines = text.lines().count();
    assert!(matches!(output.status.code(), Some(0 | 4)), "{args:?}: {:?} {text}", output.status);
    assert!(!text.contains("panicked") && (lines == 1 || output.status.success()) && text.len() < 2000, "{text}");
    output.status.success()
}

/// What to change, and where.
struct Mutation {
    pointer: String,
    change: Change,
}

#[derive(Clone, Debug)]
enum Change {
    To(Value),
    Emptied,
    Doubled,
    Removed(String),
    Renamed(String),
    Twice(String),
}

impl Mutation {
    fn what(&self) -> String {
        let Self { pointer, change } = self;
        match change {
            Change::To(value) => format!("{pointer} = {value}"),
            Change::Removed(key) => format!("{pointer} {key} removed"),
            Change::Renamed(key) => format!("{pointer} {key} renamed"),
            Change::Twice(key) => format!("{pointer} {key} twice"),
            Change::Emptied | Change::Doubled => format!("{pointer} {change:?}").to_lowercase(),
        }
    }

    fn text(&self, document: &Value) -> String {
        let mut changed = document.clone();
        let place = changed.pointer_mut(&self.pointer).unwrap();
        match (&self.change, place) {
            (Change::To(value), place) => *place = value.clone(),
            (Change::Emptied, place) => *place = json!([]),
            (Change::Doubled, Value::Array(items)) => items.extend(items.clone()),
            (Change::Removed(key), Value::Object(entries)) => drop(entries.remove(key)),
            (Change::Renamed(key), Value::Object(entries)) => {
                let value = entries.remove(key).unwrap();
                entries.insert(format!("{key}s"), value);
            }
            (Change::Twice(key), Value::Object(entries)) => {
                entries.insert(format!("{key}@twice"), entries[key].clone());
            }
            (change, place) => panic!("{change:?} of {place}"),
        }
        changed.to_string().replace("@twice", "")
    }
}

/// Every value replaced by every other one; every key removed, renamed and doubled; every list emptied and doubled.
fn mutations(document: &Value) -> Vec<Mutation> {
    let others = [
        Value::Null,
        json!(true),
        json!(0),
        json!(1),
        json!(-1),
        json!(1u64 << 31),
        json!(1u64 << 53),
        json!(1u64 << 63),
        json!(1e308),
        json!(""),
        json!("x"),
        json!("../x"),
        json!([]),
        json!({}),
    ];
    let mut found = Vec::new();
    for pointer in pointers(document, String::new()) {
        let mut push = |change| found.push(Mutation { pointer: pointer.clone(), change });
        match document.pointer(&pointer).unwrap() {
            Value::Object(entries) => entries.keys().for_each(|key| {
                [Change::Removed, Change::Renamed, Change::Twice].into_iter().for_each(|change| push(change(key.clone())));
            }),
            Value::Array(items) if items.is_empty() => {}
            Value::Array(_) => [Change::Emptied, Change::Doubled].into_iter().for_each(push),
            value => others.iter().filter(|other| *other != value).for_each(|other| push(Change::To(other.clone()))),
        }
    }
    found
}

/// Every place in a document; of long lists of numbers the first two.
fn pointers(value: &Value, at: String) -> Vec<String> {
    let mut found = Vec::new();
    match value {
        Value::Object(entries) => entries.iter().for_each(|(key, value)| {
            found.extend(pointers(value, format!("{at}/{}", key.replace('~', "~0").replace('/', "~1"))));
        }),
        Value::Array(items) => {
            let n = if items.iter().all(Value::is_number) { 2 } else { items.len() };
            items.iter().take(n).enumerate().for_each(|(index, value)| found.extend(pointers(value, format!("{at}/{index}"))));
        }
        _ => {}
    }
    found.push(at);
    found
}

/// Changed facts that go unnoticed at open: for people to read, for a comparison with the reference to tell, or as good as before.
fn is_free(what: &str) -> bool {
    let free = [
        "/made_by",
        "/source",
        "/name =",
        "/target =",
        "/image/mean/",
        "/image/std/",
        "/image/rescale =",
        "/prompts/",
        "/prompts ",
        "/generation/",
        "/generation ",
        "/tasks",
        "/qformer/hidden =",
        "/qformer/temperature =",
        "/qformer temperature removed",
        "/qformer/text/max_tokens =",
        "/qformer/text/max_positions =",
        "/qformer/text/pad =",
        "/language/token_ids image removed",
        "/language/token_ids bos removed",
        "/language/token_ids pad removed",
        "/language/token_ids/",
        "/language/max_positions =",
        "/requires/domains doubled",
        "/files golden/",
        "/loss",
        " loss removed",
    ];
    free.iter().any(|free| what.starts_with(free))
}

#[test]
fn every_changed_fact_is_refused_or_cannot_be_told_from_a_right_one() {
    let tried = |(offset, name): (usize, &str)| {
        let (scratch, mut n_tried) = (Scratch::of(name), 0);
        let facts = scratch.json("bundle.json");
        for mutation in mutations(&facts).into_iter().skip(offset).step_by(stride()) {
            let what = mutation.what();
            scratch.put("bundle.json", mutation.text(&facts).as_bytes());
            n_tried += 1;
            let accepted = scratch.load(&format!("{name} {what}")).is_ok();
            assert!(!accepted || is_free(&what), "{name}: {what} goes unnoticed");
        }
        n_tried
    };
    let n_tried: usize = std::thread::scope(|threads| {
        let running: Vec<_> = BUNDLES.into_iter().enumerate().map(|bundle| threads.spawn(move || tried(bundle))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    println!("{n_tried} changed facts");
    assert!(n_tried > 400);
}

#[test]
fn every_changed_record_is_refused_or_turns_verify_red() {
    let free = ["/reference =", "/tolerance/", "/cosine", " cosine", "/agreement =", " agreement", "/cases/", "/cases doubled"];
    let mut n_tried = 0;
    for (offset, name) in BUNDLES.into_iter().enumerate() {
        let scratch = Scratch::of(name);
        scratch.shorten_records(usize::MAX);
        let mut engine = scratch.load(name).unwrap();
        let golden = scratch.json("golden/golden.json");
        for mutation in mutations(&golden).into_iter().skip(offset).step_by(stride()) {
            let what = mutation.what();
            scratch.put("golden/golden.json", mutation.text(&golden).as_bytes());
            n_tried += 1;
            let mut holds = true;
            let found = tried(&format!("{name} {what}"), || verify::run(&mut engine, |check| holds &= check.holds));
            let unnoticed = found.is_ok() && holds;
            assert!(!unnoticed || free.iter().any(|free| what.starts_with(free)), "{name}: {what} goes unnoticed");
        }
    }
    println!("{n_tried} changed records");
    assert!(n_tried > 100);
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    type Edit = fn(&mut Value);
    let edits: [(&str, Edit, &str); 8] = [
        ("vqa-opt", |t| t["model"]["type"] = json!("Wordy"), "tokenizer.json is not a tokenizer"),
        ("vqa-opt", |t| t["model"] = Value::Null, "tokenizer.json is not a tokenizer"),
        ("vqa-opt", |t| t["model"]["vocab"]["zzzz"] = json!(321), "but tokenizer.json has a token of id 321"),
        ("vqa-opt", |t| t["model"]["vocab"]["zzzz"] = json!(4_000_000_000u32), "but tokenizer.json has a token of id 4000000000"),
        ("vqa-opt", |t| t["model"]["vocab"]["zzzz"] = json!(1u64 << 40), "tokenizer.json is not a tokenizer"),
        ("vqa-opt", |t| t["model"]["vocab"] = json!({}), "tokenizer.json"),
        ("t5", |t| t["model"]["vocab"] = json!([]), "tokenizer.json"),
        ("t5", |t| t["model"]["unk_id"] = json!(1 << 30), "tokenizer.json"),
    ];
    for (name, edit, said) in edits {
        let scratch = Scratch::of(name);
        let mut tokenizer = scratch.json("tokenizer.json");
        edit(&mut tokenizer);
        scratch.list("tokenizer.json", tokenizer.to_string().as_bytes());
        scratch.refused(said);
    }
    let scratch = Scratch::of("t5");
    let mut tokenizer = scratch.json("tokenizer.json");
    tokenizer["added_tokens"].as_array_mut().unwrap().retain(|token| token["id"] != 143);
    tokenizer["model"]["vocab"].as_array_mut().unwrap().truncate(143);
    scratch.list("tokenizer.json", tokenizer.to_string().as_bytes());
    scratch.edit(|facts| facts["language"]["token_ids"]["eos"] = json!([143]));
    scratch.refused("end token 143, tokenizer.json has no such token");
    for name in ["vqa-opt", "stage1", "instruct-llama"] {
        let scratch = Scratch::of(name);
        let mut tokenizer = scratch.json("qformer_tokenizer.json");
        tokenizer["model"]["vocab"]["zzzz"] = json!(181);
        scratch.list("qformer_tokenizer.json", tokenizer.to_string().as_bytes());
        scratch.refused("but qformer_tokenizer.json has a token of id 181");
    }
}

#[test]
fn a_tokenizer_that_cuts_and_fills_up_changes_nothing() {
    let scratch = Scratch::of("vqa-opt");
    let mut tokenizer = scratch.json("tokenizer.json");
    tokenizer["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    let fill = json!({"Fixed": 40});
    let pad = json!({"strategy": fill, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"});
    tokenizer["padding"] = pad;
    scratch.list("tokenizer.json", tokenizer.to_string().as_bytes());
    let mut engine = scratch.load("cuts").unwrap();
    verify::run(&mut engine, |check| assert!(check.holds, "{}", check.what)).unwrap();
}

#[test]
fn damaged_tokenizers_and_graphs_are_refused_or_work() {
    let mut n_tried = 0;
    for name in BUNDLES {
        for file in ["tokenizer.json", "qformer_tokenizer.json"] {
            let scratch = Scratch::of(name);
            if !scratch.0.join(file).exists() {
                continue;
            }
            let (original, value) = (scratch.bytes(file), scratch.json(file));
            let cut = [0, 1, original.len() / 2, original.len() - 2].map(|n| original[..n].to_vec());
            let with_mark = [b"\xef\xbb\xbf", original.as_slice()].concat();
            let without = value.as_object().unwrap().keys().map(|key| {
                let mut less = value.clone();
                less.as_object_mut().unwrap().remove(key);
                less.to_string().into_bytes()
            });
            for (index, content) in cut.into_iter().chain([with_mark]).chain(without).enumerate() {
                scratch.list(file, &content);
                n_tried += 1;
                let _ = scratch.load(&format!("{name} {file} {index}"));
            }
        }
    }
    let mut seed = 7u64;
    let mut draw = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    for round in 0..2000 / stride() {
        let name = BUNDLES[round % BUNDLES.len()];
        let scratch = Scratch::of(name);
        let graphs: Vec<String> = scratch.json("bundle.json")["files"].as_object().unwrap().keys().cloned().collect();
        let graphs: Vec<&String> = graphs.iter().filter(|file| file.ends_with(".onnx")).collect();
        let file = graphs[draw(graphs.len())];
        let mut content = scratch.bytes(file);
        if round % 5 == 0 {
            content.truncate(draw(content.len()));
        } else {
            let at = draw(content.len());
            content[at] ^= 1 << draw(8);
        }
        scratch.list(file, &content);
        n_tried += 1;
        let what = format!("{name} {file} round {round}");
        scratch.shorten_records(2);
        let Ok(mut engine) = scratch.load(&what) else { continue };
        let _ = tried(&what, || verify::run(&mut engine, |_| ()));
    }
    println!("{n_tried} damaged tokenizers and graphs");
}

fn enlarge_vocabulary(facts: &mut Value, size: usize) {
    facts["language"]["vocab_size"] = json!(size);
    let outputs = facts["graphs"]["decoder"]["outputs"].as_array_mut().unwrap();
    let logits = outputs.iter_mut().find(|output| output["name"] == "logits").unwrap();
    logits["shape"][2] = json!(size);
}

#[test]
fn facts_that_no_graph_or_table_bears_out_are_refused() {
    type Edit = fn(&mut Value);
    let edits: [(&str, Edit, &str); 35] = [
        ("vqa-opt", |f| enlarge_vocabulary(f, 322), "the embedding table in decoder.onnx has 321 rows"),
        ("t5", |f| enlarge_vocabulary(f, 145), "the embedding table in decoder.onnx has 144 rows"),
        ("vqa-opt", |f| f["language"]["max_positions"] = json!(u64::MAX), "language.max_positions is 18446744073709551615"),
        ("vqa-opt", |f| f["language"]["max_positions"] = json!(129), "the table in decoder.onnx goes to 128"),
        ("instruct-llama", |f| f["language"]["max_positions"] = json!(257), "the table in decoder.onnx goes to 256"),
        ("stage1", |f| f["language"]["max_positions"] = json!(73), "the table in decoder.onnx goes to 72"),
        ("vqa-opt", |f| f["language"]["token_ids"]["image"] = json!(322), "image token id 322, the vocabulary has 321"),
        ("vqa-opt", |f| f["language"]["token_ids"]["pad"] = json!(321), "token id 321"),
        ("vqa-opt", |f| f["language"]["token_ids"]["bos"] = json!(321), "token id 321"),
        ("t5", |f| f["language"]["token_ids"]["decoder_start"] = json!(144), "token id 144"),
        ("t5", |f| f["language"]["token_ids"]["eos"] = json!([1, 1]), "each may stand there once"),
        ("stage1", |f| f["language"]["token_ids"]["bos"] = Value::Null, "no token_ids.bos"),
        ("vqa-opt", |f| f["qformer"]["text"]["max_tokens"] = json!(0), "qformer.text.max_tokens is 0, 1 to max_positions, 512"),
        ("vqa-opt", |f| f["qformer"]["text"]["max_tokens"] = json!(2), "an empty text has 2 tokens"),
        ("stage1", |f| f["qformer"]["text"]["max_tokens"] = json!(65), "qformer.text.max_tokens is 65"),
        (
            "stage1",
            |f| f["qformer"]["text"]["max_positions"] = json!(65),
            "qformer.text.max_positions is 65, the table in qformer_",
        ),
        ("vqa-opt", |f| f["qformer"]["text"]["max_positions"] = json!(513), "the table in qformer.onnx goes to 512"),
        ("vqa-opt", |f| f["qformer"]["text"]["pad"] = json!(181), "qformer.text.pad is 181, the table in qformer.onnx goes to 180"),
        ("vqa-opt", |f| f["qformer"]["text"]["reads"] = Value::Null, "nothing of qformer.text.reads"),
        ("stage1", |f| f["qformer"]["text"]["reads"] = json!("prompt"), "qformer.text.reads, but in family qformer"),
        ("t5", |f| f["language"]["kv_cache"]["n_layers"] = json!(1_000_000_000), "kv_cache.n_layers is 1000000000"),
        ("t5", |f| f["language"]["kv_cache"]["n_layers"] = json!(1), "decoder has an input `past_key_values.1.key`"),
        ("t5", |f| f["language"]["kv_cache"]["past_key"] = json!("past_key_values.0.key"), "a {} must stand in it"),
        ("t5", |f| f["language"]["kv_cache"]["past_key"] = f["language"]["kv_cache"]["past_value"].clone(), "decoder"),
        (
            "t5",
            |f| {
                let cache = &mut f["language"]["kv_cache"];
                let key = cache["past_key"].take();
                cache["past_key"] = cache["past_value"].take();
                cache["past_value"] = key;
            },
            "no node of decoder.onnx does that",
        ),
        ("vqa-opt", |f| f["requires"]["onnxruntime"] = json!("one"), "a version is two numbers"),
        ("vqa-opt", |f| f["requires"]["opset"] = json!(20), "opset 20 in `requires`, the graphs use 21"),
        ("vqa-opt", |f| f["requires"]["domains"] = json!([""]), "the graphs use `com.microsoft` besides"),
        ("vqa-opt", |f| f["generation"]["ask"]["beams"] = json!(1_000_000), "generation.ask.beams is 1000000"),
        ("vqa-opt", |f| f["generation"]["ask"]["min_new_tokens"] = json!(11), "generation.ask.min_new_tokens is 11"),
        ("vqa-opt", |f| f["generation"]["ask"]["length_penalty"] = json!(1e308), "generation.ask.length_penalty is inf"),
        ("vqa-opt", |f| f["prompts"]["caption"] = json!("word ".repeat(500)), "a prompt for task caption, but the prompt has"),
        ("vqa-opt", |f| f["image"]["rescale"] = json!(0), "which cannot normalise a pixel"),
        ("vqa-opt", |f| f["image"]["resize"] = json!({"shortest_edge": 30}), "without center_crop that never makes 28×28"),
        (
            "vqa-opt",
            |f| f["image"]["resize"] = json!({"exact": {"width": 1 << 30, "height": 28}}),
            "image.resize to [1073741824, 28]",
        ),
    ];
    for (name, edit, said) in edits {
        let scratch = Scratch::of(name);
        scratch.edit(edit);
        scratch.refused(said);
    }
}

#[test]
fn json_that_readers_could_understand_differently_is_refused() {
    let scratch = Scratch::of("t5");
    let text = String::from_utf8(scratch.bytes("bundle.json")).unwrap();
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let cases = [
        (text.replacen("\"bytes\":", "\"bytes\": 1, \"bytes\":", 1), "duplicate field `bytes`"),
        (
            text.replacen("\"files\": {", "\"files\": {\"decoder.onnx\": {\"bytes\": 1, \"sha256\": \"\"},", 1),
            "the same key stands there twice",
        ),
        (format!("\u{feff}{text}"), "bundle.json is not valid"),
        (format!("{text} {{}}"), "trailing characters"),
        (text.replacen("28", "NaN", 1), "bundle.json is not valid"),
        (text.replacen("0.48145466", "1e999", 1), "`image.mean[0]`: number out of range"),
        (text.replacen("\"size\": 28", "\"size\": null", 1), "`image.size`: invalid type: null, expected u32"),
        (text.replacen("\"name\": \"t5\"", &format!("\"name\": {deep}"), 1), "bundle.json is not valid"),
    ];
    for (text, said) in cases {
        scratch.put("bundle.json", text.as_bytes());
        scratch.refused(said);
    }
}

#[test]
fn nothing_outside_the_folder_is_read_and_nothing_without_end() {
    let outside = ["../../etc/passwd", "/etc/security/pw", "./vision.onn.dat", "vision.onnx.dats"];
    for location in outside {
        let scratch = Scratch::of("t5");
        let content = scratch.bytes("vision.onnx");
        scratch.list("vision.onnx", &replaced(&content, b"vision.onnx.data", location.as_bytes()));
        scratch.refused(&format!("lie in `{location}`, which bundle.json does not list"));
    }
    let scratch = Scratch::of("t5");
    scratch.edit(|facts| drop(facts["files"].as_object_mut().unwrap().remove("vision.onnx.data")));
    scratch.refused("lie in `vision.onnx.data`, which bundle.json does not list");

    let scratch = Scratch::of("t5");
    let content = scratch.bytes("vision.onnx");
    for (digits, said) in [(b"99999", "bytes from 99999 on, but that has 66304 bytes"), (b"-9999", "at an offset or of a length")] {
        let at = content.windows(9).position(|window| window == b"\x0a\x06offset\x12").unwrap();
        let last = content.windows(10).rposition(|window| window == b"\x0a\x06offset\x12\x05").unwrap();
        assert!(at < last, "the last weights lie at an offset of five digits");
        scratch.list("vision.onnx", &[&content[..last + 10], digits, &content[last + 15..]].concat());
        scratch.refused(said);
    }

    for name in ["*/x", "a\\b", "/etc/passwd", "../t5/vision.onnx", "a/../../x", "", "x/", "a\nb"] {
        let scratch = Scratch::of("t5");
        scratch.edit(|facts| facts["files"][name] = json!({"bytes": 1, "sha256": "0".repeat(64)}));
        scratch.refused("which is not inside the bundle");
    }
    for file in ["bundle.json", "tokenizer.json", "vision.onnx.data"] {
        #[cfg(unix)]
        {
            let scratch = Scratch::of("t5");
            let elsewhere = scratch.0.parent().unwrap().join("elsewhere");
            std::fs::rename(scratch.0.join(file), &elsewhere).unwrap();
            std::os::unix::fs::symlink(&elsewhere, scratch.0.join(file)).unwrap();
            scratch.refused(&format!("{file} is a link that leaves the bundle"));
            std::fs::remove_file(scratch.0.join(file)).unwrap();
            assert!(Command::new("mkfifo").arg(scratch.0.join(file)).status().unwrap().success());
            scratch.refused(&format!("{file} is not a file"));
        }
        let scratch = Scratch::of("t5");
        let large = std::fs::File::create(scratch.0.join("large")).unwrap();
        large.set_len(1 << 40).unwrap();
        std::fs::rename(scratch.0.join("large"), scratch.0.join(file)).unwrap();
        scratch.refused("bytes");
        if file != "bundle.json" {
            scratch.edit(|facts| facts["files"][file]["bytes"] = json!(1u64 << 40));
            assert!(file == "vision.onnx.data" || scratch.load(file).err().unwrap().contains("at most"));
        }
    }
}

fn replaced(content: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = content.windows(from.len()).position(|window| window == from).unwrap();
    [&content[..at], to, &content[at + from.len()..]].concat()
}

#[test]
fn graphs_are_lists_of_nodes_that_the_facts_announce() {
    // Protobuf messages of one field that stands once are merged when a file has it twice, so that fields can be added at the end.
    let node = |op: &str, attribute: &[u8]| {
        let attribute = [&[0x2a, attribute.len() as u8], attribute].concat();
        let node = [&[0x22, op.len() as u8], op.as_bytes(), &attribute].concat();
        [&[0x3a, node.len() as u8 + 2, 0x0a, node.len() as u8], node.as_slice()].concat()
    };
    let tensor = [b"\x42\x01w\x6a\x0f\x0a\x08location\x12\x03../".as_slice(), b"\x70\x01"].concat();
    let constant = [&[0x2a, tensor.len() as u8], tensor.as_slice()].concat();
    let cases = [
        (node("If", b"\x32\x00"), "has a node If that this engine does not run"),
        (node("Loop", b"\x5a\x00"), "has a node Loop that this engine does not run"),
        (node("EPContext", b""), "has a node EPContext that this engine does not run"),
        (node("Constant", b"\xb2\x01\x00"), "has a node Constant that this engine does not run"),
        (node("Constant", &constant), "weights `w` lie in `../`, which bundle.json does not list"),
        (b"\x3a\x02\x7a\x00".to_vec(), "has sparse weights"),
        (b"\xca\x01\x00".to_vec(), "has functions or training information"),
        (b"\xa2\x01\x00".to_vec(), "has functions or training information"),
        (b"\x42\x02\x10\x16".to_vec(), "opset 21 in `requires`, the graphs use 22"),
        (b"\x42\x05\x0a\x01x\x10\x01".to_vec(), "the graphs use `x` besides"),
        (b"\x3a\x7f".to_vec(), "is not an ONNX file"),
    ];
    for (added, said) in cases {
        let scratch = Scratch::of("stage1");
        let content = scratch.bytes("qformer.onnx");
        scratch.list("qformer.onnx", &[content, added].concat());
        scratch.refused(said);
    }
    let scratch = Scratch::of("stage1");
    scratch.list("vision.ort", &scratch.bytes("vision.onnx"));
    scratch.edit(|facts| facts["graphs"]["vision"]["file"] = json!("vision.ort"));
    scratch.refused("graphs are .onnx files");
    let scratch = Scratch::of("stage1");
    scratch.list("vision.onnx", &vec![0; 17 << 20]);
    scratch.refused("vision.onnx has 17825792 bytes, at most 8388608 are read");
}

#[test]
fn graphs_in_each_others_place_are_refused() {
    for name in BUNDLES {
        let scratch = Scratch::of(name);
        let facts = scratch.json("bundle.json");
        let graphs: Vec<&String> = facts["graphs"].as_object().unwrap().keys().collect();
        for (at, one) in graphs.iter().enumerate() {
            for other in &graphs[at + 1..] {
                let mut swapped = facts.clone();
                swapped["graphs"][one]["file"] = facts["graphs"][other]["file"].clone();
                swapped["graphs"][other]["file"] = facts["graphs"][one]["file"].clone();
                scratch.put("bundle.json", swapped.to_string().as_bytes());
                assert!(scratch.load(one).is_err(), "{name}: {one} and {other}");
            }
        }
    }
}

#[test]
fn records_that_prove_nothing_are_refused() {
    type Edit = fn(&mut Value);
    let edits: [(&str, Edit, &str); 21] = [
        ("t5", |g| g["agreement"] = json!(0.9), "allows for fewer bits, but every graph is float32"),
        ("t5", |g| g["cosine"] = json!({"features": 0.9}), "allows for fewer bits, but every graph is float32"),
        ("int8-vqa-opt", |g| g["agreement"] = json!(1.5), "agreement is 1.5, 0 to 1 are possible"),
        ("int8-vqa-opt", |g| g["cosine"]["features"] = json!(-1), "cosine of features is -1, 0 to 1 are possible"),
        ("int8-vqa-opt", |g| g["cosine"]["colour"] = json!(0.9), "has a tolerance for colour"),
        ("int8-vqa-opt", |g| g["tolerance"]["features"] = json!(0.6), "tolerance for features is 0.6, 0 to 0.5 are possible"),
        ("t5", |g| g["cases"] = json!([]), "has no case of task caption"),
        ("t5", |g| g["cases"].as_array_mut().unwrap().retain(|case| case["task"] == "ask"), "has no case of task caption"),
        ("t5", |g| g["format_version"] = json!(2), "format version 2, this engine reads version 1"),
        ("t5", |g| g["note"] = json!(""), "unknown field `note`"),
        ("t5", |g| g["cases"][0]["note"] = json!(""), "unknown field `note`"),
        ("t5", |g| drop(g["tolerance"].as_object_mut().unwrap().remove("queries")), "has no tolerance for queries"),
        ("t5", |g| g["tolerance"]["colour"] = json!(0.1), "has a tolerance for colour"),
        ("t5", |g| g["tolerance"]["features"] = json!(-0.1), "tolerance for features is -0.1"),
        ("t5", |g| g["tolerance"]["features"] = json!(1e30), "tolerance for features is 1"),
        ("t5", |g| g["cases"][0]["features"]["shape"] = json!([u64::MAX, 2]), "features is of shape"),
        ("t5", |g| g["cases"][0]["queries"] = g["cases"][0]["features"].clone(), "queries is of shape [5, 32]"),
        (
            "t5",
            |g| g["cases"][0]["pixels"]["file"] = json!("golden/0.png"),
            "cases[0]: pixels of shape [3, 28, 28] takes 9408 bytes",
        ),
        ("t5", |g| g["cases"][0]["image"] = json!("../x.png"), "picture ../x.png, which bundle.json does not list"),
        ("t5", |g| g["cases"][0]["prompt_ids"] = json!([144]), "prompt_ids has token 144"),
        ("vqa-opt", |g| g["cases"][0]["question_ids"] = json!([181]), "question_ids has token 181"),
    ];
    for (name, edit, said) in edits {
        let scratch = Scratch::of(name);
        let mut golden = scratch.json("golden/golden.json");
        edit(&mut golden);
        scratch.list("golden/golden.json", golden.to_string().as_bytes());
        let mut engine = scratch.load(said).unwrap();
        let found = tried(said, || verify::run(&mut engine, |_| ())).err().unwrap_or_else(|| panic!("not refused: {said}"));
        assert!(found.contains(said), "`{said}` is not in: {found}");
    }
    let scratch = Scratch::of("t5");
    let mut content = scratch.bytes("golden/0.features.bin");
    content[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    scratch.list("golden/0.features.bin", &content);
    let found = tried("NaN", || verify::run(&mut scratch.load("NaN").unwrap(), |_| ())).unwrap_err();
    assert!(found.contains("golden/0.features.bin: holds values that are not numbers"), "{found}");
}

#[test]
fn precisions_and_losses_that_cannot_be_are_refused() {
    type Edit = fn(&mut Value);
    let edits: [(&str, Edit, &str); 14] = [
        ("vqa-opt", |f| f["graphs"]["vision"]["precision"] = json!("int7"), "unknown variant `int7`"),
        (
            "vqa-opt",
            |f| f["graphs"]["vision"]["precision"] = json!("int8"),
            "graphs.vision.weight_bits is nothing, but the precision is int8",
        ),
        (
            "vqa-opt",
            |f| f["graphs"]["vision"]["weight_bits"] = json!(8),
            "graphs.vision.weight_bits is 8, but the precision is float32",
        ),
        ("int8-vqa-opt", |f| f["graphs"]["decoder"]["weight_bits"] = json!(4), "graphs.decoder.weight_bits is 4"),
        (
            "int8-vqa-opt",
            |f| f["graphs"]["decoder"]["block_size"] = json!(32),
            "graphs.decoder.block_size is 32, but the precision is int8",
        ),
        ("vqa-opt", |f| f["graphs"]["decoder"]["precision"] = json!("int4-blocks"), "graphs.decoder.block_size is nothing"),
        (
            "vqa-opt",
            |f| f["graphs"]["decoder"].as_object_mut().unwrap().extend(blocks(24)),
            "graphs.decoder.block_size is 24, but the precision is int8-blocks, which needs a power of two from 16 to 256",
        ),
        ("int8-vqa-opt", |f| f["loss"]["pictures"] = json!(0), "loss.pictures is 0"),
        ("int8-vqa-opt", |f| f["loss"]["tokens"]["agree"] = json!(1.01), "loss.tokens.agree is 1.01, 0 to 1 are possible"),
        ("int8-vqa-opt", |f| f["loss"]["stages"]["queries"]["alone"]["error"] = json!(-1), "loss.stages.queries.alone.error is -1"),
        ("int8-vqa-opt", |f| f["loss"]["stages"]["queries"]["end_to_end"]["cosine"] = json!(2), "end_to_end.cosine is 2, -1 to 1"),
        ("int8-vqa-opt", |f| f["loss"]["perplexity"]["bundle"] = json!(0.5), "loss.perplexity is 0.5"),
        (
            "int8-vqa-opt",
            |f| f["loss"]["tasks"] = json!({"captions_true": {"float32": 1.0, "bundle": 90}}),
            "loss.tasks.captions_true is 90",
        ),
        ("vqa-opt", |f| f["loss"] = json!({"pictures": 1, "stages": {}}), "a loss against float32, but every graph is float32"),
    ];
    for (name, edit, said) in edits {
        let scratch = Scratch::of(name);
        scratch.edit(edit);
        scratch.refused(said);
    }
}

fn blocks(size: usize) -> serde_json::Map<String, Value> {
    json!({"precision": "int8-blocks", "block_size": size}).as_object().unwrap().clone()
}

#[test]
fn verify_holds_a_bundle_of_fewer_bits_to_what_its_conversion_measured() {
    // Of some whole numbers the sign turns: where in a file, in percent, and the first stage that tells.
    let damages = [
        ("int8-vqa-opt", "vision.onnx.data", 90, "features"),
        ("int8-vqa-opt", "qformer.onnx.data", 90, "queries"),
        ("int8-vqa-opt", "decoder.onnx.data", 80, "first_logits"),
        ("int8-stage1", "vision.onnx.data", 90, "features"),
        ("int8-stage1", "qformer.onnx.data", 1, "queries"),
    ];
    for (name, file, percent, stage) in damages {
        let scratch = Scratch::of(name);
        let before = wrong(&mut scratch.load(name).unwrap());
        assert!(before.is_empty(), "{name}: {before:?}");
        let mut content = scratch.bytes(file);
        let from = content.len() * percent / 100;
        content[from..from + 512].iter_mut().for_each(|byte| *byte = byte.wrapping_neg());
        scratch.list(file, &content);
        let found = wrong(&mut scratch.load(name).unwrap());
        assert!(found.first().is_some_and(|what| what.ends_with(stage)), "{name}: {file}: {found:?}");
    }
}

/// The comparisons of a bundle with its records that do not hold.
fn wrong(engine: &mut Engine) -> Vec<String> {
    let mut wrong = Vec::new();
    verify::run(engine, |check| wrong.extend((!check.holds).then_some(check.what))).unwrap();
    wrong
}

#[test]
fn the_binary_ends_with_4_and_one_line() {
    let picture = root().join("models/samples/0.png");
    let picture = picture.to_str().unwrap();
    let scratch = Scratch::of("vqa-opt");
    let original = scratch.bytes("vision.onnx");
    let mut outcomes = [0, 0];
    for at in (0..original.len()).step_by(original.len() / 6) {
        let mut content = original.clone();
        content[at] ^= 0x10;
        scratch.list("vision.onnx", &content);
        outcomes[usize::from(ends_well(&["caption", picture], &scratch.0))] += 1;
    }
    scratch.list("vision.onnx", &original);
    let facts = scratch.json("bundle.json");
    for mutation in mutations(&facts).into_iter().step_by(stride() * 40) {
        scratch.put("bundle.json", mutation.text(&facts).as_bytes());
        outcomes[usize::from(ends_well(&["verify"], &scratch.0))] += 1;
    }
    println!("{} refused, {} as before", outcomes[0], outcomes[1]);
    assert!(outcomes[0] > 3);
}

#[test]
fn verify_says_what_it_did_not_compare_and_names_files_that_nothing_lists() {
    let scratch = Scratch::of("t5");
    scratch.put("golden/left over.bin", b"x");
    scratch.put("notes.txt", b"x");
    let output = blip2(&["verify"], &scratch.0);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && text.lines().count() == 2, "{text}");
    assert!(text.contains("\"golden/left over.bin\" is not listed") && text.contains("\"notes.txt\" is not listed"), "{text}");
    scratch.edit(|facts| facts["files"].as_object_mut().unwrap().retain(|file, _| !file.starts_with("golden/")));
    let output = blip2(&["verify"], &scratch.0);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("outputs are not compared") && !text.contains("gives what"), "{text}");
}

#[test]
fn a_graph_that_gives_another_shape_than_it_declares_is_refused_when_it_runs() {
    let scratch = Scratch::of("stage1");
    let (batch, sequence) = (b"\x0a\x07\x12\x05batch".as_slice(), b"\x0a\x0a\x12\x08sequence".as_slice());
    let (true_axes, false_axes) = ([batch, sequence].concat(), [sequence, batch].concat());
    let mut graph = scratch.bytes("qformer_text.onnx");
    for _output in 0..2 {
        let at = graph.windows(true_axes.len()).rposition(|window| window == true_axes).unwrap();
        graph[at..at + false_axes.len()].copy_from_slice(&false_axes);
    }
    scratch.list("qformer_text.onnx", &graph);
    scratch.edit(|facts| {
        for output in facts["graphs"]["qformer_text"]["outputs"].as_array_mut().unwrap() {
            output["shape"].as_array_mut().unwrap().swap(0, 1);
        }
    });
    let mut engine = scratch.load("axes in another order").unwrap();
    let found = tried("axes in another order", || engine.seer().embed_texts(&["a red star"])).unwrap_err();
    let said = ["qformer_text: `text_embeds` came out as [1, ", ", 24], the bundle says float32 [sequence, batch, 24]"];
    assert!(said.iter().all(|said| found.contains(said)), "{found}");
}

#[test]
fn ranges_of_sizes_are_those_of_the_graph_or_refused() {
    let scratch = Scratch::of("vqa-opt");
    let profile = |facts: &mut Value, graph: &str, ranges: Value| facts["graphs"][graph]["profile"] = ranges;
    scratch.edit(|facts| {
        profile(facts, "vision", json!({"batch": [1, 2, 16]}));
        profile(facts, "qformer", json!({"batch": [1, 1, 16], "question": [1, 8, 64]}));
    });
    assert!(scratch.load("ranges").is_ok(), "the processor has no use for them, and no limit");
    let wrong: [(Value, &str); 5] = [
        (json!({"rows": [1, 1, 1]}), "sizes that are not fixed are {\"batch\"}"),
        (json!({"batch": [1, 1, 1], "question": [1, 1, 1]}), "sizes that are not fixed are {\"batch\"}"),
        (json!({"batch": [2, 1, 16]}), "a least, a best and a largest size"),
        (json!({"batch": [0, 1, 16]}), "a least, a best and a largest size"),
        (json!({"batch": [1, 1]}), "invalid length 2"),
    ];
    for (ranges, said) in wrong {
        scratch.edit(|facts| profile(facts, "vision", ranges));
        scratch.refused(said);
    }
}

#[test]
fn engines_are_built_of_graphs_that_are_made_for_them_and_for_tensorrt_alone() {
    let scratch = Scratch::of("vqa-opt");
    let build = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.arg("build").arg("--model").arg(&scratch.0).args(more).env_remove("BLIP2_PROVIDER");
        let output = command.current_dir(root()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = build(&[]);
    assert!(code == Some(2) && said.contains("`convert --target tensorrt` makes some"), "{said}");
    scratch.edit(|facts| facts["graphs"]["vision"]["profile"] = json!({"batch": [1, 1, 16]}));
    let (code, said) = build(&["--provider", "cpu"]);
    assert!(code == Some(2) && said.contains("nothing is built for cpu"), "{said}");
    let (code, said) = build(&[]);
    // Where there is a TensorRT, it may build.
    assert!(code == Some(0) || (code == Some(5) && said.contains("provider `tensorrt` is not usable here")), "{said}");
}
