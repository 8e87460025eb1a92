//! The buffers of live rows: a slot each for keys and values, and what their steps read and write. A step allocates nothing while the number
//! of rows stays.

use super::cache::{Cache, Caches, Layout};
use super::rows::{Moves, Row};
use super::step::Step;
use crate::bundle::{LanguageFacts, SLOT_STEP};
use crate::decode::{Pick, Room};
use crate::runtime::{Graph, Mover, RuntimeError, Tensor};

/// Slots of one capacity.
#[derive(Debug)]
pub struct Lanes {
    /// Their keys and values.
    pub caches: Caches,
    /// Of several numbers of rows; the last is in use.
    steps: Vec<Step>,
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
    n_positions.next_multiple_of(SLOT_STEP)
}

impl Lanes {
    /// Allocates slots where the graph runs.
    pub fn new(graph: &Graph, mover: &mut Mover, layouts: &Layouts, room: Room) -> Result<Self, RuntimeError> {
        let past = Cache::new(graph, mover, &layouts.past, [room.rows, capacity(room.positions)])?;
        let encoded = layouts.encoded.as_ref().map(|layout| Cache::new(graph, mover, layout, [room.rows, room.read.max(1)]));
        Ok(Self { caches: Caches { past, encoded: encoded.transpose()? }, steps: Vec::new() })
    }

    /// What fits.
    pub fn room(&self) -> Room {
        let read = self.caches.encoded.as_ref().map_or(usize::MAX, Cache::capacity);
        Room { rows: self.caches.past.n_slots(), positions: self.caches.past.capacity(), read }
    }

    /// Copies within the slots.
    pub fn take(&mut self, mover: &mut Mover, moves: &Moves) -> Result<(), RuntimeError> {
        self.caches.past.copy_within(mover, &moves.past)?;
        match &mut self.caches.encoded {
            Some(encoded) => encoded.copy_within(mover, &moves.encoded),
            None => Ok(()),
        }
    }

    /// One token more for every row; the logits are those of [`logits`](Self::logits).
    pub fn step(
        &mut self,
        graph: &mut Graph,
        mover: &mut Mover,
        facts: &LanguageFacts,
        rows: (&[Row], &[Pick]),
    ) -> Result<(), RuntimeError> {
        let size = Step::size(graph, rows.0.len(), self.caches.past.n_slots());
        let at = self.steps.iter().position(|step| step.is(size));
        let mut step = match at.map(|at| self.steps.remove(at)) {
            Some(step) => step,
            None => Step::new(graph, mover, facts, size, &mut self.caches)?,
        };
        if !graph.records() {
            self.steps.clear();
        }
        let done = step.run(graph, mover, rows, &mut self.caches);
        self.steps.push(step);
        done
    }

    /// `[rows, 1, vocabulary]` of the last step, and perhaps what filled it up.
    pub fn logits(&self) -> Option<&Tensor> {
        self.steps.last().map(Step::logits)
    }
}
