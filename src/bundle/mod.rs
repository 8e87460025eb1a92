//! `bundle.json` → [`Bundle`]: the contract with the exporter, described in `models/README.md`.
//!
//! Everything is checked here, once, so that the rest of the engine can rely on it: a bundle may come from anywhere. This module reads no
//! weights and knows no runtime.

mod check;
mod error;
mod facts;
mod files;
mod interface;
mod json;
mod loss;
mod memory;
mod nodes;
mod onnx;
mod precision;

use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use error::BundleError;
pub use facts::*;
pub(crate) use files::hexadecimal;
pub use files::{MAX_FACTS_BYTES, MAX_GOLDEN_BYTES, MAX_GRAPH_BYTES, MAX_TOKENIZER_BYTES};
pub use json::parse;
pub(crate) use json::unique;
pub use loss::{Compared, Difference, LossFacts, StageLoss, TokenLoss};
pub use memory::{Load, READ_AT_ONCE, Reckoning, SEEN_AT_ONCE, SLOT_STEP};
pub use nodes::{Element, Node, Nodes, Stored};
pub use precision::Precision;

/// The bundle format that this engine reads.
pub const FORMAT_VERSION: u64 = 4;

const FACTS: &str = "bundle.json";

/// A folder whose facts are complete and agree with each other and with the sizes of its files.
#[derive(Clone, Debug)]
pub struct Bundle {
    folder: PathBuf,
    facts: Facts,
    n_qformer_words: Option<usize>,
}

impl Bundle {
    /// Reads and checks the facts, the size of every file, and the graphs' own words about weights and operators. Hashes are left to
    /// [`check_hashes`](Self::check_hashes).
    pub fn open(folder: &Path) -> Result<Self, BundleError> {
        let missing = |source| BundleError::Missing { folder: folder.to_path_buf(), source };
        std::fs::metadata(folder.join(FACTS)).map_err(missing)?;
        let text = files::read(folder, FACTS, MAX_FACTS_BYTES)?;
        let mut bundle = Self { folder: folder.to_path_buf(), facts: facts(folder, &text)?, n_qformer_words: None };
        bundle.check_facts()?;
        bundle.check_sizes()?;
        bundle.n_qformer_words = bundle.check_onnx()?;
        Ok(bundle)
    }

    /// Where the bundle lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The checked facts.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Path of a file that the facts list.
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// The facts of a graph that the family needs.
    ///
    /// # Panics
    /// If `graph` is not one of the family's.
    pub fn graph(&self, graph: &str) -> &GraphFacts {
        self.facts.graphs.get(graph).expect("the graphs of the family were checked at open")
    }

    /// The language model's facts.
    ///
    /// # Panics
    /// If the bundle has none: a task that writes must have been [required](Self::require) before.
    pub fn language(&self) -> &LanguageFacts {
        self.facts.language.as_ref().expect("a bundle with a task that writes has a language model, checked at open")
    }

    /// Tokens that may be written behind a prompt of `n_prompt` tokens. The last one needs no position: nothing is computed from it.
    pub fn room_behind(&self, n_prompt: usize) -> usize {
        let before = if self.facts.family == Family::EncoderDecoder { 1 } else { self.facts.qformer.n_queries + n_prompt };
        (self.language().max_positions + 1).saturating_sub(before)
    }

    /// Whether TensorRT builds engines of some of its graphs.
    pub fn has_engines(&self) -> bool {
        self.facts.graphs.values().any(|graph| !graph.profile.is_empty())
    }

    /// File of the tokenizer that a writing model uses.
    pub fn tokenizer(&self) -> &str {
        match (&self.facts.qformer.text, self.facts.family) {
            (Some(text), Family::Qformer) => &text.tokenizer,
            _ => "tokenizer.json",
        }
    }

    /// Refuses a task that the bundle has no graphs for.
    pub fn require(&self, task: TaskName) -> Result<(), BundleError> {
        if self.facts.tasks.contains(&task) {
            return Ok(());
        }
        let can: Vec<String> = self.facts.tasks.iter().map(TaskName::to_string).collect();
        Err(BundleError::Task { folder: self.folder.clone(), asked: task, can: can.join(", ") })
    }

    /// Words of the Q-Former, where it reads text and its graph tells.
    pub fn n_qformer_words(&self) -> Option<usize> {
        self.n_qformer_words
    }
}

fn facts(folder: &Path, text: &[u8]) -> Result<Facts, BundleError> {
    #[derive(Deserialize)]
    struct Versioned {
        format_version: serde_json::Value,
    }
    let invalid = |reason| BundleError::Invalid { folder: folder.to_path_buf(), reason };
    let versioned: Versioned = parse(text).map_err(invalid)?;
    if versioned.format_version.as_u64() != Some(FORMAT_VERSION) {
        return Err(BundleError::Version { folder: folder.to_path_buf(), found: brief(&versioned.format_version.to_string()) });
    }
    parse(text).map_err(invalid)
}

/// The beginning of what somebody else wrote, for a message.
pub(crate) fn brief(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
