//! What `bundle.json` says; `models/README.md` explains every field.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::json::unique;
use super::{LossFacts, Precision};
use crate::pixels::Preprocess;

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
    /// Absent where nothing writes.
    pub language: Option<LanguageFacts>,
    #[serde(deserialize_with = "unique")]
    pub prompts: BTreeMap<TaskName, String>,
    #[serde(deserialize_with = "unique")]
    pub generation: BTreeMap<TaskName, GenerationFacts>,
    #[serde(deserialize_with = "unique")]
    pub graphs: BTreeMap<String, GraphFacts>,
    #[serde(deserialize_with = "unique")]
    pub files: BTreeMap<String, FileFacts>,
    pub requires: Requirements,
    pub target: String,
    #[serde(deserialize_with = "unique")]
    pub made_by: BTreeMap<String, String>,
    #[serde(deserialize_with = "unique")]
    pub source: BTreeMap<String, String>,
    /// Absent where everything is float32, and where it was not measured.
    pub loss: Option<LossFacts>,
}

/// What kind of language model follows the Q-Former.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// OPT, LLaMA: query tokens, prompt and generated tokens in one sequence.
    DecoderOnly,
    /// Flan-T5: query tokens and prompt go into an encoder, a decoder writes.
    EncoderDecoder,
    /// None: the Q-Former of stage 1 compares pictures with texts, and may write captions itself.
    Qformer,
}

/// What a bundle can be asked for.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "snake_case")]
pub enum TaskName {
    /// Describe the picture.
    Caption,
    /// Answer a question about the picture.
    Ask,
    /// Tell whether a text is about the picture.
    Match,
    /// Turn pictures and texts into vectors that can be compared.
    Embed,
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
    /// Width of the space in which pictures and texts are compared; stage 1 only.
    pub joint: Option<usize>,
    /// What training divided cosines by; stage 1 only.
    pub temperature: Option<f32>,
    /// Present where the Q-Former reads text.
    pub text: Option<QformerTextFacts>,
}

/// The Q-Former's text branch.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QformerTextFacts {
    /// Its tokenizer's file.
    pub tokenizer: String,
    /// Longer texts are cut to this, special tokens included, as training cut them.
    pub max_tokens: usize,
    /// Longest text, special tokens included.
    pub max_positions: usize,
    /// Fills up shorter texts of a batch.
    pub pad: u32,
    /// Which end longer ones lose.
    pub truncation_side: CutSide,
    /// In front of a language model: what of a request it reads.
    pub reads: Option<QformerReads>,
}

/// An end of a text.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum CutSide {
    Left,
    Right,
}

/// What a question-conditioned Q-Former reads.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum QformerReads {
    /// The same text as the language model.
    #[default]
    Prompt,
    /// The question alone.
    Question,
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
    /// Special tokens.
    pub token_ids: TokenIds,
    /// The cache tensors of the decoder graph.
    pub kv_cache: KvCacheFacts,
    /// What the encoder hands to the decoder.
    pub cross_attention: Option<CrossAttentionFacts>,
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
    /// What a decoder behind an encoder starts with.
    pub decoder_start: Option<u32>,
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

/// Keys and values that the encoder computes once: `[rows, n_heads, positions, head_dim]`, one pair a decoder layer.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct CrossAttentionFacts {
    pub n_layers: usize,
    pub n_heads: usize,
    pub head_dim: usize,
    pub dtype: Dtype,
    pub key: String,
    pub value: String,
}

/// Defaults of a task.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationFacts {
    /// Tokens to write at most.
    pub max_new_tokens: usize,
    /// Tokens to write before the text may end.
    #[serde(default)]
    pub min_new_tokens: usize,
    /// Beams of the search; one is greedy search.
    #[serde(default = "one")]
    pub beams: usize,
    /// Exponent of the length that a beam's sum is divided by.
    #[serde(default = "no_change")]
    pub length_penalty: f32,
}

fn one() -> usize {
    1
}

fn no_change() -> f32 {
    1.0
}

/// One ONNX graph.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct GraphFacts {
    pub file: String,
    pub precision: Precision,
    /// Of [`Precision::Int8`] only.
    pub weight_bits: Option<u32>,
    /// Of precisions by blocks only.
    pub block_size: Option<usize>,
    pub inputs: Vec<TensorFacts>,
    pub outputs: Vec<TensorFacts>,
    /// The least, the best and the largest size of every axis that is not fixed, where engines are built of the graph.
    #[serde(default, deserialize_with = "unique")]
    pub profile: BTreeMap<String, [usize; 3]>,
}

impl Precision {
    /// Rows that a product must have so that a row is the same in any number of them: the kernels for 4 bits add up a single one in
    /// another order, and what is rounded afterwards may then be another number.
    pub fn least_rows(self) -> usize {
        if self == Self::Int4Blocks { 2 } else { 1 }
    }
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
#[serde(untagged, expecting = "expected a size or the name of an axis")]
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

/// Which half of a layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Side {
    Key,
    Value,
}

impl Side {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Key, Self::Value];

    fn of<'a>(self, key: &'a str, value: &'a str) -> &'a str {
        if self == Self::Key { key } else { value }
    }
}

/// Name of the stage-1 Q-Former's output that holds a layer's keys or values of the queries.
pub fn query_cache(layer: usize, side: Side) -> String {
    format!("query.{layer}.{}", side.of("key", "value"))
}

/// Every layer with both sides, in order.
fn tensors(n_layers: usize) -> impl Iterator<Item = (usize, Side)> {
    (0..n_layers).flat_map(|layer| Side::ALL.map(|side| (layer, side)))
}

impl KvCacheFacts {
    /// Every buffer: its layer and which half it is.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, Side)> {
        tensors(self.n_layers)
    }

    /// Name of the input that carries a layer's cache.
    pub fn past(&self, layer: usize, side: Side) -> String {
        side.of(&self.past_key, &self.past_value).replace("{}", &layer.to_string())
    }

    /// Name of the output that carries it on.
    pub fn present(&self, layer: usize, side: Side) -> String {
        side.of(&self.present_key, &self.present_value).replace("{}", &layer.to_string())
    }

    /// Bytes of one position over all layers.
    pub fn bytes_per_position(&self) -> usize {
        2 * self.n_layers * self.n_heads * self.head_dim * self.dtype.size()
    }
}

impl CrossAttentionFacts {
    /// Every tensor: its layer and which half it is.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, Side)> {
        tensors(self.n_layers)
    }

    /// Name of the encoder's output and the decoder's input.
    pub fn name(&self, layer: usize, side: Side) -> String {
        side.of(&self.key, &self.value).replace("{}", &layer.to_string())
    }
}

impl Dimension {
    /// The name of the axis, where its size is not fixed.
    pub fn axis(&self) -> Option<&String> {
        if let Self::Dynamic(name) = self { Some(name) } else { None }
    }
}

impl Dtype {
    /// Whether it holds fractions.
    pub fn is_float(self) -> bool {
        matches!(self, Self::Float32 | Self::Float16 | Self::Bfloat16)
    }

    /// Every type.
    pub const ALL: [Self; 5] = [Self::Float32, Self::Float16, Self::Bfloat16, Self::Int64, Self::Int32];

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
            Self::EncoderDecoder => "encoder_decoder",
            Self::Qformer => "qformer",
        })
    }
}

impl std::fmt::Display for TaskName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Caption => "caption",
            Self::Ask => "ask",
            Self::Match => "match",
            Self::Embed => "embed",
        })
    }
}
