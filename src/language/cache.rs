//! Keys and values: one slot a row in one buffer per layer and side.

use std::ops::Range;

use super::rows::Move;
use crate::bundle::{CrossAttentionFacts, Dtype, KvCacheFacts};
use crate::runtime::{Binding, Graph, Outputs, Place, RuntimeError, Tensor};

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

impl Cache {
    /// Allocates buffers where the graph runs.
    pub fn new(graph: &Graph, layout: &Layout, n_slots: usize, capacity: usize) -> Result<Self, RuntimeError> {
        let shape = [n_slots, layout.n_heads, capacity, layout.head_dim];
        let layer = |names: &Names| {
            let buffer = graph.allocate(layout.dtype, &shape, Place::Device)?;
            Ok(Layer { names: names.clone(), buffer })
        };
        Ok(Self { n_slots, capacity, layers: layout.tensors.iter().map(layer).collect::<Result<_, RuntimeError>>()? })
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
    pub fn copy_from(&mut self, graph: &Graph, other: &Self, moves: &[Move]) -> Result<(), RuntimeError> {
        self.copy_tensors(graph, other.layers.iter().map(|layer| &layer.buffer), moves)
    }

    /// Copies rows of tensors `[rows, n_heads, positions, head_dim]`, in this cache's order, into this cache.
    pub fn copy_tensors<'a>(
        &mut self,
        graph: &Graph,
        tensors: impl Iterator<Item = &'a Tensor>,
        moves: &[Move],
    ) -> Result<(), RuntimeError> {
        let moving = |source| graph.failed("moving rows of the KV cache", source);
        for (layer, other) in self.layers.iter_mut().zip(tensors) {
            let (to, from) = (Strides::of(&layer.buffer), Strides::of(other));
            let copied = other.read_f32(|values| {
                layer.buffer.edit_f32(|into| {
                    for step in moves {
                        to.copy(into, values, from, step);
                    }
                })
            });
            copied.and_then(|edited| edited).map_err(moving)?;
        }
        Ok(())
    }

    /// Copies rows within this cache. No slot is both read and written.
    pub fn copy_within(&mut self, graph: &Graph, moves: &[Move]) -> Result<(), RuntimeError> {
        if moves.is_empty() {
            return Ok(());
        }
        for layer in &mut self.layers {
            let strides = Strides::of(&layer.buffer);
            let edit = |values: &mut [f32]| {
                for step in moves {
                    strides.copy_within(values, step);
                }
            };
            layer.buffer.edit_f32(edit).map_err(|source| graph.failed("moving rows of the KV cache", source))?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Strides {
    n_heads: usize,
    capacity: usize,
    head_dim: usize,
}

impl Strides {
    fn of(buffer: &Tensor) -> Self {
        let shape = buffer.shape();
        Self { n_heads: shape[1], capacity: shape[2], head_dim: shape[3] }
    }

    fn start(self, slot: usize, head: usize) -> usize {
        (slot * self.n_heads + head) * self.capacity * self.head_dim
    }

    fn copy(self, into: &mut [f32], values: &[f32], from: Self, step: &Move) {
        for head in 0..self.n_heads {
            into[self.part(step.to, head, step)].copy_from_slice(&values[from.part(step.from, head, step)]);
        }
    }

    fn copy_within(self, values: &mut [f32], step: &Move) {
        for head in 0..self.n_heads {
            values.copy_within(self.part(step.from, head, step), self.part(step.to, head, step).start);
        }
    }

    /// Where the moved positions of a head lie in a slot.
    fn part(self, slot: usize, head: usize, step: &Move) -> Range<usize> {
        let start = self.start(slot, head);
        start + step.start * self.head_dim..start + step.end * self.head_dim
    }
}
