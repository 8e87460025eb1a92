//! The KV cache: one slot a row in one buffer per layer and side, written in place by the graph.

use crate::bundle::{KvCacheFacts, Side};
use crate::runtime::{Binding, Graph, Place, RuntimeError, Tensor};

/// Buffers of `[slots, heads, capacity, head_dim]`, keys and values of every layer.
#[derive(Debug)]
pub struct Cache {
    n_slots: usize,
    capacity: usize,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    past: String,
    present: String,
    buffer: Tensor,
}

/// A row of a cache on its way to another place.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    /// Slot it comes from.
    pub from: usize,
    /// Slot it goes to.
    pub to: usize,
    /// Positions that hold something.
    pub n_positions: usize,
}

impl Cache {
    /// Allocates buffers where the graph runs.
    pub fn new(graph: &Graph, facts: &KvCacheFacts, n_slots: usize, capacity: usize) -> Result<Self, RuntimeError> {
        let shape = [n_slots, facts.n_heads, capacity, facts.head_dim];
        let layers = (0..facts.n_layers).flat_map(|layer| [(layer, Side::Key), (layer, Side::Value)]);
        let layers = layers.map(|(layer, side)| {
            let buffer = graph.allocate(facts.dtype, &shape, Place::Device)?;
            Ok(Layer { past: facts.past(layer, side), present: facts.present(layer, side), buffer })
        });
        Ok(Self { n_slots, capacity, layers: layers.collect::<Result<_, RuntimeError>>()? })
    }

    /// Rows that fit.
    pub fn n_slots(&self) -> usize {
        self.n_slots
    }

    /// Positions that fit in a row.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Ties every buffer to both its input and its output, so that the graph writes in place.
    pub fn bind(&mut self, binding: &mut Binding) -> Result<(), RuntimeError> {
        for layer in &mut self.layers {
            binding.input(&layer.past, &layer.buffer)?;
            binding.output(&layer.present, &mut layer.buffer)?;
        }
        Ok(())
    }

    /// Copies rows of another cache into this one.
    pub fn copy_from(&mut self, graph: &Graph, other: &Self, moves: &[Move]) -> Result<(), RuntimeError> {
        let moving = |source| graph.failed("moving rows of the KV cache", source);
        for (layer, other) in self.layers.iter_mut().zip(&other.layers) {
            let (to, from) = (Strides::of(&layer.buffer), Strides::of(&other.buffer));
            let copied = other.buffer.read_f32(|values| {
                layer.buffer.edit_f32(|into| {
                    for step in moves {
                        to.copy(into, step.to, values, from, step.from, step.n_positions);
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

    fn copy(self, into: &mut [f32], to: usize, values: &[f32], from_strides: Self, from: usize, n_positions: usize) {
        let n_values = n_positions * self.head_dim;
        for head in 0..self.n_heads {
            let (target, source) = (self.start(to, head), from_strides.start(from, head));
            into[target..target + n_values].copy_from_slice(&values[source..source + n_values]);
        }
    }

    fn copy_within(self, values: &mut [f32], step: &Move) {
        let n_values = step.n_positions * self.head_dim;
        for head in 0..self.n_heads {
            let source = self.start(step.from, head);
            values.copy_within(source..source + n_values, self.start(step.to, head));
        }
    }
}
