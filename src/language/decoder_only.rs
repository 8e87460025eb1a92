//! OPT and its kind: query tokens, prompt and generated tokens are one sequence in one decoder.

use super::Prefix;
use super::cache::{Cache, Move};
use super::embedding::Embedding;
use crate::bundle::{Bundle, BundleError, Dtype, LanguageFacts};
use crate::decode::{Model, Pick};
use crate::runtime::{Binding, Graph, GraphError, Place, Runtime, RuntimeError, Tensor};

/// Capacities are multiples of this, so that requests of nearly equal length share buffers.
const CAPACITY_STEP: usize = 64;

/// The decoder graph with its embedding table and the KV cache of all live rows.
#[derive(Debug)]
pub struct DecoderOnly {
    graph: Graph,
    embedding: Embedding,
    facts: LanguageFacts,
    rows: Vec<Row>,
    lanes: Option<Lanes>,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    slot: usize,
    /// Positions in the cache.
    length: usize,
    /// Positions that it may come to.
    limit: usize,
}

/// The cache and, of the same number of slots, what a decode step reads and writes. Nothing here is allocated in a step.
#[derive(Debug)]
struct Lanes {
    cache: Cache,
    binding: Binding,
    inputs: Inputs,
    logits: Tensor,
}

#[derive(Debug)]
struct Inputs {
    embeds: Tensor,
    positions: Tensor,
    lengths: Tensor,
    total: Tensor,
    logits_at: Tensor,
}

impl DecoderOnly {
    /// Loads the graph and opens the embedding table.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        let graph = Graph::open(runtime, bundle, "decoder")?;
        let facts = bundle.facts().language.clone();
        Ok(Self { graph, embedding: Embedding::open(bundle)?, facts, rows: Vec::new(), lanes: None })
    }

    /// Runs the prompts through `cache`, slot by slot, and appends the logits behind each.
    fn fill(&mut self, mut cache: Cache, prompts: &[Prefix], scores: &mut Vec<f32>) -> Result<Cache, RuntimeError> {
        let longest = prompts.iter().map(Prefix::n_positions).max().unwrap_or(0);
        let mut inputs = Inputs::new(&self.graph, prompts.len(), longest, self.facts.hidden)?;
        self.write_prompts(&mut inputs, prompts, longest).map_err(|error| error.or(&self.graph))?;
        let mut logits = self.logits(prompts.len())?;
        let mut binding = self.graph.binding()?;
        inputs.bind(&mut binding)?;
        binding.input("logits_at", &inputs.logits_at)?;
        binding.output("logits", &mut logits)?;
        cache.bind(&mut binding)?;
        self.graph.run_bound(&binding)?;
        let values = self.checked(&logits)?;
        scores.extend_from_slice(values);
        Ok(cache)
    }

    /// Rows shorter than the longest are padded on the right: what is computed there is never read.
    fn write_prompts(&mut self, inputs: &mut Inputs, prompts: &[Prefix], longest: usize) -> Result<(), Trouble> {
        let hidden = self.facts.hidden;
        for (row, positions) in inputs.embeds.f32_mut()?.chunks_exact_mut(longest * hidden).enumerate() {
            let prefix = &prompts[row];
            let mut positions = positions.chunks_exact_mut(hidden);
            for (query, into) in prefix.queries.0.outer_iter().zip(&mut positions) {
                into.copy_from_slice(query.as_slice().expect("rows of a row-major array are contiguous"));
            }
            for (&token, into) in prefix.prompt.iter().zip(&mut positions) {
                self.embedding.read(token, into)?;
            }
        }
        for (at, position) in inputs.positions.i64_mut()?.iter_mut().enumerate() {
            *position = (at % longest) as i64;
        }
        for (length, prefix) in inputs.lengths.i32_mut()?.iter_mut().zip(prompts) {
            *length = prefix.n_positions() as i32 - 1;
        }
        for (at, prefix) in inputs.logits_at.i64_mut()?.iter_mut().zip(prompts) {
            *at = prefix.n_positions() as i64 - 1;
        }
        inputs.total.i32_mut()?.fill(longest as i32);
        Ok(())
    }

    /// Writes one token a row; slots without a row get a harmless one at position 0.
    fn write_picks(&mut self, inputs: &mut Inputs, picks: &[Pick]) -> Result<(), Trouble> {
        inputs.positions.i64_mut()?.fill(0);
        inputs.lengths.i32_mut()?.fill(0);
        for (row, pick) in self.rows.iter_mut().zip(picks) {
            let into = inputs.embeds.f32_mut()?.chunks_exact_mut(self.facts.hidden).nth(row.slot);
            self.embedding.read(pick.token, into.expect("every row has a slot"))?;
            inputs.positions.i64_mut()?[row.slot] = row.length as i64;
            inputs.lengths.i32_mut()?[row.slot] = row.length as i32;
            row.length += 1;
        }
        let longest = self.rows.iter().map(|row| row.length).max().unwrap_or(0);
        inputs.total.i32_mut()?.fill(longest as i32);
        Ok(())
    }

    fn logits(&self, n_rows: usize) -> Result<Tensor, RuntimeError> {
        self.graph.allocate(Dtype::Float32, &[n_rows, 1, self.facts.vocab_size], Place::Host)
    }

    fn checked<'a>(&self, logits: &'a Tensor) -> Result<&'a [f32], RuntimeError> {
        let values = logits.f32().map_err(|source| self.graph.failed("reading logits", source))?;
        if values.iter().any(|value| value.is_nan()) {
            return Err(RuntimeError::NotANumber { graph: "decoder".into(), output: "logits".into() });
        }
        Ok(values)
    }

    /// Lanes of exactly this many slots and at least this capacity, with every live row in them.
    fn lanes_for(&mut self, n_slots: usize, capacity: usize) -> Result<Lanes, RuntimeError> {
        let old = self.lanes.take();
        if let Some(lanes) = old {
            if lanes.cache.n_slots() == n_slots && lanes.cache.capacity() >= capacity {
                return Ok(lanes);
            }
            if !self.rows.is_empty() {
                let mut larger = self.new_lanes(n_slots, capacity.max(lanes.cache.capacity()))?;
                let moves: Vec<Move> =
                    self.rows.iter().enumerate().map(|(to, row)| Move { from: row.slot, to, n_positions: row.length }).collect();
                larger.cache.copy_from(&self.graph, &lanes.cache, &moves)?;
                for (slot, row) in self.rows.iter_mut().enumerate() {
                    row.slot = slot;
                }
                return Ok(larger);
            }
        }
        self.new_lanes(n_slots, capacity)
    }

    fn new_lanes(&self, n_slots: usize, capacity: usize) -> Result<Lanes, RuntimeError> {
        let capacity = capacity.next_multiple_of(CAPACITY_STEP);
        let mut cache = Cache::new(&self.graph, &self.facts.kv_cache, n_slots, capacity)?;
        let inputs = Inputs::new(&self.graph, n_slots, 1, self.facts.hidden)?;
        let mut logits = self.logits(n_slots)?;
        let mut binding = self.graph.binding()?;
        binding.input("logits_at", &inputs.logits_at)?;
        binding.output("logits", &mut logits)?;
        cache.bind(&mut binding)?;
        Ok(Lanes { cache, binding, inputs, logits })
    }

    /// Gives every pick a slot: the first child of a row stays in its slot, its siblings get copies in free slots.
    fn continue_rows(&mut self, picks: &[Pick]) -> Result<Lanes, RuntimeError> {
        let needed = picks.iter().map(|pick| self.rows[pick.parent].length + 1).max().unwrap_or(0);
        let wanted = self.n_slots_for(picks.len());
        let (before, capacity) = self.lanes.as_ref().map_or((0, 0), |lanes| (lanes.cache.n_slots(), lanes.cache.capacity()));
        let mut lanes = self.lanes_for(before.max(wanted), needed.max(capacity))?;
        let mut free = vec![true; lanes.cache.n_slots()];
        let stays: Vec<bool> = picks.iter().map(|pick| std::mem::take(&mut free[self.rows[pick.parent].slot])).collect();
        let mut free = (0..free.len()).filter(|slot| free[*slot]);
        let mut moves = Vec::new();
        let mut rows = Vec::with_capacity(picks.len());
        for (pick, stays) in picks.iter().zip(stays) {
            let mut row = self.rows[pick.parent];
            if !stays {
                let to = free.next().expect("there are as many slots as rows");
                moves.push(Move { from: row.slot, to, n_positions: row.length });
                row.slot = to;
            }
            rows.push(row);
        }
        lanes.cache.copy_within(&self.graph, &moves)?;
        self.rows = rows;
        if wanted < lanes.cache.n_slots() {
            let capacity = self.rows.iter().map(|row| row.limit.max(needed)).max().unwrap_or(0);
            self.lanes = Some(lanes);
            return self.lanes_for(wanted, capacity);
        }
        Ok(lanes)
    }

    /// Slots grow to powers of two and shrink when three of four are idle, so that coming and going rows seldom move.
    fn n_slots_for(&self, n_rows: usize) -> usize {
        let now = self.lanes.as_ref().map_or(0, |lanes| lanes.cache.n_slots());
        if n_rows > now || n_rows * 4 <= now { n_rows.next_power_of_two() } else { now }
    }
}

impl Model for DecoderOnly {
    type Prompt = Prefix;
    type Error = RuntimeError;

    fn vocabulary(&self) -> usize {
        self.facts.vocab_size
    }

    fn prefill(&mut self, prompts: &[Prefix], scores: &mut Vec<f32>) -> Result<(), RuntimeError> {
        let new = |(slot, prefix): (usize, &Prefix)| Row {
            slot,
            length: prefix.n_positions(),
            limit: prefix.n_positions() + prefix.max_new_tokens,
        };
        let mut rows: Vec<Row> = prompts.iter().enumerate().map(new).collect();
        let capacity = rows.iter().chain(&self.rows).map(|row| row.limit).max().unwrap_or(0);
        if self.rows.is_empty() {
            let mut lanes = self.lanes_for(prompts.len(), capacity)?;
            lanes.cache = self.fill(lanes.cache, prompts, scores)?;
            (self.lanes, self.rows) = (Some(lanes), rows);
            return Ok(());
        }
        let longest = prompts.iter().map(Prefix::n_positions).max().unwrap_or(0);
        let aside = Cache::new(&self.graph, &self.facts.kv_cache, prompts.len(), longest)?;
        let aside = self.fill(aside, prompts, scores)?;
        let n_slots = self.n_slots_for(self.rows.len() + prompts.len());
        let mut lanes = self.lanes_for(n_slots, capacity)?;
        let mut free = (0..n_slots).filter(|slot| self.rows.iter().all(|row| row.slot != *slot));
        let mut moves = Vec::with_capacity(rows.len());
        for row in &mut rows {
            let to = free.next().expect("there are as many slots as rows");
            moves.push(Move { from: row.slot, to, n_positions: row.length });
            row.slot = to;
        }
        lanes.cache.copy_from(&self.graph, &aside, &moves)?;
        self.lanes = Some(lanes);
        self.rows.extend(rows);
        Ok(())
    }

    fn step(&mut self, picks: &[Pick], scores: &mut Vec<f32>) -> Result<(), RuntimeError> {
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

    fn clear(&mut self) {
        self.rows.clear();
    }
}

impl Inputs {
    fn new(graph: &Graph, n_rows: usize, n_positions: usize, hidden: usize) -> Result<Self, RuntimeError> {
        Ok(Self {
            embeds: graph.allocate(Dtype::Float32, &[n_rows, n_positions, hidden], Place::Host)?,
            positions: graph.allocate(Dtype::Int64, &[n_rows, n_positions], Place::Host)?,
            lengths: graph.allocate(Dtype::Int32, &[n_rows], Place::Host)?,
            total: graph.allocate(Dtype::Int32, &[], Place::Host)?,
            logits_at: graph.allocate(Dtype::Int64, &[n_rows, 1], Place::Host)?,
        })
    }

    /// Ties the inputs that change from run to run. `seqlens_k` counts from the last position, hence one less than the length.
    fn bind(&self, binding: &mut Binding) -> Result<(), RuntimeError> {
        binding.input("inputs_embeds", &self.embeds)?;
        binding.input("position_ids", &self.positions)?;
        binding.input("seqlens_k", &self.lengths)?;
        binding.input("total_sequence_length", &self.total)
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
