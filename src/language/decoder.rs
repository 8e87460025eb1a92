//! The decoder graph and the rows that are live in it. One graph serves prefill and steps, whatever the family.

use std::ops::Range;

use super::cache::Cache;
use super::encoder::Encoded;
use super::inputs::{Inputs, Size, batch, no_queries};
use super::lanes::{Lanes, Layouts, capacity};
use super::rows::{Row, Rows};
use super::shared::{Shared, beginnings, distinct};
use crate::bundle::{Bundle, BundleError, Dtype, LanguageFacts};
use crate::decode::{Pick, Room, Scores, TokenId};
use crate::qformer::{Queries, QueryCache};
use crate::runtime::{Cancel, Graph, Move, Mover, Place, Runtime, RuntimeError, Tensor};

/// The decoder graph with the keys and values of all live rows.
#[derive(Debug)]
pub struct Decoder {
    graph: Graph,
    mover: Mover,
    facts: LanguageFacts,
    layouts: Layouts,
    rows: Rows,
    lanes: Option<Lanes>,
    /// Where prompts are read, beside the slots of live rows.
    aside: Option<Cache>,
    /// The query tokens that were last read for several prompts.
    shared: Option<Shared>,
    /// Of rows that were opened since the last step: the first of those that were read together, and their logits.
    opened: Vec<(usize, Tensor)>,
}

/// Rows in slots of their own, which take the place of the live ones for a while. Their keys and values are zeros.
#[derive(Debug)]
pub struct Blank {
    rows: Rows,
    lanes: Option<Lanes>,
    row: Row,
}

/// What the decoder reads before it writes the first token of a row.
#[derive(Clone, Copy, Debug)]
pub struct Opening<'a> {
    /// Keys and values that stand in the cache before anything is read.
    pub cached: Option<&'a QueryCache>,
    /// Query tokens in front of the prompt.
    pub queries: Option<&'a Queries>,
    /// The prompt.
    pub tokens: &'a [TokenId],
}

impl Opening<'_> {
    /// Positions in the cache that position ids do not count.
    pub fn offset(&self) -> usize {
        self.cached.map_or(0, QueryCache::n_positions)
    }

    /// Positions in the cache before the first token.
    pub fn n_positions(&self) -> usize {
        self.offset() + self.queries.map_or(0, |queries| queries.n_queries()) + self.tokens.len()
    }
}

impl Blank {
    /// Rows, all of them as they were at first.
    pub fn renew(&mut self) {
        let n_rows = self.rows.n_slots();
        self.rows = Rows::new(n_rows);
        for _ in 0..n_rows {
            self.rows.open(self.row);
        }
    }
}

impl Decoder {
    /// Loads the graph.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        let (graph, facts) = (Graph::open_for_steps(runtime, bundle, "decoder")?, bundle.language().clone());
        let layouts = Layouts::of(&facts);
        let mover = Mover::new(runtime);
        Ok(Self { graph, mover, facts, layouts, rows: Rows::default(), lanes: None, aside: None, shared: None, opened: Vec::new() })
    }

    /// Lets `cancel` stop every later run.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.graph.set_cancel(cancel);
    }

    /// Names and shapes of keys and values.
    pub fn layouts(&self) -> &Layouts {
        &self.layouts
    }

    /// What the lanes give now.
    pub fn room(&self) -> Room {
        self.lanes.as_ref().map(Lanes::room).unwrap_or_default()
    }

    /// Whether steps are recorded, for as long as the room stays.
    pub fn records(&self) -> bool {
        self.graph.records()
    }

    /// Rows that are live.
    pub fn n_live(&self) -> usize {
        self.rows.live().len()
    }

    /// Whether no row is live.
    pub fn is_idle(&self) -> bool {
        self.n_live() == 0
    }

    /// Moves all live rows to lanes that give this room.
    pub fn resize(&mut self, room: Room) -> Result<(), RuntimeError> {
        if self.is_idle() {
            // Before new ones are allocated.
            self.lanes = None;
            self.rows = Rows::default();
        }
        let mut lanes = Lanes::new(&self.graph, &mut self.mover, &self.layouts, room)?;
        if let Some(old) = &self.lanes {
            let moves = |end: fn(&Row) -> usize| {
                let step = |(to, row): (usize, &Row)| Move { from: row.slot, to, start: 0, end: end(row) };
                self.rows.live().iter().enumerate().map(step).collect::<Vec<Move>>()
            };
            lanes.caches.past.copy_from(&mut self.mover, &old.caches.past, &moves(|row| row.length))?;
            if let (Some(into), Some(from)) = (&mut lanes.caches.encoded, &old.caches.encoded) {
                into.copy_from(&mut self.mover, from, &moves(|row| row.n_encoded))?;
            }
        }
        self.rows.resize(room.rows);
        self.lanes = Some(lanes);
        Ok(())
    }

    /// Adds one row an opening behind the live rows. `encoded` has a slot an opening. There must be room.
    pub fn open_rows(&mut self, openings: &[Opening<'_>], encoded: Option<Encoded>) -> Result<(), RuntimeError> {
        let first = self.rows.live().len();
        self.opened.clear();
        let opened = match self.share(openings)? {
            0 => self.open_together(openings, encoded, 0),
            // Attention takes one row at a time behind what was read before.
            start => openings.chunks(1).try_for_each(|one| self.open_together(one, None, start)),
        };
        if opened.is_err() {
            self.rows.keep(&(0..first).collect::<Vec<_>>());
        }
        opened
    }

    /// As [`open_rows`](Self::open_rows), in one run; the positions before `start` are copied from the query tokens that were read before.
    fn open_together(&mut self, openings: &[Opening<'_>], encoded: Option<Encoded>, start: usize) -> Result<(), RuntimeError> {
        let n_encoded = |row: usize| encoded.as_ref().map_or(1, |encoded| encoded.lengths[row]);
        let row = |(slot, opening): (usize, &Opening<'_>)| Row {
            slot,
            length: opening.n_positions(),
            offset: opening.offset(),
            n_encoded: n_encoded(slot),
        };
        let read: Vec<Row> = openings.iter().enumerate().map(row).collect();
        let (longest, mut encoded) = (read.iter().map(|row| row.length).max().unwrap_or(0), encoded);
        let mut cache = match self.aside.take() {
            Some(cache) if cache.n_slots() == openings.len() && cache.capacity() >= longest => cache,
            _ => Cache::new(&self.graph, &mut self.mover, &self.layouts.past, [openings.len(), capacity(longest)])?,
        };
        if let Some(shared) = self.shared.as_ref().filter(|_| start > 0) {
            let step = |(to, opening): (usize, &Opening<'_>)| {
                Some(Move { from: shared.slot(opening.queries?)?, to, start: 0, end: start })
            };
            let moves: Vec<Move> = openings.iter().enumerate().filter_map(step).collect();
            cache.copy_from(&mut self.mover, shared.cache(), &moves)?;
        }
        let logits = self.read(&mut cache, encoded.as_mut().map(|encoded| &mut encoded.cache), (openings, &read), start)?;
        let first = self.rows.live().len();
        self.settle(&read, &cache, encoded.as_ref().map(|encoded| &encoded.cache))?;
        self.aside = Some(cache);
        self.opened.push((first, logits));
        Ok(())
    }

    /// Gives rows that were read aside a slot each, with what was read.
    fn settle(&mut self, read: &[Row], cache: &Cache, encoded: Option<&Cache>) -> Result<(), RuntimeError> {
        let lanes = self.lanes.as_mut().expect("room was made for every row");
        let rows: Vec<Row> = read.iter().map(|row| self.rows.open(*row)).collect();
        let moves = |end: fn(&Row) -> usize| {
            let step = |(from, to): (&Row, &Row)| Move { from: from.slot, to: to.slot, start: 0, end: end(from) };
            read.iter().zip(&rows).map(step).collect::<Vec<Move>>()
        };
        lanes.caches.past.copy_from(&mut self.mover, cache, &moves(|row| row.length))?;
        match (&mut lanes.caches.encoded, encoded) {
            (Some(into), Some(encoded)) => into.copy_from(&mut self.mover, encoded, &moves(|row| row.n_encoded)),
            _ => Ok(()),
        }
    }

    /// Replaces the live rows by `picks`.
    pub fn step(&mut self, picks: &[Pick]) -> Result<(), RuntimeError> {
        self.fork(&picks.iter().map(|pick| pick.parent).collect::<Vec<_>>())?;
        let lanes = self.lanes.as_mut().expect("rows that are live have lanes");
        self.rows.advance();
        self.opened.clear();
        lanes.step(&mut self.graph, &mut self.mover, &self.facts, (self.rows.live(), picks))
    }

    /// Slots for rows that are as if `past` positions of each had been read, `offset` of them without position ids, and `room.read` encoded.
    /// What steps and copies take can be measured with them, without the steps before.
    pub fn blank(&mut self, room: Room, past: usize, offset: usize) -> Result<Blank, RuntimeError> {
        let n_encoded = self.layouts.encoded.as_ref().map_or(1, |_| room.read);
        let row = Row { slot: 0, length: past, offset, n_encoded };
        let lanes = Lanes::new(&self.graph, &mut self.mover, &self.layouts, room)?;
        Ok(Blank { rows: Rows::new(room.rows), lanes: Some(lanes), row })
    }

    /// Puts the live rows and those of `blank` in each other's place.
    pub fn exchange(&mut self, blank: &mut Blank) {
        std::mem::swap(&mut self.rows, &mut blank.rows);
        std::mem::swap(&mut self.lanes, &mut blank.lanes);
        self.opened.clear();
    }

    /// Copies within the slots what rows need that continue `parents`, as the next step would.
    pub fn fork(&mut self, parents: &[usize]) -> Result<(), RuntimeError> {
        let lanes = self.lanes.as_mut().expect("rows that are live have lanes");
        lanes.take(&mut self.mover, &self.rows.fork(parents))
    }

    /// Logits of consecutive rows of the last run.
    pub fn scores(&self, rows: Range<usize>) -> Result<Scores<'_>, RuntimeError> {
        let step = || Some((0, self.lanes.as_ref()?.logits()?));
        let opened = self.opened.iter().rev().find(|(first, _)| *first <= rows.start).map(|(first, logits)| (*first, logits));
        let (first, logits) = opened.or_else(step).expect("rows were computed");
        let (values, size) = (logits.f32().map_err(|source| self.graph.failed("reading logits", source))?, self.facts.vocab_size);
        let values = &values[(rows.start - first) * size..(rows.end - first) * size];
        if values.chunks(1024).any(|some| some.iter().fold(false, |found, value| found | value.is_nan())) {
            return Err(RuntimeError::NotANumber { graph: "decoder".into(), output: "logits".into() });
        }
        Ok(Scores::new(values, size))
    }

    /// Forgets all live rows but these.
    pub fn keep(&mut self, rows: &[usize]) {
        self.rows.keep(rows);
    }

    /// Reads the query tokens that openings share, unless they were read before; gives how many positions that saves each opening. A device
    /// reads all of them at once as fast as few, and prompts that are long are faster together.
    fn share(&mut self, openings: &[Opening<'_>]) -> Result<usize, RuntimeError> {
        let Some(queries) = beginnings(openings).filter(|_| !self.graph.has_device()) else { return Ok(0) };
        let (n_queries, each) = (queries.first().map_or(0, |queries| queries.n_queries()), distinct(&queries));
        if openings.iter().any(|opening| opening.tokens.len() > n_queries) {
            return Ok(0);
        }
        if self.shared.as_ref().is_none_or(|shared| !shared.has(&each)) {
            if each.len() == queries.len() {
                return Ok(0);
            }
            self.shared = Some(self.read_alone(&each)?);
        }
        Ok(n_queries)
    }

    /// Reads query tokens without a prompt.
    fn read_alone(&mut self, each: &[&Queries]) -> Result<Shared, RuntimeError> {
        let openings: Vec<Opening<'_>> =
            each.iter().map(|queries| Opening { cached: None, queries: Some(queries), tokens: &[] }).collect();
        let row = |(slot, opening): (usize, &Opening<'_>)| Row { slot, length: opening.n_positions(), offset: 0, n_encoded: 1 };
        let rows: Vec<Row> = openings.iter().enumerate().map(row).collect();
        let size = [each.len(), capacity(rows[0].length)];
        let mut cache = Cache::new(&self.graph, &mut self.mover, &self.layouts.past, size)?;
        self.read(&mut cache, None, (&openings, &rows), 0)?;
        Ok(Shared::new(each, cache))
    }

    /// Runs openings through `cache`, slot by slot, behind the positions before `start`, which stand there; gives the logits behind each.
    fn read(
        &mut self,
        cache: &mut Cache,
        encoded: Option<&mut Cache>,
        (openings, rows): (&[Opening<'_>], &[Row]),
        start: usize,
    ) -> Result<Tensor, RuntimeError> {
        for (to, opening) in openings.iter().enumerate() {
            if let Some(cached) = opening.cached {
                let step = Move { from: cached.row(), to, start: 0, end: cached.n_positions() };
                cache.copy_tensors(&mut self.mover, cached.tensors(), &[step])?;
            }
        }
        let queries: Vec<&Queries> = openings.iter().filter_map(|opening| opening.queries).filter(|_| start == 0).collect();
        let queries = if queries.is_empty() { None } else { Some(batch(&mut self.mover, &queries)?) };
        let tokens: Vec<&[TokenId]> = openings.iter().map(|opening| opening.tokens).collect();
        let longest = tokens.iter().map(|tokens| tokens.len()).max().unwrap_or(0);
        let n_queries = queries.as_ref().map_or(0, |queries| queries.shape()[1]);
        let size = Size::of(&self.graph, rows.len(), rows.len(), n_queries, longest);
        let queries = if queries.is_none() { no_queries(&self.graph, &self.facts, size.rows)? } else { queries };
        let mut inputs = Inputs::new(&self.graph, &self.facts, size, queries)?;
        inputs.write_openings(rows, &tokens, start).map_err(|source| self.graph.failed("writing inputs", source))?;
        let mut logits = self.graph.allocate(Dtype::Float32, &[size.rows, size.logits, self.facts.vocab_size], Place::Host)?;
        let mut binding = self.graph.binding()?;
        inputs.bind(&mut binding)?;
        binding.output("logits", &mut logits)?;
        cache.bind(&mut binding)?;
        if let Some(encoded) = encoded {
            encoded.bind(&mut binding)?;
        }
        self.graph.run_bound(&binding)?;
        Ok(logits)
    }
}
