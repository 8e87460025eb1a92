//! Keys and values: one slot a row in one buffer per layer and side.

use crate::bundle::{CrossAttentionFacts, Dtype, KvCacheFacts};
use crate::runtime::{Binding, Graph, Move, Mover, Outputs, Place, RuntimeError, Tensor};

/// Which tensors of a graph hold keys and values, and their shape `[slots, n_heads, capacity, head_dim]`.
#[derive(Clone, Debug)]
pub struct Layout {
    tensors: Vec<Names>,
    n_heads: usize,
    head_dim: usize,
    dtype: Dtype,
}

/// An input, and the output that carries it on where the graph writes to it.
#[derive(Clone, Debug)]
struct Names {
    input: String,
    output: Option<String>,
}

/// Buffers for the keys and values of every layer.
#[derive(Debug)]
pub struct Cache {
    n_slots: usize,
    capacity: usize,
    layers: Vec<Layer>,
}

/// What the decoder of all live rows looks at.
#[derive(Debug)]
pub struct Caches {
    /// Keys and values of what was read and written.
    pub past: Cache,
    /// Keys and values of what the encoder made.
    pub encoded: Option<Cache>,
}

#[derive(Debug)]
struct Layer {
    names: Names,
    buffer: Tensor,
}

impl From<&KvCacheFacts> for Layout {
    fn from(facts: &KvCacheFacts) -> Self {
        let names = |(layer, side)| Names { input: facts.past(layer, side), output: Some(facts.present(layer, side)) };
        Self { tensors: facts.tensors().map(names).collect(), n_heads: facts.n_heads, head_dim: facts.head_dim, dtype: facts.dtype }
    }
}

impl From<&CrossAttentionFacts> for Layout {
    fn from(facts: &CrossAttentionFacts) -> Self {
        let names = |(layer, side)| Names { input: facts.name(layer, side), output: None };
        Self { tensors: facts.tensors().map(names).collect(), n_heads: facts.n_heads, head_dim: facts.head_dim, dtype: facts.dtype }
    }
}

impl Layout {
    /// Bytes of one position of a slot, over all layers.
    pub fn bytes_per_position(&self) -> u64 {
        (self.tensors.len() * self.n_heads * self.head_dim * self.dtype.size()) as u64
    }
}

impl Caches {
    /// As [`Cache::bind`].
    pub fn bind(&mut self, binding: &mut Binding) -> Result<(), RuntimeError> {
        self.past.bind(binding)?;
        self.encoded.as_mut().map_or(Ok(()), |encoded| encoded.bind(binding))
    }
}

impl Cache {
    /// Buffers of zeros where the graph runs: attention of plain operators multiplies what is masked with 0, which must be numbers.
    pub fn new(graph: &Graph, mover: &mut Mover, layout: &Layout, [n_slots, capacity]: [usize; 2]) -> Result<Self, RuntimeError> {
        let shape = [n_slots, layout.n_heads, capacity, layout.head_dim];
        let layer = |names: &Names| {
            let buffer = mover.at_device(graph.allocate(layout.dtype, &shape, Place::Host)?)?;
            Ok(Layer { names: names.clone(), buffer })
        };
        let layers = layout.tensors.iter().map(layer).collect::<Result<_, RuntimeError>>()?;
        Ok(Self { n_slots, capacity, layers })
    }

    /// What another graph computed under the names of this layout's inputs.
    ///
    /// # Panics
    /// If it has no such outputs.
    pub fn computed(layout: &Layout, outputs: &mut Outputs) -> Self {
        let layer = |names: &Names| Layer { names: names.clone(), buffer: outputs.take(&names.input) };
        let layers: Vec<Layer> = layout.tensors.iter().map(layer).collect();
        let shape = layers.first().map_or(vec![0; 4], |layer| layer.buffer.shape());
        Self { n_slots: shape[0], capacity: shape[2], layers }
    }

    /// Rows that fit.
    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// Positions that fit in a row.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Ties every buffer to its input, and to its output where the graph writes in place.
    pub fn bind(&mut self, binding: &mut Binding) -> Result<(), RuntimeError> {
        for layer in &mut self.layers {
            binding.input(&layer.names.input, &layer.buffer)?;
            if let Some(output) = &layer.names.output {
                binding.output(output, &mut layer.buffer)?;
            }
        }
        Ok(())
    }

    /// Copies rows of another cache into this one.
    pub fn copy_from(&mut self, mover: &mut Mover, other: &Self, moves: &[Move]) -> Result<(), RuntimeError> {
        self.copy_tensors(mover, other.layers.iter().map(|layer| &layer.buffer), moves)
    }

    /// Copies rows of tensors `[rows, n_heads, positions, head_dim]`, in this cache's order, into this cache.
    pub fn copy_tensors<'a>(
        &mut self,
        mover: &mut Mover,
        tensors: impl Iterator<Item = &'a Tensor>,
        moves: &[Move],
    ) -> Result<(), RuntimeError> {
        let from: Vec<&Tensor> = tensors.collect();
        mover.copy_all(&from, &mut self.buffers(), moves)
    }

    /// Copies rows within this cache. No slot is both read and written.
    pub fn copy_within(&mut self, mover: &mut Mover, moves: &[Move]) -> Result<(), RuntimeError> {
        if moves.is_empty() {
            return Ok(());
        }
        mover.copy_within(&mut self.buffers(), moves)
    }

    fn buffers(&mut self) -> Vec<&mut Tensor> {
        self.layers.iter_mut().map(|layer| &mut layer.buffer).collect()
    }
}
