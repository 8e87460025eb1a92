//! The encoder of Flan-T5: queries and prompt → keys and values that every decoder layer attends to.

use super::Prefix;
use super::cache::{Cache, Layout};
use super::inputs::batch;
use crate::bundle::{Bundle, BundleError, Dtype};
use crate::qformer::Queries;
use crate::runtime::{Cancel, Graph, Mover, Place, Runtime, RuntimeError};

/// The encoder graph.
#[derive(Debug)]
pub struct Encoder {
    graph: Graph,
    mover: Mover,
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
        Ok(Self { graph: Graph::open(runtime, bundle, "encoder")?, mover: Mover::new(runtime) })
    }

    /// Lets `cancel` stop every later run.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.graph.set_cancel(cancel);
    }

    /// Encodes all prefixes in one batch; shorter ones are padded on the right.
    pub fn encode(&mut self, prefixes: &[Prefix], layout: &Layout) -> Result<Encoded, RuntimeError> {
        let writing = |source| self.graph.failed("writing inputs", source);
        let queries: Vec<&Queries> = prefixes.iter().filter_map(Prefix::queries).collect();
        let queries = batch(&mut self.mover, &queries)?;
        let longest = prefixes.iter().map(|prefix| prefix.prompt.len()).max().unwrap_or(0);
        let mut ids = self.graph.allocate(Dtype::Int64, &[prefixes.len(), longest], Place::Host)?;
        for (prefix, into) in prefixes.iter().zip(ids.i64_mut().map_err(writing)?.chunks_exact_mut(longest.max(1))) {
            into.iter_mut().zip(&prefix.prompt).for_each(|(into, token)| *into = i64::from(*token));
        }
        let lengths: Vec<usize> = prefixes.iter().map(Prefix::n_positions).collect();
        let mut counts = self.graph.allocate(Dtype::Int32, &[prefixes.len()], Place::Host)?;
        for (count, length) in counts.i32_mut().map_err(writing)?.iter_mut().zip(&lengths) {
            *count = *length as i32;
        }
        let inputs = [("queries", &*queries), ("input_ids", &ids), ("lengths", &counts)];
        let mut outputs = self.graph.run(&inputs, Place::Device)?;
        Ok(Encoded { cache: Cache::computed(layout, &mut outputs), lengths })
    }
}
