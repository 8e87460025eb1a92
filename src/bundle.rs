//! `bundle.json` → [`Bundle`]: the contract with the exporter, described in `models/README.md`.
//!
//! Everything is checked here, once, so that the rest of the engine can rely on it. This module reads no weights and knows no runtime.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::pixels::Preprocess;

/// The bundle format that this engine reads.
pub const FORMAT_VERSION: u64 = 1;

const FACTS: &str = "bundle.json";

/// A folder whose facts are complete and agree with each other and with the sizes of its files.
#[derive(Clone, Debug)]
pub struct Bundle {
    folder: PathBuf,
    facts: Facts,
}

/// What `bundle.json` says; `models/README.md` explains every field.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Facts {
    pub format_version: u64,
    pub name: String,
    pub family: Family,
    pub tasks: Vec<TaskName>,
    pub image: Preprocess,
    pub vision: VisionFacts,
    pub qformer: QformerFacts,
    pub language: LanguageFacts,
    pub prompts: BTreeMap<TaskName, String>,
    pub generation: BTreeMap<TaskName, GenerationFacts>,
    pub graphs: BTreeMap<String, GraphFacts>,
    pub files: BTreeMap<String, FileFacts>,
    pub requires: Requirements,
    pub target: String,
    pub made_by: BTreeMap<String, String>,
    pub source: BTreeMap<String, String>,
}

/// What kind of language model follows the Q-Former.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// OPT: query tokens, prompt and generated tokens in one sequence.
    DecoderOnly,
}

/// What a bundle can be asked for.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "snake_case")]
pub enum TaskName {
    /// Describe the picture.
    Caption,
    /// Answer a question about the picture.
    Ask,
}

/// The image encoder's output.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionFacts {
    /// Class token and patches.
    pub n_positions: usize,
    /// Width of a position.
    pub hidden: usize,
}

/// The Q-Former's output.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QformerFacts {
    /// Query tokens a picture.
    pub n_queries: usize,
    /// Width inside the Q-Former.
    pub hidden: usize,
}

/// The language model.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageFacts {
    /// Width of an input embedding.
    pub hidden: usize,
    /// Size of a row of logits.
    pub vocab_size: usize,
    /// Longest sequence: query tokens, prompt and generated tokens.
    pub max_positions: usize,
    /// Where the token embeddings lie.
    pub embedding: EmbeddingFacts,
    /// Special tokens.
    pub token_ids: TokenIds,
    /// The cache tensors of the decoder graph.
    pub kv_cache: KvCacheFacts,
}

/// The token embedding table inside one of the bundle's files: `shape`, row-major, little-endian.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct EmbeddingFacts {
    pub file: String,
    pub offset: u64,
    pub dtype: Dtype,
    pub shape: [usize; 2],
}

/// Special token ids.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct TokenIds {
    pub bos: Option<u32>,
    /// Each of them ends a text.
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
    /// Marks query tokens in the reference's input ids; never part of a text.
    pub image: Option<u32>,
}

/// Cache tensors are `[rows, n_heads, capacity, head_dim]`, one pair a layer; `{}` in a name stands for the layer.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct KvCacheFacts {
    pub n_layers: usize,
    pub n_heads: usize,
    pub head_dim: usize,
    pub dtype: Dtype,
    pub past_key: String,
    pub past_value: String,
    pub present_key: String,
    pub present_value: String,
}

/// Defaults of a task.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationFacts {
    /// Tokens to write at most.
    pub max_new_tokens: usize,
}

/// One ONNX graph.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct GraphFacts {
    pub file: String,
    pub precision: String,
    pub inputs: Vec<TensorFacts>,
    pub outputs: Vec<TensorFacts>,
}

/// An input or output of a graph.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct TensorFacts {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<Dimension>,
}

/// A fixed size, or the name of an axis that is known at run time only.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum Dimension {
    Fixed(usize),
    Dynamic(String),
}

/// Element types of tensors in a bundle.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Dtype {
    Float32,
    Float16,
    Bfloat16,
    Int64,
    Int32,
}

/// Size and SHA-256 of a file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct FileFacts {
    pub bytes: u64,
    pub sha256: String,
}

/// What the runtime must offer.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requirements {
    /// Lowest version, `major.minor`.
    pub onnxruntime: String,
    /// Version of the default operator set.
    pub opset: u32,
    /// Operator domains in use; `""` is the default one.
    pub domains: Vec<String>,
}

/// Why a folder is not a usable bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The folder or its facts are not there.
    #[error("{}: no bundle there ({FACTS} cannot be read); `python -m blip2_export convert` makes one", .folder.display())]
    Missing {
        /// Where the bundle was expected.
        folder: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Not JSON, or a field is missing, unknown or of another type.
    #[error("{}: {FACTS} is not valid", .folder.display())]
    Invalid {
        /// The bundle.
        folder: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Written for another engine.
    #[error("{}: bundle format version {found}, this engine reads version {FORMAT_VERSION}; convert the checkpoint again", .folder.display())]
    Version {
        /// The bundle.
        folder: PathBuf,
        /// The version it declares.
        found: String,
    },
    /// The facts contradict each other.
    #[error("{}: {FACTS} says {said}, {but}", .folder.display())]
    Inconsistent {
        /// The bundle.
        folder: PathBuf,
        /// One fact.
        said: String,
        /// What it does not go with.
        but: String,
    },
    /// A file is not there or cannot be read.
    #[error("{}: {file} is missing or cannot be read", .folder.display())]
    File {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A file has another size.
    #[error("{}: {file} has {found} bytes, {FACTS} says {expected}; copy the bundle again", .folder.display())]
    Size {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// Size on disk.
        found: u64,
        /// Size in `bundle.json`.
        expected: u64,
    },
    /// A file has other content.
    #[error("{}: {file} has SHA-256 {found}, {FACTS} says {expected}; copy the bundle again", .folder.display())]
    Hash {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// Hash of the content.
        found: String,
        /// Hash in `bundle.json`.
        expected: String,
    },
    /// A graph is not what the facts say.
    #[error("{}: {graph}: {what} is {found}, {FACTS} says {expected}", .folder.display())]
    Graph {
        /// The bundle.
        folder: PathBuf,
        /// Name of the graph.
        graph: String,
        /// Which input or output.
        what: String,
        /// What the graph has.
        found: String,
        /// What the facts promise.
        expected: String,
    },
    /// The runtime refuses a graph.
    #[error("{}: {graph} cannot be loaded: {reason}", .folder.display())]
    Unloadable {
        /// The bundle.
        folder: PathBuf,
        /// Name of the graph.
        graph: String,
        /// What ONNX Runtime says.
        reason: String,
    },
    /// The tokenizer file is not understood.
    #[error("{}: {file} is not a tokenizer: {reason}", .folder.display())]
    Tokenizer {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// What the tokenizers library says.
        reason: String,
    },
    /// The recorded outputs are not understood.
    #[error("{}: {file}: {reason}", .folder.display())]
    Golden {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A task that the bundle has no graphs for.
    #[error("{}: this bundle cannot {asked}; it can {can}", .folder.display())]
    Task {
        /// The bundle.
        folder: PathBuf,
        /// What was asked for.
        asked: TaskName,
        /// What it offers.
        can: String,
    },
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

    fn check_facts(&self) -> Result<(), BundleError> {
        self.check_file_names()?;
        self.check_image()?;
        self.check_graphs()?;
        self.check_language()?;
        self.check_tasks()
    }

    fn check_file_names(&self) -> Result<(), BundleError> {
        for file in self.facts.files.keys() {
            let plain = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
            self.ensure(plain && !file.is_empty(), || (format!("file `{file}`"), "which is not inside the bundle".into()))?;
        }
        let named = self.facts.graphs.values().map(|graph| &graph.file);
        for file in named.chain([&self.facts.language.embedding.file]).map(String::as_str).chain(["tokenizer.json"]) {
            self.ensure(self.facts.files.contains_key(file), || (format!("file `{file}`"), "which `files` does not list".into()))?;
        }
        Ok(())
    }

    fn check_image(&self) -> Result<(), BundleError> {
        let image = &self.facts.image;
        self.ensure((1..=4096).contains(&image.size), || {
            (format!("image size {}", image.size), "sizes from 1 to 4096 are possible".into())
        })?;
        let usable = image.std.iter().all(|s| s.is_finite() && *s > 0.0)
            && image.mean.iter().all(|m| m.is_finite())
            && image.rescale.is_finite();
        self.ensure(usable, || ("image mean, std or rescale".into(), "which cannot normalise a pixel".into()))
    }

    fn check_graphs(&self) -> Result<(), BundleError> {
        let Facts { image, vision, qformer, language, .. } = &self.facts;
        let side = image.size as usize;
        self.check_tensor("vision", Way::In, "pixel_values", Dtype::Float32, &[None, Some(3), Some(side), Some(side)])?;
        let features = [None, Some(vision.n_positions), Some(vision.hidden)];
        self.check_tensor("vision", Way::Out, "image_features", Dtype::Float32, &features)?;
        self.check_tensor("qformer", Way::In, "image_features", Dtype::Float32, &features)?;
        let queries = [None, Some(qformer.n_queries), Some(language.hidden)];
        self.check_tensor("qformer", Way::Out, "queries", Dtype::Float32, &queries)?;
        self.check_decoder()
    }

    fn check_decoder(&self) -> Result<(), BundleError> {
        let LanguageFacts { hidden, vocab_size, kv_cache, .. } = &self.facts.language;
        self.check_tensor("decoder", Way::In, "inputs_embeds", Dtype::Float32, &[None, None, Some(*hidden)])?;
        self.check_tensor("decoder", Way::In, "position_ids", Dtype::Int64, &[None, None])?;
        self.check_tensor("decoder", Way::In, "seqlens_k", Dtype::Int32, &[None])?;
        self.check_tensor("decoder", Way::In, "total_sequence_length", Dtype::Int32, &[])?;
        self.check_tensor("decoder", Way::In, "logits_at", Dtype::Int64, &[None, None])?;
        self.check_tensor("decoder", Way::Out, "logits", Dtype::Float32, &[None, None, Some(*vocab_size)])?;
        self.ensure(kv_cache.dtype == Dtype::Float32, || {
            (format!("a KV cache of {}", kv_cache.dtype), "this engine keeps float32".into())
        })?;
        let shape = [None, Some(kv_cache.n_heads), None, Some(kv_cache.head_dim)];
        for layer in 0..kv_cache.n_layers {
            for side in [Side::Key, Side::Value] {
                self.check_tensor("decoder", Way::In, &kv_cache.past(layer, side), kv_cache.dtype, &shape)?;
                self.check_tensor("decoder", Way::Out, &kv_cache.present(layer, side), kv_cache.dtype, &shape)?;
            }
        }
        Ok(())
    }

    /// `None` in `shape` stands for an axis that must be dynamic.
    fn check_tensor(&self, graph: &str, way: Way, name: &str, dtype: Dtype, shape: &[Option<usize>]) -> Result<(), BundleError> {
        let facts = self.facts.graphs.get(graph);
        self.ensure(facts.is_some(), || {
            (format!("family {}", self.facts.family), format!("which needs a graph `{graph}` that `graphs` does not have"))
        })?;
        let tensors = facts.map_or(&[][..], |facts| if way == Way::In { &facts.inputs } else { &facts.outputs });
        let found = tensors.iter().find(|tensor| tensor.name == name);
        let fits = found.is_some_and(|tensor| {
            tensor.dtype == dtype
                && tensor.shape.len() == shape.len()
                && tensor.shape.iter().zip(shape).all(|(found, wanted)| match wanted {
                    Some(size) => *found == Dimension::Fixed(*size),
                    None => matches!(found, Dimension::Dynamic(_)),
                })
        });
        self.ensure(fits, || {
            let said = found
                .map_or_else(|| format!("nothing of {graph}'s {way} `{name}`"), |t| format!("{graph}'s {way} `{name}` is {t}"));
            let wanted: Vec<String> = shape.iter().map(|d| d.map_or("dynamic".into(), |size| size.to_string())).collect();
            (said, format!("the other facts need {dtype} [{}]", wanted.join(", ")))
        })
    }

    fn check_language(&self) -> Result<(), BundleError> {
        let language = &self.facts.language;
        let embedding = &language.embedding;
        self.ensure(embedding.shape == [language.vocab_size, language.hidden], || {
            let wanted = [language.vocab_size, language.hidden];
            (format!("an embedding table of {:?}", embedding.shape), format!("vocabulary and width make {wanted:?}"))
        })?;
        let size = embedding.dtype.size().saturating_mul(language.vocab_size).saturating_mul(language.hidden) as u64;
        let room = self.facts.files.get(&embedding.file).map_or(0, |file| file.bytes);
        self.ensure(embedding.offset.checked_add(size).is_some_and(|end| end <= room), || {
            (
                format!("the embedding table lies at {} of {}", embedding.offset, embedding.file),
                format!("which has only {room} bytes for its {size}"),
            )
        })?;
        let ids = &language.token_ids;
        self.ensure(!ids.eos.is_empty(), || ("no end token".into(), "so no text would ever end".into()))?;
        for id in ids.eos.iter().chain(&ids.bos).chain(&ids.pad) {
            self.ensure((*id as usize) < language.vocab_size, || {
                (format!("token id {id}"), format!("the vocabulary has {}", language.vocab_size))
            })?;
        }
        let n_queries = self.facts.qformer.n_queries;
        self.ensure(n_queries < language.max_positions, || {
            (format!("{n_queries} query tokens"), format!("the language model has {} positions", language.max_positions))
        })
    }

    fn check_tasks(&self) -> Result<(), BundleError> {
        self.ensure(!self.facts.tasks.is_empty(), || ("no tasks".into(), "so nothing could be asked of it".into()))?;
        for task in &self.facts.tasks {
            let prompt = self.facts.prompts.get(task);
            let holes = usize::from(*task == TaskName::Ask);
            self.ensure(prompt.is_some_and(|prompt| prompt.matches("{}").count() == holes), || {
                (format!("task {task}"), format!("which needs a prompt with {holes} {{}}"))
            })?;
            let limit = self.facts.generation.get(task).map_or(0, |generation| generation.max_new_tokens);
            self.ensure(limit > 0, || (format!("task {task}"), "which needs generation.max_new_tokens above 0".into()))?;
        }
        Ok(())
    }

    fn ensure(&self, holds: bool, otherwise: impl FnOnce() -> (String, String)) -> Result<(), BundleError> {
        if holds {
            return Ok(());
        }
        let (said, but) = otherwise();
        Err(BundleError::Inconsistent { folder: self.folder.clone(), said, but })
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

/// Which half of a layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Side {
    Key,
    Value,
}

impl KvCacheFacts {
    /// Name of the input that carries a layer's cache.
    pub fn past(&self, layer: usize, side: Side) -> String {
        let name = if side == Side::Key { &self.past_key } else { &self.past_value };
        name.replace("{}", &layer.to_string())
    }

    /// Name of the output that carries it on.
    pub fn present(&self, layer: usize, side: Side) -> String {
        let name = if side == Side::Key { &self.present_key } else { &self.present_value };
        name.replace("{}", &layer.to_string())
    }

    /// Bytes of one position over all layers.
    pub fn bytes_per_position(&self) -> usize {
        2 * self.n_layers * self.n_heads * self.head_dim * self.dtype.size()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::In { "input" } else { "output" })
    }
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Float32 | Self::Int32 => 4,
            Self::Float16 | Self::Bfloat16 => 2,
            Self::Int64 => 8,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Int64 => "int64",
            Self::Int32 => "int32",
        })
    }
}

impl std::fmt::Display for TensorFacts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shape: Vec<String> = self.shape.iter().map(Dimension::to_string).collect();
        write!(f, "{} [{}]", self.dtype, shape.join(", "))
    }
}

impl std::fmt::Display for Dimension {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(size) => size.fmt(f),
            Self::Dynamic(name) => name.fmt(f),
        }
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::DecoderOnly => "decoder_only",
        })
    }
}

impl std::fmt::Display for TaskName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Caption => "caption",
            Self::Ask => "ask",
        })
    }
}
