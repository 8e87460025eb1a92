//! The buffers of live rows: a slot each for keys and values, and what a step reads and writes. A step allocates nothing while the number
//! of rows stays.

use std::sync::Arc;

use super::cache::{Cache, Layout};
use super::inputs::{Inputs, Size};
use super::rows::{Moves, Row};
use crate::bundle::{Dtype, LanguageFacts};
use crate::decode::{Pick, Room};
use crate::runtime::{Binding, Graph, Mover, Place, RuntimeError, Tensor};

/// Capacities are multiples of this, so that requests of nearly equal length share buffers.
const CAPACITY_STEP: usize = 64;

/// Slots of one capacity.
#[derive(Debug)]
pub struct Lanes {
    /// Keys and values of what was read and written.
    pub cache: Cache,
    /// Keys and values of what the encoder made.
    pub encoded: Option<Cache>,
    binding: Binding,
    step: Option<Step>,
}

/// Buffers for a number of rows.
#[derive(Debug)]
struct Step {
    n_rows: usize,
    inputs: Inputs,
    logits: Tensor,
}

/// Names and shapes of the tensors that hold keys and values.
#[derive(Debug)]
pub struct Layouts {
    /// Of what was read and written.
    pub past: Layout,
    /// Of what the encoder made.
    pub encoded: Option<Layout>,
}

impl Layouts {
    /// Those of a decoder.
    pub fn of(facts: &LanguageFacts) -> Self {
        Self { past: Layout::from(&facts.kv_cache), encoded: facts.cross_attention.as_ref().map(Layout::from) }
    }
}

/// Positions that a slot is made for where so many are needed.
pub fn capacity(n_positions: usize) -> usize {
    n_positions.next_multiple_of(CAPACITY_STEP)
}

impl Lanes {
    /// Allocates slots where the graph runs.
    pub fn new(graph: &Graph, mover: &mut Mover, layouts: &Layouts, room: Room) -> Result<Self, RuntimeError> {
        let mut binding = graph.binding()?;
        let mut cache = Cache::new(graph, mover, &layouts.past, [room.rows, capacity(room.positions)])?;
        cache.bind(&mut binding)?;
        let encoded = layouts.encoded.as_ref().map(|layout| Cache::new(graph, mover, layout, [room.rows, room.read.max(1)]));
        let mut encoded = encoded.transpose()?;
        if let Some(encoded) = &mut encoded {
            encoded.bind(&mut binding)?;
        }
        Ok(Self { cache, encoded, binding, step: None })
    }

    /// What fits.
    pub fn room(&self) -> Room {
        let read = self.encoded.as_ref().map_or(usize::MAX, Cache::capacity);
        Room { rows: self.cache.n_slots(), positions: self.cache.capacity(), read }
    }

    /// Copies within the slots.
    pub fn take(&mut self, mover: &mut Mover, moves: &Moves) -> Result<(), RuntimeError> {
        self.cache.copy_within(mover, &moves.past)?;
        match &mut self.encoded {
            Some(encoded) => encoded.copy_within(mover, &moves.encoded),
            None => Ok(()),
        }
    }

    /// One token more for every row; the logits are those of [`logits`](Self::logits).
    pub fn step(&mut self, graph: &mut Graph, facts: &LanguageFacts, rows: &[Row], picks: &[Pick]) -> Result<(), RuntimeError> {
        let mut step = self.step.take().filter(|step| step.n_rows == rows.len());
        if step.is_none() {
            step = Some(self.resized(graph, facts, rows.len())?);
        }
        let step = self.step.insert(step.expect("it was made just now"));
        let written = step.inputs.write_step(rows, picks.iter().map(|pick| pick.token));
        written.map_err(|source| graph.failed("writing inputs", source))?;
        step.inputs.bind(&mut self.binding)?;
        graph.run_bound(&self.binding)
    }

    /// `[rows, 1, vocabulary]` of the last step, and perhaps what filled it up.
    pub fn logits(&self) -> Option<&Tensor> {
        self.step.as_ref().map(|step| &step.logits)
    }

    fn resized(&mut self, graph: &Graph, facts: &LanguageFacts, n_rows: usize) -> Result<Step, RuntimeError> {
        let size = Size::of(graph, n_rows, self.cache.n_slots(), 0, 1);
        let none = graph.takes("queries").then(|| graph.allocate(Dtype::Float32, &[size.rows, 0, facts.hidden], Place::Host));
        let inputs = Inputs::new(graph, facts, size, none.transpose()?.map(Arc::new))?;
        let mut logits = graph.allocate(Dtype::Float32, &[size.rows, size.logits, facts.vocab_size], Place::Host)?;
        self.binding.output("logits", &mut logits)?;
        Ok(Step { n_rows, inputs, logits })
    }
}
