//! `bundle.json` → [`Bundle`]: the contract with the exporter, described in `models/README.md`.
//!
//! Everything is checked here, once, so that the rest of the engine can rely on it. This module reads no weights and knows no runtime.

mod check;
mod error;
mod facts;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

pub use error::BundleError;
pub use facts::*;

/// The bundle format that this engine reads.
pub const FORMAT_VERSION: u64 = 2;

const FACTS: &str = "bundle.json";

/// A folder whose facts are complete and agree with each other and with the sizes of its files.
#[derive(Clone, Debug)]
pub struct Bundle {
    folder: PathBuf,
    facts: Facts,
}

impl Bundle {
    /// Reads and checks the facts and the size of every file. Hashes are left to [`check_hashes`](Self::check_hashes).
    pub fn open(folder: &Path) -> Result<Self, BundleError> {
        let text = std::fs::read_to_string(folder.join(FACTS))
            .map_err(|source| BundleError::Missing { folder: folder.to_path_buf(), source })?;
        let bundle = Self { folder: folder.to_path_buf(), facts: parse(folder, &text)? };
        bundle.check_facts()?;
        bundle.check_sizes()?;
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

    /// Reads every file and compares its hash. `each` is called before a file is read, with its name and size.
    pub fn check_hashes(&self, mut each: impl FnMut(&str, u64)) -> Result<(), BundleError> {
        for (file, facts) in &self.facts.files {
            each(file, facts.bytes);
            let found = sha256(&self.path(file)).map_err(|source| self.unreadable(file, source))?;
            if found != facts.sha256 {
                let expected = facts.sha256.clone();
                return Err(BundleError::Hash { folder: self.folder.clone(), file: file.clone(), found, expected });
            }
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<(), BundleError> {
        for (file, facts) in &self.facts.files {
            let found = std::fs::metadata(self.path(file)).map_err(|source| self.unreadable(file, source))?.len();
            if found != facts.bytes {
                let (folder, file, expected) = (self.folder.clone(), file.clone(), facts.bytes);
                return Err(BundleError::Size { folder, file, found, expected });
            }
        }
        Ok(())
    }

    fn unreadable(&self, file: &str, source: std::io::Error) -> BundleError {
        BundleError::File { folder: self.folder.clone(), file: file.into(), source }
    }
}
fn parse(folder: &Path, text: &str) -> Result<Facts, BundleError> {
    #[derive(Deserialize)]
    struct Versioned {
        format_version: serde_json::Value,
    }
    let invalid = |source| BundleError::Invalid { folder: folder.to_path_buf(), source };
    let versioned: Versioned = serde_json::from_str(text).map_err(invalid)?;
    if versioned.format_version.as_u64() != Some(FORMAT_VERSION) {
        return Err(BundleError::Version { folder: folder.to_path_buf(), found: versioned.format_version.to_string() });
    }
    serde_json::from_str(text).map_err(invalid)
}

fn sha256(path: &Path) -> Result<String, std::io::Error> {
    let mut file = File::open(path)?;
    let (mut digest, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let n_read = file.read(&mut buffer)?;
        if n_read == 0 {
            return Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        digest.update(&buffer[..n_read]);
    }
}
