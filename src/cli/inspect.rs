//! `blip2 inspect [BUNDLE]`

use std::io::{Write as _, stdout};

use super::Failure;
use super::args::Inspect;
use crate::bundle::{Bundle, Compared, Difference, Facts, GraphFacts, LanguageFacts, Load, LossFacts, Reckoning, StageLoss};
use crate::error::Error;
use crate::pixels::Preprocess;

pub(super) fn run(command: &Inspect) -> Result<(), Failure> {
    let folder = command.bundle.clone().unwrap_or_else(|| command.model.path());
    let bundle = Bundle::open(&folder).map_err(Error::from)?;
    let mut out = stdout().lock();
    if command.json {
        let text = std::fs::read_to_string(bundle.path("bundle.json"))?;
        let value: serde_json::Value = serde_json::from_str(&text).map_err(std::io::Error::from)?;
        return Ok(writeln!(out, "{value}")?);
    }
    if command.memory {
        let load = Load { batch: command.batch as u64, rows: None, new_tokens: None };
        for (key, value) in memory(&bundle.memory(load).map_err(Error::from)?, command.batch) {
            writeln!(out, "{key:24} {value}")?;
        }
        return Ok(());
    }
    for (key, value) in rows(bundle.facts()) {
        writeln!(out, "{key:12} {value}")?;
    }
    Ok(())
}

fn memory(reckoning: &Reckoning, batch: usize) -> Vec<(String, String)> {
    let mb = |bytes: u64| format!("{:10.1} MB", bytes as f64 / 1e6);
    let Reckoning { program, weights, loading, activations, texts, row, position, rows, .. } = reckoning;
    let mut lines = vec![("program".to_owned(), mb(*program))];
    lines.extend(weights.iter().map(|(graph, bytes)| (format!("weights of {graph}"), mb(*bytes))));
    lines.push(("preparing weights".into(), format!("{}, until they are loaded", mb(*loading))));
    lines.extend(activations.iter().map(|(graph, bytes)| (format!("between nodes of {graph}"), mb(*bytes))));
    if *row > 0 {
        let of = format!("{} for a row, {:.1} kB for a position of it", mb(*row).trim(), *position as f64 / 1e3);
        lines.push(("keys, values, logits".into(), format!("{} for {rows} rows: {of}", mb(*texts))));
    }
    lines.push(("peak".into(), format!("{} with a batch of {batch}", mb(reckoning.peak()))));
    lines
}

fn rows(facts: &Facts) -> Vec<(String, String)> {
    let Facts { vision, qformer, .. } = facts;
    let mut rows = vec![
        ("name", format!("{} ({}, format version {}, for {})", facts.name, facts.family, facts.format_version, facts.target)),
        ("tasks", listed(facts.tasks.iter())),
        ("image", image(&facts.image)),
        ("vision", format!("{} positions of width {}", vision.n_positions, vision.hidden)),
        ("qformer", format!("{} query tokens of width {}", qformer.n_queries, qformer.hidden)),
    ];
    if let Some(text) = &qformer.text {
        let joint = qformer.joint.map_or(String::new(), |joint| format!(", compares in {joint} dimensions"));
        rows.push(("reads", format!("texts of up to {} tokens{joint}", text.max_positions)));
    }
    if let Some(language) = &facts.language {
        rows.extend(language_rows(language));
    }
    let needs = &facts.requires;
    rows.push(("needs", format!("ONNX Runtime {} or later, opset {}", needs.onnxruntime, needs.opset)));
    rows.push(("source", pairs(facts.source.iter())));
    rows.push(("made by", pairs(facts.made_by.iter())));
    let mut rows: Vec<(String, String)> = rows.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    for (task, prompt) in &facts.prompts {
        let Some(defaults) = facts.generation.get(task) else { continue };
        let search = match defaults.beams {
            1 => "greedy search".into(),
            beams => format!("{beams} beams, length penalty {}", defaults.length_penalty),
        };
        rows.push((format!("{task}"), format!("prompt {prompt:?}, {} new tokens at most, {search}", defaults.max_new_tokens)));
    }
    rows.extend(graph_rows(facts));
    rows.extend(facts.loss.iter().flat_map(loss_rows));
    let bytes: u64 = facts.files.values().map(|file| file.bytes).sum();
    rows.push(("size".into(), format!("{:.1} MB in {} files", bytes as f64 / 1e6, facts.files.len())));
    rows
}

fn graph_rows(facts: &Facts) -> Vec<(String, String)> {
    let row = |(name, graph): (&String, &GraphFacts)| {
        let data = facts.files.get(&format!("{}.data", graph.file)).map_or(0, |file| file.bytes) as f64 / 1e6;
        (name.clone(), format!("{}, computes in {}, {data:.1} MB of weights", graph.file, graph.computes_in()))
    };
    facts.graphs.iter().map(row).collect()
}

/// Every stage alone and from the picture on, and what is written.
fn loss_rows(loss: &LossFacts) -> Vec<(String, String)> {
    let mut rows =
        vec![("loss".to_owned(), format!("against float32, measured on {} pictures that calibration did not see", loss.pictures))];
    let mut row = |what: &str, said: String| rows.push((String::new(), format!("{what:18} {said}")));
    row("stage", format!("{:38} {}", "alone: error, cosine (least)", "from the picture on"));
    for (stage, StageLoss { alone, end_to_end }) in &loss.stages {
        row(stage, format!("{:38} {}", difference(alone), difference(end_to_end)));
    }
    if let Some(tokens) = loss.tokens {
        row("tokens", format!("{:.1} % of {} are chosen as in float32", 100.0 * tokens.agree, tokens.compared));
    }
    if let Some(Compared { float32, bundle }) = loss.perplexity {
        row("perplexity", format!("{bundle:.3}, in float32 {float32:.3}"));
    }
    for (task, Compared { float32, bundle }) in &loss.tasks {
        row(task, format!("{:.1} %, in float32 {:.1} %", 100.0 * bundle, 100.0 * float32));
    }
    rows
}

fn difference(of: &Difference) -> String {
    format!("{:.2} %, {:.5} ({:.5})", 100.0 * of.error, of.cosine, of.least_cosine)
}

fn image(image: &Preprocess) -> String {
    let Preprocess { size, resize, alpha, resample, mean, std, .. } = image;
    let crop = if image.center_crop { ", middle cut out" } else { "" };
    format!("{size}×{size}, {resize} ({resample}){crop}, alpha {alpha}, mean {mean:?}, std {std:?}")
}

fn language_rows(language: &LanguageFacts) -> [(&'static str, String); 2] {
    let cache = &language.kv_cache;
    let bytes = cache.bytes_per_position() as f64 / 1e3;
    let shape = format!("{} layers × {} heads × {} {}", cache.n_layers, cache.n_heads, cache.head_dim, cache.dtype);
    [
        (
            "language",
            format!("width {}, vocabulary {}, {} positions", language.hidden, language.vocab_size, language.max_positions),
        ),
        ("KV cache", format!("{shape}, {bytes:.1} kB a position")),
    ]
}

fn listed(items: impl Iterator<Item = impl ToString>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

fn pairs<'a>(items: impl Iterator<Item = (&'a String, &'a String)>) -> String {
    listed(items.map(|(key, value)| format!("{key} {value}")))
}
