//! What a bundle takes of the processor's memory, reckoned from its facts and from what its graphs hold, before anything is loaded.

use std::collections::BTreeMap;

use super::onnx::GraphMemory;
use super::{Bundle, BundleError, Family, TaskName};

/// The program and ONNX Runtime themselves, measured (`blip2 doctor`, and heaps that threads keep).
const PROGRAM: u64 = 44 << 20;
/// Heaps keep what many small weights were computed from.
const KEPT: u64 = 16 << 20;
/// Float32 values of a position that live at once beside the widest of a layer's: before and behind its activation, and what goes in and
/// out. Fitted to random models of ViT-B's size and to the demos.
const LIVE: u64 = 7;
/// Positions that are read for new requests in one step: more would keep live texts waiting, and gain nothing.
pub const READ_AT_ONCE: usize = 256;
/// Positions of a slot are a multiple of this, so that requests of nearly equal length share buffers.
pub const SLOT_STEP: usize = 64;
/// Pictures that the processor encodes fastest in one run: on AVX2 a ViT-L takes 1,080 milliseconds for each of four, and 1,310 for each of
/// eight, whose activations no cache holds.
pub const SEEN_AT_ONCE: usize = 4;
/// What the prompt of a caption comes to; answers are shorter by more than their questions are longer.
const PROMPT: u64 = 2;

/// What is worked on at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Pictures, each with a text.
    pub batch: u64,
    /// Rows of a text; the bundle's own beams when absent.
    pub rows: Option<u64>,
    /// New tokens of a text; the bundle's own limit when absent.
    pub new_tokens: Option<u64>,
}

impl Load {
    /// Less is of no use: one picture, one row.
    pub const LEAST: Self = Self { batch: 1, rows: Some(1), new_tokens: None };
}

/// Bytes of the processor's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reckoning {
    /// The program and ONNX Runtime.
    pub program: u64,
    /// Weights of every graph as they lie there once they are prepared.
    pub weights: BTreeMap<String, u64>,
    /// What preparing them takes besides, until they are loaded.
    pub loading: u64,
    /// Of every graph, what lies between its nodes.
    pub activations: BTreeMap<String, u64>,
    /// Keys, values and logits of all rows, moved once to more slots.
    pub texts: u64,
    /// Of that, a row.
    pub row: u64,
    /// Of that, a position of a row.
    pub position: u64,
    /// Rows in all.
    pub rows: u64,
}

impl Reckoning {
    /// What is there before any text.
    pub fn without_texts(&self) -> u64 {
        self.program + sum(&self.weights) + sum(&self.activations)
    }

    /// The most that is taken at once: while weights are prepared, or while texts are written.
    pub fn peak(&self) -> u64 {
        let loaded = self.program + sum(&self.weights);
        loaded + self.loading.max(sum(&self.activations) + self.texts)
    }
}

impl std::fmt::Display for Reckoning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (weights, activations) = (sum(&self.weights), sum(&self.activations));
        let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
        write!(f, "{} = {} for the program + {} of weights + ", mb(self.peak()), mb(self.program), mb(weights))?;
        if self.loading > activations + self.texts {
            return write!(f, "{} while they are prepared", mb(self.loading));
        }
        write!(f, "{} between nodes + {} for keys, values and logits of {} rows", mb(activations), mb(self.texts), self.rows)
    }
}

impl Bundle {
    /// Reckons.
    pub fn memory(&self, load: Load) -> Result<Reckoning, BundleError> {
        let graphs = self.facts.graphs.keys().map(|name| Ok((name.clone(), self.graph_memory(name)?)));
        let graphs = graphs.collect::<Result<BTreeMap<String, GraphMemory>, BundleError>>()?;
        let rows = load.batch * load.rows.unwrap_or_else(|| self.beams());
        let largest = graphs.values().map(|graph| graph.weights).max().unwrap_or(0);
        let folded: u64 = graphs.values().map(|graph| graph.folded).sum();
        let activations = graphs.iter().map(|(name, graph)| {
            let widest = 4 * LIVE * graph.widest;
            (name.clone(), self.positions(name, load.batch, rows) * widest)
        });
        let (row, position) = self.row(load);
        // Rows that go to more slots lie in both for a moment; prompts are read aside.
        let moved = if load.batch > 1 { rows / 2 + load.batch } else { 1 };
        Ok(Reckoning {
            program: PROGRAM,
            activations: activations.collect(),
            weights: graphs.iter().map(|(name, graph)| (name.clone(), graph.weights)).collect(),
            loading: largest / 4 + folded / 6 + folded.min(KEPT),
            texts: (rows + moved) * row,
            row,
            position,
            rows,
        })
    }

    /// Positions that a graph computes at once.
    fn positions(&self, graph: &str, batch: u64, rows: u64) -> u64 {
        let (patches, queries) = (self.facts.vision.n_positions as u64, self.facts.qformer.n_queries as u64);
        match graph {
            "vision" => batch.min(SEEN_AT_ONCE as u64) * patches,
            "decoder" | "encoder" => (batch * (queries + PROMPT)).min(READ_AT_ONCE as u64).max(rows).max(queries + PROMPT),
            _ => batch * (patches + queries),
        }
    }

    /// Bytes of a row that is written, and of one of its positions.
    fn row(&self, load: Load) -> (u64, u64) {
        let Some(language) = &self.facts.language else { return (0, 0) };
        let tokens = self.facts.generation.values().map(|generation| generation.max_new_tokens as u64).max().unwrap_or(0);
        let read = self.facts.qformer.n_queries as u64 + PROMPT;
        let before = if self.facts.family == Family::EncoderDecoder { 1 } else { read };
        let positions = (before + load.new_tokens.unwrap_or(tokens)).min(language.max_positions as u64);
        let encoded = language
            .cross_attention
            .as_ref()
            .map_or(0, |cross| 2 * (cross.n_layers * cross.n_heads * cross.head_dim * cross.dtype.size()) as u64);
        let position = language.kv_cache.bytes_per_position() as u64;
        let row = positions.next_multiple_of(SLOT_STEP as u64) * position + read * encoded + 8 * language.vocab_size as u64;
        (row, position)
    }

    fn beams(&self) -> u64 {
        let generation = &self.facts.generation;
        generation.get(&TaskName::Caption).or_else(|| generation.values().next()).map_or(1, |generation| generation.beams as u64)
    }
}

fn sum(parts: &BTreeMap<String, u64>) -> u64 {
    parts.values().sum()
}
