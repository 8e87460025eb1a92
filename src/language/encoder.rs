//! The encoder of Flan-T5: queries and prompt embeddings → keys and values that every decoder layer attends to.

use super::Prefix;
use super::cache::{Cache, Layout};
use super::embedding::Embedding;
use crate::bundle::{Bundle, BundleError, Dtype};
use crate::runtime::{Graph, Place, Runtime, RuntimeError};

/// The encoder graph.
#[derive(Debug)]
pub struct Encoder {
    graph: Graph,
    hidden: usize,
}

/// Cross-attention keys and values of several rows, and how many positions of each row are real.
#[derive(Debug)]
pub struct Encoded {
    /// One slot a row.
    pub cache: Cache,
    /// Real positions of each row.
    pub lengths: Vec<usize>,
}

impl Encoder {
    /// Loads the graph.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        Ok(Self { graph: Graph::open(runtime, bundle, "encoder")?, hidden: bundle.language().hidden })
    }

    /// Encodes all prefixes in one batch; shorter ones are padded on the right.
    pub fn encode(&mut self, prefixes: &[&Prefix], embedding: &mut Embedding, layout: &Layout) -> Result<Encoded, RuntimeError> {
        let lengths: Vec<usize> = prefixes.iter().map(|prefix| prefix.n_positions()).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut embeds = self.graph.allocate(Dtype::Float32, &[prefixes.len(), longest, self.hidden], Place::Host)?;
        let writing = |source| self.graph.failed("writing inputs", source);
        let rows = embeds.f32_mut().map_err(writing)?.chunks_exact_mut(longest * self.hidden);
        for (prefix, row) in prefixes.iter().zip(rows) {
            embedding.write(prefix.queries(), &prefix.prompt, row)?;
        }
        let mut counts = self.graph.allocate(Dtype::Int32, &[prefixes.len()], Place::Host)?;
        for (count, length) in counts.i32_mut().map_err(writing)?.iter_mut().zip(&lengths) {
            *count = *length as i32;
        }
        let mut outputs = self.graph.run(&[("inputs_embeds", &embeds), ("lengths", &counts)], Place::Device)?;
        Ok(Encoded { cache: Cache::computed(layout, &mut outputs), lengths })
    }
}
