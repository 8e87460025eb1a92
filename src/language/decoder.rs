//! The decoder graph and the rows that are live in it. One graph serves prefill and steps, whatever the family.

use super::cache::{Cache, Layout, Move};
use super::embedding::Embedding;
use super::encoder::Encoded;
use crate::bundle::{Bundle, BundleError, Dtype, LanguageFacts};
use crate::decode::{Pick, TokenId};
use crate::qformer::{Queries, QueryCache};
use crate::runtime::{Binding, Graph, GraphError, Place, Runtime, RuntimeError, Tensor};

/// Capacities are multiples of this, so that requests of nearly equal length share buffers.
pub const CAPACITY_STEP: usize = 64;

/// The decoder graph with its embedding table and the keys and values of all live rows.
#[derive(Debug)]
pub struct Decoder {
    pub(super) graph: Graph,
    pub(super) embedding: Embedding,
    facts: LanguageFacts,
    layout: Layout,
    cross_layout: Option<Layout>,
    rows: Vec<Row>,
    lanes: Option<Lanes>,
    n_openings: u64,
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
    /// Tokens that may follow.
    pub max_new_tokens: usize,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    slot: usize,
    /// Positions in the cache.
    length: usize,
    /// Positions in front that position ids do not count.
    offset: usize,
    /// Positions that it may come to.
    limit: usize,
    /// Positions of what the encoder made of its prefix; 1 where there is no encoder.
    n_encoded: usize,
    /// Rows of the same opening share what the encoder made.
    opening: u64,
}

/// Buffers of the same number of slots, and what a decode step reads and writes. Nothing here is allocated in a step.
#[derive(Debug)]
struct Lanes {
    cache: Cache,
    cross: Option<Cross>,
    binding: Binding,
    inputs: Inputs,
    logits: Tensor,
}

/// What the encoder made of each row's prefix.
#[derive(Debug)]
struct Cross {
    cache: Cache,
    /// Whose prefix each slot holds.
    openings: Vec<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Size {
    n_slots: usize,
    capacity: usize,
    n_encoded: usize,
}

#[derive(Debug)]
struct Inputs {
    embeds: Tensor,
    positions: Tensor,
    lengths: Tensor,
    total: Tensor,
    logits_at: Tensor,
    encoder_lengths: Option<Tensor>,
}

impl Opening<'_> {
    fn offset(&self) -> usize {
        self.cached.map_or(0, QueryCache::n_positions)
    }

    fn n_read(&self) -> usize {
        self.queries.map_or(0, |queries| queries.n_queries()) + self.tokens.len()
    }

    fn n_positions(&self) -> usize {
        self.offset() + self.n_read()
    }
}

impl Decoder {
    /// Loads the graph and opens the embedding table.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        let (graph, embedding) = (Graph::open(runtime, bundle, "decoder")?, Embedding::open(bundle)?);
        let facts = bundle.language().clone();
        let (layout, cross_layout) = (Layout::from(&facts.kv_cache), facts.cross_attention.as_ref().map(Layout::from));
        Ok(Self { graph, embedding, facts, layout, cross_layout, rows: Vec::new(), lanes: None, n_openings: 0 })
    }

    /// Size of a row of scores.
    pub fn vocabulary(&self) -> usize {
        self.facts.vocab_size
    }

    /// Names and shapes of cross-attention keys and values.
    pub fn cross_layout(&self) -> Option<&Layout> {
        self.cross_layout.as_ref()
    }

    /// Adds one row an opening behind the live rows and appends the logits behind each. `encoded` has a slot an opening.
    pub fn open_rows(
        &mut self,
        openings: &[Opening<'_>],
        encoded: Option<Encoded>,
        scores: &mut Vec<f32>,
    ) -> Result<(), RuntimeError> {
        let mut rows: Vec<Row> = Vec::with_capacity(openings.len());
        for (slot, opening) in openings.iter().enumerate() {
            let (length, n_encoded) = (opening.n_positions(), encoded.as_ref().map_or(1, |encoded| encoded.lengths[slot]));
            let limit = length + opening.max_new_tokens;
            rows.push(Row { slot, length, offset: opening.offset(), limit, n_encoded, opening: self.n_openings });
            self.n_openings += 1;
        }
        let size = Size {
            n_slots: if self.rows.is_empty() { rows.len() } else { self.n_slots_for(self.rows.len() + rows.len()) },
            capacity: rows.iter().chain(&self.rows).map(|row| row.limit).max().unwrap_or(0),
            n_encoded: rows.iter().chain(&self.rows).map(|row| row.n_encoded).max().unwrap_or(1),
        };
        let mut lanes = self.lanes_for(size)?;
        if self.rows.is_empty() {
            self.adopt(&mut lanes, encoded.as_ref(), &rows, &rows)?;
            let mut cross = lanes.cross.take();
            let read = self.read(&mut lanes.cache, cross.as_mut().map(|cross| &mut cross.cache), openings, &rows, scores);
            lanes.cross = cross;
            read?;
        } else {
            let longest = rows.iter().map(|row| row.length).max().unwrap_or(0);
            let mut aside = Cache::new(&self.graph, &self.layout, rows.len(), longest)?;
            let mut encoded = encoded;
            self.read(&mut aside, encoded.as_mut().map(|encoded| &mut encoded.cache), openings, &rows, scores)?;
            let from = rows.clone();
            let mut free = (0..size.n_slots).filter(|slot| self.rows.iter().all(|row| row.slot != *slot));
            for row in &mut rows {
                row.slot = free.next().expect("there are as many slots as rows");
            }
            lanes.cache.copy_from(&self.graph, &aside, &moves(&from, &rows, |row| row.length))?;
            self.adopt(&mut lanes, encoded.as_ref(), &from, &rows)?;
        }
        self.lanes = Some(lanes);
        self.rows.extend(rows);
        Ok(())
    }

    /// Replaces the live rows by `picks` and `scores` by theirs.
    pub fn step(&mut self, picks: &[Pick], scores: &mut Vec<f32>) -> Result<(), RuntimeError> {
        let mut lanes = self.continue_rows(picks)?;
        self.write_picks(&mut lanes.inputs, picks).map_err(|error| error.or(&self.graph))?;
        lanes.inputs.bind(&mut lanes.binding)?;
        self.graph.run_bound(&lanes.binding)?;
        let (values, size) = (self.checked(&lanes.logits)?, self.facts.vocab_size);
        scores.clear();
        for row in &self.rows {
            scores.extend_from_slice(&values[row.slot * size..(row.slot + 1) * size]);
        }
        self.lanes = Some(lanes);
        Ok(())
    }

    /// Forgets every row.
    pub fn clear(&mut self) {
        self.rows.clear();
    }

    /// Reads openings on their own, live rows untouched; `each` gets the logits behind each of the last `n_logits[row]` positions of
    /// each row, in order.
    pub fn look(
        &mut self,
        openings: &[Opening<'_>],
        n_logits: &[usize],
        encoded: Option<Encoded>,
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<(), RuntimeError> {
        let longest = openings.iter().map(Opening::n_positions).max().unwrap_or(0);
        let mut cache = Cache::new(&self.graph, &self.layout, openings.len(), longest)?;
        let mut encoded = encoded;
        let lengths = encoded.as_ref().map(|encoded| encoded.lengths.clone());
        let most = n_logits.iter().copied().max().unwrap_or(0);
        let cross = encoded.as_mut().map(|encoded| &mut encoded.cache);
        let logits = self.run(&mut cache, cross, openings, lengths.as_deref(), most)?;
        let (values, size) = (self.checked(&logits)?, self.facts.vocab_size);
        for (row, wanted) in n_logits.iter().enumerate() {
            for place in most - wanted..most {
                let at = (row * most + place) * size;
                each(row, &values[at..at + size]);
            }
        }
        Ok(())
    }

    /// Runs openings through `cache`, slot by slot, and appends the logits behind each.
    fn read(
        &mut self,
        cache: &mut Cache,
        cross: Option<&mut Cache>,
        openings: &[Opening<'_>],
        rows: &[Row],
        scores: &mut Vec<f32>,
    ) -> Result<(), RuntimeError> {
        let lengths: Option<Vec<usize>> = cross.is_some().then(|| rows.iter().map(|row| row.n_encoded).collect());
        let logits = self.run(cache, cross, openings, lengths.as_deref(), 1)?;
        scores.extend_from_slice(self.checked(&logits)?);
        Ok(())
    }

    fn run(
        &mut self,
        cache: &mut Cache,
        cross: Option<&mut Cache>,
        openings: &[Opening<'_>],
        encoder_lengths: Option<&[usize]>,
        n_logits: usize,
    ) -> Result<Tensor, RuntimeError> {
        for (slot, opening) in openings.iter().enumerate() {
            if let Some(cached) = opening.cached {
                let step = Move { from: cached.row(), to: slot, n_positions: cached.n_positions() };
                cache.copy_tensors(&self.graph, cached.tensors(), &[step])?;
            }
        }
        let longest = openings.iter().map(Opening::n_read).max().unwrap_or(0);
        let mut inputs =
            Inputs::new(&self.graph, [openings.len(), longest, n_logits], self.facts.hidden, encoder_lengths.is_some())?;
        self.write_openings(&mut inputs, openings, longest, n_logits).map_err(|error| error.or(&self.graph))?;
        if let (Some(tensor), Some(lengths)) = (&mut inputs.encoder_lengths, encoder_lengths) {
            let values = tensor.i32_mut().map_err(|source| self.graph.failed("writing inputs", source))?;
            values.iter_mut().zip(lengths).for_each(|(into, length)| *into = *length as i32);
        }
        let mut logits = self.logits(openings.len(), n_logits)?;
        let mut binding = self.graph.binding()?;
        inputs.bind(&mut binding)?;
        binding.input("logits_at", &inputs.logits_at)?;
        binding.output("logits", &mut logits)?;
        cache.bind(&mut binding)?;
        if let Some(cross) = cross {
            cross.bind(&mut binding)?;
        }
        self.graph.run_bound(&binding)?;
        Ok(logits)
    }

    /// Rows shorter than the longest are padded on the right: what is computed there is never read.
    fn write_openings(
        &mut self,
        inputs: &mut Inputs,
        openings: &[Opening<'_>],
        longest: usize,
        n_logits: usize,
    ) -> Result<(), Trouble> {
        let rows = inputs.embeds.f32_mut()?.chunks_exact_mut(longest * self.facts.hidden);
        for (opening, row) in openings.iter().zip(rows) {
            self.embedding.write(opening.queries, opening.tokens, row)?;
        }
        for (at, position) in inputs.positions.i64_mut()?.iter_mut().enumerate() {
            *position = (at % longest) as i64;
        }
        for (length, opening) in inputs.lengths.i32_mut()?.iter_mut().zip(openings) {
            *length = opening.n_positions() as i32 - 1;
        }
        for (at, opening) in inputs.logits_at.i64_mut()?.chunks_exact_mut(n_logits).zip(openings) {
            for (place, at) in at.iter_mut().enumerate() {
                *at = (opening.n_read() + place).saturating_sub(n_logits) as i64;
            }
        }
        let total = openings.iter().map(Opening::n_positions).max().unwrap_or(0);
        inputs.total.i32_mut()?.fill(total as i32);
        Ok(())
    }

    /// Writes one token a row; slots without a row get a harmless one at position 0.
    fn write_picks(&mut self, inputs: &mut Inputs, picks: &[Pick]) -> Result<(), Trouble> {
        inputs.positions.i64_mut()?.fill(0);
        inputs.lengths.i32_mut()?.fill(0);
        if let Some(lengths) = &mut inputs.encoder_lengths {
            lengths.i32_mut()?.fill(1);
        }
        for (row, pick) in self.rows.iter_mut().zip(picks) {
            let into = inputs.embeds.f32_mut()?.chunks_exact_mut(self.facts.hidden).nth(row.slot);
            self.embedding.read(pick.token, into.expect("every row has a slot"))?;
            inputs.positions.i64_mut()?[row.slot] = (row.length - row.offset) as i64;
            inputs.lengths.i32_mut()?[row.slot] = row.length as i32;
            if let Some(lengths) = &mut inputs.encoder_lengths {
                lengths.i32_mut()?[row.slot] = row.n_encoded as i32;
            }
            row.length += 1;
        }
        let longest = self.rows.iter().map(|row| row.length).max().unwrap_or(0);
        inputs.total.i32_mut()?.fill(longest as i32);
        Ok(())
    }

    fn logits(&self, n_rows: usize, n_logits: usize) -> Result<Tensor, RuntimeError> {
        self.graph.allocate(Dtype::Float32, &[n_rows, n_logits, self.facts.vocab_size], Place::Host)
    }

    fn checked<'a>(&self, logits: &'a Tensor) -> Result<&'a [f32], RuntimeError> {
        let values = logits.f32().map_err(|source| self.graph.failed("reading logits", source))?;
        if values.iter().any(|value| value.is_nan()) {
            return Err(RuntimeError::NotANumber { graph: "decoder".into(), output: "logits".into() });
        }
        Ok(values)
    }

    /// Lanes of exactly this many slots and at least this capacity, with every live row in them.
    fn lanes_for(&mut self, size: Size) -> Result<Lanes, RuntimeError> {
        let Some(old) = self.lanes.take() else { return self.new_lanes(size) };
        let n_encoded = old.cross.as_ref().map_or(1, |cross| cross.cache.capacity());
        if old.cache.n_slots() == size.n_slots && old.cache.capacity() >= size.capacity && n_encoded >= size.n_encoded {
            return Ok(old);
        }
        if self.rows.is_empty() {
            return self.new_lanes(size);
        }
        let capacity = size.capacity.max(old.cache.capacity());
        let mut larger = self.new_lanes(Size { capacity, n_encoded: size.n_encoded.max(n_encoded), ..size })?;
        let from = self.rows.clone();
        for (slot, row) in self.rows.iter_mut().enumerate() {
            row.slot = slot;
        }
        larger.cache.copy_from(&self.graph, &old.cache, &moves(&from, &self.rows, |row| row.length))?;
        if let (Some(into), Some(old)) = (&mut larger.cross, &old.cross) {
            into.adopt(&self.graph, &old.cache, &from, &self.rows)?;
        }
        Ok(larger)
    }

    fn new_lanes(&self, size: Size) -> Result<Lanes, RuntimeError> {
        let Size { n_slots, n_encoded, .. } = size;
        let mut cache = Cache::new(&self.graph, &self.layout, n_slots, size.capacity.next_multiple_of(CAPACITY_STEP))?;
        let inputs = Inputs::new(&self.graph, [n_slots, 1, 1], self.facts.hidden, self.cross_layout.is_some())?;
        let mut logits = self.logits(n_slots, 1)?;
        let mut binding = self.graph.binding()?;
        binding.input("logits_at", &inputs.logits_at)?;
        binding.output("logits", &mut logits)?;
        cache.bind(&mut binding)?;
        let cross = self.cross_layout.as_ref().map(|layout| {
            let mut cache = Cache::new(&self.graph, layout, n_slots, n_encoded)?;
            cache.bind(&mut binding)?;
            Ok::<_, RuntimeError>(Cross { cache, openings: vec![u64::MAX; n_slots] })
        });
        Ok(Lanes { cache, cross: cross.transpose()?, binding, inputs, logits })
    }

    /// Copies what the encoder made of new rows to their slots.
    fn adopt(&self, lanes: &mut Lanes, encoded: Option<&Encoded>, from: &[Row], to: &[Row]) -> Result<(), RuntimeError> {
        match (&mut lanes.cross, encoded) {
            (Some(cross), Some(encoded)) => cross.adopt(&self.graph, &encoded.cache, from, to),
            _ => Ok(()),
        }
    }

    /// Gives every pick a slot: the first child of a row stays in its slot, its siblings get copies in free slots.
    fn continue_rows(&mut self, picks: &[Pick]) -> Result<Lanes, RuntimeError> {
        let needed = picks.iter().map(|pick| self.rows[pick.parent].length + 1).max().unwrap_or(0);
        let wanted = self.n_slots_for(picks.len());
        let (before, capacity) = self.lanes.as_ref().map_or((0, 0), |lanes| (lanes.cache.n_slots(), lanes.cache.capacity()));
        let mut lanes = self.lanes_for(Size { n_slots: before.max(wanted), capacity: needed.max(capacity), n_encoded: 1 })?;
        let mut free = vec![true; lanes.cache.n_slots()];
        let stays: Vec<bool> = picks.iter().map(|pick| std::mem::take(&mut free[self.rows[pick.parent].slot])).collect();
        let mut free = (0..free.len()).filter(|slot| free[*slot]);
        let (mut from, mut to, mut rows) = (Vec::new(), Vec::new(), Vec::with_capacity(picks.len()));
        for (pick, stays) in picks.iter().zip(stays) {
            let mut row = self.rows[pick.parent];
            if !stays {
                from.push(row);
                row.slot = free.next().expect("there are as many slots as rows");
                to.push(row);
            }
            rows.push(row);
        }
        lanes.cache.copy_within(&self.graph, &moves(&from, &to, |row| row.length))?;
        if let Some(cross) = &mut lanes.cross {
            cross.follow(&self.graph, &from, &to)?;
        }
        self.rows = rows;
        if wanted < lanes.cache.n_slots() {
            let capacity = self.rows.iter().map(|row| row.limit.max(needed)).max().unwrap_or(0);
            let n_encoded = self.rows.iter().map(|row| row.n_encoded).max().unwrap_or(1);
            self.lanes = Some(lanes);
            return self.lanes_for(Size { n_slots: wanted, capacity, n_encoded });
        }
        Ok(lanes)
    }

    /// Slots grow to powers of two and shrink when three of four are idle, so that coming and going rows seldom move.
    fn n_slots_for(&self, n_rows: usize) -> usize {
        let now = self.lanes.as_ref().map_or(0, |lanes| lanes.cache.n_slots());
        if n_rows > now || n_rows * 4 <= now { n_rows.next_power_of_two() } else { now }
    }
}

impl Cross {
    /// Copies the slots of `from` in another cache to the slots of `to` here.
    fn adopt(&mut self, graph: &Graph, other: &Cache, from: &[Row], to: &[Row]) -> Result<(), RuntimeError> {
        self.cache.copy_from(graph, other, &moves(from, to, |row| row.n_encoded))?;
        to.iter().for_each(|row| self.openings[row.slot] = row.opening);
        Ok(())
    }

    /// Rows moved within: slots that hold the same prefix already, as those of a search's beams soon do, are left alone.
    fn follow(&mut self, graph: &Graph, from: &[Row], to: &[Row]) -> Result<(), RuntimeError> {
        let strangers = |(_, to): &(&Row, &Row)| self.openings[to.slot] != to.opening;
        let (from, to): (Vec<Row>, Vec<Row>) = from.iter().zip(to).filter(strangers).map(|(from, to)| (*from, *to)).unzip();
        self.cache.copy_within(graph, &moves(&from, &to, |row| row.n_encoded))?;
        to.iter().for_each(|row| self.openings[row.slot] = row.opening);
        Ok(())
    }
}

fn moves(from: &[Row], to: &[Row], n_positions: impl Fn(&Row) -> usize) -> Vec<Move> {
    from.iter().zip(to).map(|(from, to)| Move { from: from.slot, to: to.slot, n_positions: n_positions(from) }).collect()
}

impl Inputs {
    /// `[rows, positions, logits a row]`.
    fn new(graph: &Graph, shape: [usize; 3], hidden: usize, has_encoder: bool) -> Result<Self, RuntimeError> {
        let [n_rows, n_positions, n_logits] = shape;
        let encoder_lengths = has_encoder.then(|| graph.allocate(Dtype::Int32, &[n_rows], Place::Host));
        Ok(Self {
            embeds: graph.allocate(Dtype::Float32, &[n_rows, n_positions, hidden], Place::Host)?,
            positions: graph.allocate(Dtype::Int64, &[n_rows, n_positions], Place::Host)?,
            lengths: graph.allocate(Dtype::Int32, &[n_rows], Place::Host)?,
            total: graph.allocate(Dtype::Int32, &[], Place::Host)?,
            logits_at: graph.allocate(Dtype::Int64, &[n_rows, n_logits], Place::Host)?,
            encoder_lengths: encoder_lengths.transpose()?,
        })
    }

    /// Ties the inputs that change from run to run. `seqlens_k` counts from the last position, hence one less than the length.
    fn bind(&self, binding: &mut Binding) -> Result<(), RuntimeError> {
        binding.input("inputs_embeds", &self.embeds)?;
        binding.input("position_ids", &self.positions)?;
        binding.input("seqlens_k", &self.lengths)?;
        binding.input("total_sequence_length", &self.total)?;
        match &self.encoder_lengths {
            Some(lengths) => binding.input("encoder_lengths", lengths),
            None => Ok(()),
        }
    }
}

/// What can go wrong while inputs are written.
enum Trouble {
    Tensor(GraphError),
    Runtime(RuntimeError),
}

impl Trouble {
    fn or(self, graph: &Graph) -> RuntimeError {
        match self {
            Self::Tensor(source) => graph.failed("writing inputs", source),
            Self::Runtime(error) => error,
        }
    }
}

impl From<GraphError> for Trouble {
    fn from(error: GraphError) -> Self {
        Self::Tensor(error)
    }
}

impl From<RuntimeError> for Trouble {
    fn from(error: RuntimeError) -> Self {
        Self::Runtime(error)
    }
}
