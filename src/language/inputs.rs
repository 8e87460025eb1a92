//! What one run of the decoder reads besides the cache: rows of tokens, where they stand, and which slot belongs to which row.

use std::sync::Arc;

use super::rows::Row;
use crate::bundle::{Dtype, LanguageFacts};
use crate::decode::TokenId;
use crate::qformer::Queries;
use crate::runtime::{Binding, Graph, GraphError, Mover, Place, RuntimeError, Tensor};

/// Host tensors of one shape; they may be written again for every run.
#[derive(Debug)]
pub struct Inputs {
    queries: Option<Arc<Tensor>>,
    ids: Tensor,
    positions: Tensor,
    lengths: Tensor,
    total: Tensor,
    /// What `total` is in every run, where it must not change.
    reach: Option<usize>,
    slot_rows: Tensor,
    row_slots: Tensor,
    logits_at: Tensor,
    encoder_lengths: Option<Tensor>,
}

/// Sizes of the inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Rows that are computed.
    pub rows: usize,
    /// Slots of the cache.
    pub slots: usize,
    /// Tokens of a row.
    pub tokens: usize,
    /// Positions of a row that logits are computed for; the first is read.
    pub logits: usize,
}

impl Size {
    /// For `rows` behind `n_queries` query tokens each, filled up where the graph multiplies more rows than these. What fills up comes
    /// last and has no slot.
    pub fn of(graph: &Graph, rows: usize, slots: usize, n_queries: usize, tokens: usize) -> Self {
        let least = graph.least_rows();
        let rows = if n_queries + tokens < least { rows.max(least) } else { rows };
        Self { rows, slots, tokens, logits: least.div_ceil(rows) }
    }
}

impl Inputs {
    /// Inputs for runs of this size, behind these queries, `[rows, queries, hidden]`, where the graph takes any.
    pub fn new(graph: &Graph, facts: &LanguageFacts, size: Size, queries: Option<Arc<Tensor>>) -> Result<Self, RuntimeError> {
        let Size { rows, slots, tokens, logits } = size;
        let n_queries = queries.as_ref().map_or(0, |queries| queries.shape()[1]);
        let host = |dtype, shape: &[usize]| graph.allocate(dtype, shape, Place::Host);
        let encoder_lengths = facts.cross_attention.as_ref().map(|_| host(Dtype::Int32, &[slots]));
        Ok(Self {
            queries,
            ids: host(Dtype::Int64, &[rows, tokens])?,
            positions: host(Dtype::Int64, &[rows, n_queries + tokens])?,
            lengths: host(Dtype::Int32, &[slots])?,
            total: host(Dtype::Int32, &[])?,
            reach: None,
            slot_rows: host(Dtype::Int64, &[slots])?,
            row_slots: host(Dtype::Int64, &[rows])?,
            logits_at: host(Dtype::Int64, &[rows, logits])?,
            encoder_lengths: encoder_lengths.transpose()?,
        })
    }

    /// Lets every run look as far as the slots reach instead of as far as the longest row does.
    pub fn reach(&mut self, capacity: usize) -> Result<(), GraphError> {
        self.reach = Some(capacity);
        self.write_slots(&[])
    }

    /// Rows that read their tokens for the first time, from a position on; each padded on the right: what is computed there is never read.
    pub fn write_openings(&mut self, rows: &[Row], tokens: &[&[TokenId]], start: usize) -> Result<(), GraphError> {
        let n_queries = self.queries.as_ref().map_or(0, |queries| queries.shape()[1]);
        let (n_tokens, n_positions) = (self.ids.shape()[1], self.positions.shape()[1]);
        for (into, tokens) in self.ids.i64_mut()?.chunks_exact_mut(n_tokens.max(1)).zip(tokens) {
            into.iter_mut().zip(*tokens).for_each(|(into, token)| *into = i64::from(*token));
        }
        for (at, position) in self.positions.i64_mut()?.iter_mut().enumerate() {
            *position = (start + at % n_positions) as i64;
        }
        let n_logits = self.logits_at.shape()[1];
        for (at, tokens) in self.logits_at.i64_mut()?.chunks_exact_mut(n_logits).zip(tokens) {
            at.fill((n_queries + tokens.len()) as i64 - 1);
        }
        self.write_slots(rows)
    }

    /// One more token for each row.
    pub fn write_step(&mut self, rows: &[Row], tokens: impl Iterator<Item = TokenId>) -> Result<(), GraphError> {
        self.ids.i64_mut()?.iter_mut().zip(tokens).for_each(|(into, token)| *into = i64::from(token));
        for (position, row) in self.positions.i64_mut()?.iter_mut().zip(rows) {
            *position = (row.length - row.offset) as i64 - 1;
        }
        self.write_slots(rows)
    }

    /// `seqlens_k` counts from the last position, hence one less than the length; slots without a row get a harmless position.
    fn write_slots(&mut self, rows: &[Row]) -> Result<(), GraphError> {
        let longest = rows.iter().map(|row| row.length).max().unwrap_or(0);
        self.total.i32_mut()?.fill(self.reach.unwrap_or(longest) as i32);
        self.lengths.i32_mut()?.fill(0);
        self.slot_rows.i64_mut()?.fill(0);
        if let Some(lengths) = &mut self.encoder_lengths {
            lengths.i32_mut()?.fill(1);
        }
        for (index, row) in rows.iter().enumerate() {
            self.lengths.i32_mut()?[row.slot] = row.length as i32 - 1;
            self.slot_rows.i64_mut()?[row.slot] = index as i64;
            self.row_slots.i64_mut()?[index] = row.slot as i64;
            if let Some(lengths) = &mut self.encoder_lengths {
                lengths.i32_mut()?[row.slot] = row.n_encoded as i32;
            }
        }
        Ok(())
    }

    /// Ties what was written to the graph: a device gets its copy now.
    pub fn bind(&self, binding: &mut Binding) -> Result<(), RuntimeError> {
        self.lasting().chain(self.changing()).try_for_each(|(name, tensor)| binding.input(name, tensor))
    }

    /// What is other in every step.
    pub fn changing(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let known = [
            ("input_ids", &self.ids),
            ("position_ids", &self.positions),
            ("seqlens_k", &self.lengths),
            ("slot_rows", &self.slot_rows),
            ("row_slots", &self.row_slots),
            ("logits_at", &self.logits_at),
        ];
        known.into_iter().chain(self.encoder_lengths.iter().map(|tensor| ("encoder_lengths", tensor)))
    }

    /// What may stay from step to step; see [`reach`](Self::reach).
    pub fn lasting(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let queries = self.queries.as_deref().map(|tensor| ("queries", tensor));
        queries.into_iter().chain([("total_sequence_length", &self.total)])
    }
}

/// The queries of several rows as one tensor, where they lie.
///
/// # Panics
/// If there are none.
pub fn batch(mover: &mut Mover, queries: &[&Queries]) -> Result<Arc<Tensor>, RuntimeError> {
    mover.stack(&queries.iter().map(|queries| &queries.0).collect::<Vec<_>>())
}

/// What rows that read no queries give a graph that takes some.
pub fn no_queries(graph: &Graph, facts: &LanguageFacts, n_rows: usize) -> Result<Option<Arc<Tensor>>, RuntimeError> {
    let none = graph.takes("queries").then(|| graph.allocate(Dtype::Float32, &[n_rows, 0, facts.hidden], Place::Host));
    Ok(none.transpose()?.map(Arc::new))
}
