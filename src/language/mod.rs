//! [`Prefix`] → next-token logits, with a KV cache. Knowledge of the language model's family begins here.

mod cache;
mod decoder;
mod encoder;
mod inputs;
mod lanes;
pub mod rows;
mod shared;
mod step;

use crate::bundle::{Bundle, BundleError, Family, TokenIds};
use std::ops::Range;

use crate::decode::{Model, Pick, Room, Scores, StrategyError, TokenId};
use crate::qformer::{Queries, QueryCache};
use crate::runtime::{Budget, Cancel, Runtime, RuntimeError};
use cache::Layout;
pub(crate) use decoder::Blank;
use decoder::{Decoder, Opening};
use encoder::{Encoded, Encoder};
use lanes::capacity;

/// What one text starts from: what was seen, prompt, and room for what is to be written.
#[derive(Clone, Debug)]
pub struct Prefix {
    /// What the Q-Former made of the picture.
    pub seen: Seen,
    /// Token ids behind it.
    pub prompt: Vec<TokenId>,
    /// Tokens that may follow.
    pub max_new_tokens: usize,
}

/// What a text is written about.
#[derive(Clone, Debug)]
pub enum Seen {
    /// `[queries, hidden]`, projected to the language model's width.
    Queries(Queries),
    /// Keys and values of the queries, for a Q-Former that writes itself.
    Cached(QueryCache),
}

impl Prefix {
    fn queries(&self) -> Option<&Queries> {
        match &self.seen {
            Seen::Queries(queries) => Some(queries),
            Seen::Cached(_) => None,
        }
    }

    fn cached(&self) -> Option<&QueryCache> {
        match &self.seen {
            Seen::Queries(_) => None,
            Seen::Cached(cached) => Some(cached),
        }
    }

    fn n_positions(&self) -> usize {
        self.queries().map_or(0, |queries| queries.n_queries()) + self.prompt.len()
    }
}

/// A language model of any family.
#[derive(Debug)]
pub struct LanguageModel {
    decoder: Decoder,
    encoder: Option<Encoder>,
    family: Family,
    token_ids: TokenIds,
    vocab_size: usize,
    budget: Budget,
    /// Room that is never given up.
    least: Room,
    /// What a decoder behind an encoder reads first.
    start: Vec<TokenId>,
}

/// What rows of a language model take, for those who have not the model at hand.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Keys and values of a position.
    position_bytes: u64,
    /// Keys and values of a position that an encoder read.
    encoded_bytes: u64,
    vocab_size: usize,
    /// What a decoder behind an encoder reads first.
    n_start: Option<usize>,
    budget: Budget,
}

impl LanguageModel {
    /// Loads the bundle's graphs.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        let family = bundle.facts().family;
        let encoder = (family == Family::EncoderDecoder).then(|| Encoder::open(runtime, bundle)).transpose()?;
        let (token_ids, vocab_size) = (bundle.language().token_ids.clone(), bundle.language().vocab_size);
        let start = token_ids.decoder_start.into_iter().collect();
        Ok(Self {
            decoder: Decoder::open(runtime, bundle)?,
            encoder,
            family,
            token_ids,
            vocab_size,
            budget: runtime.budget(bundle)?,
            least: Room::default(),
            start,
        })
    }

    /// Lets `cancel` stop every later run.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        if let Some(encoder) = &mut self.encoder {
            encoder.set_cancel(cancel.clone());
        }
        self.decoder.set_cancel(cancel);
    }

    /// Token ids in front of the new ones, as the reference's searches see them: with the image token in the place of every query, or
    /// behind an encoder only what the decoder starts with.
    pub fn history(&self, prefix: &Prefix) -> Vec<TokenId> {
        match self.family {
            Family::EncoderDecoder => self.start.clone(),
            Family::DecoderOnly | Family::Qformer => {
                let n_queries = prefix.queries().map_or(0, |queries| queries.n_queries());
                let queries = self.token_ids.image.into_iter().flat_map(|token| std::iter::repeat_n(token, n_queries));
                queries.chain(prefix.prompt.iter().copied()).collect()
            }
        }
    }

    /// What the encoder makes of prefixes; nothing where there is none.
    pub(crate) fn encode(&mut self, prefixes: &[Prefix]) -> Result<Option<Encoded>, RuntimeError> {
        let (Some(encoder), Some(layout)) = (&mut self.encoder, &self.decoder.layouts().encoded) else { return Ok(None) };
        encoder.encode(prefixes, layout).map(Some)
    }

    /// What the decoder reads of prefixes that were encoded where there is an encoder.
    pub(crate) fn open_rows(&mut self, prefixes: &[Prefix], encoded: Option<Encoded>) -> Result<(), RuntimeError> {
        let start = self.encoder.is_some().then_some(self.start.as_slice());
        let openings: Vec<Opening<'_>> = prefixes.iter().map(|prefix| opening(prefix, start)).collect();
        self.decoder.open_rows(&openings, encoded)
    }

    /// Slots for rows as if `past` positions of each had been read, to measure with [`alone`](Self::alone).
    pub(crate) fn blank(&mut self, prefix: &Prefix, n_rows: usize, past: usize) -> Result<Blank, RuntimeError> {
        let start = self.encoder.is_some().then_some(self.start.as_slice());
        let offset = opening(prefix, start).offset();
        let room = Room { rows: n_rows, positions: past + 1, ..self.room(prefix) };
        if self.bytes(room) > self.allowed_bytes() { Err(self.no_room(room)) } else { self.decoder.blank(room, past, offset) }
    }

    /// Runs `work` with the rows of `blank`, which are as they were at first, in the place of the live ones.
    pub(crate) fn alone<T>(&mut self, blank: &mut Blank, work: impl FnOnce(&mut Self) -> T) -> T {
        blank.renew();
        self.decoder.exchange(blank);
        let done = work(self);
        self.decoder.exchange(blank);
        done
    }

    /// Copies what rows need that continue `parents`, as the next step would.
    pub(crate) fn fork(&mut self, parents: &[usize]) -> Result<(), RuntimeError> {
        self.decoder.fork(parents)
    }

    /// Makes room that is never given up, however little is needed; false if there is not as much.
    pub fn hold(&mut self, room: Room) -> Result<bool, RuntimeError> {
        let before = std::mem::replace(&mut self.least, room);
        let held = self.reserve(room);
        if !matches!(held, Ok(true)) {
            self.least = before;
        }
        held
    }

    /// What rows take.
    pub fn sizes(&self) -> Sizes {
        let layouts = self.decoder.layouts();
        Sizes {
            position_bytes: layouts.past.bytes_per_position(),
            encoded_bytes: layouts.encoded.as_ref().map_or(0, Layout::bytes_per_position),
            vocab_size: self.vocab_size,
            n_start: self.encoder.is_some().then_some(self.start.len()),
            budget: self.budget,
        }
    }

    /// Bytes of keys, values and logits that this much room takes.
    pub fn bytes(&self, room: Room) -> u64 {
        self.sizes().bytes(room)
    }

    /// Says that the memory does not hold as much.
    pub fn too_large(&self, room: Room) -> StrategyError {
        self.sizes().too_large(room, self.allowed_bytes())
    }

    /// Refuses what the memory does not hold, all that is held given up.
    pub fn check(&self, room: Room) -> Result<(), StrategyError> {
        // To ask the system what is free takes longer than a small step.
        if self.holds(room) { Ok(()) } else { self.sizes().check(room, self.bytes(self.decoder.room())) }
    }

    /// Positions that a slot is made for.
    pub fn capacity(room: Room) -> usize {
        capacity(room.positions)
    }

    /// Bytes that may be taken, those that are held included.
    pub fn allowed_bytes(&self) -> u64 {
        self.budget.allowed(self.bytes(self.decoder.room()))
    }

    /// Whether there is so much room already.
    pub fn holds(&self, room: Room) -> bool {
        let now = self.decoder.room();
        now.rows >= room.rows && now.positions >= room.positions && now.read >= room.read
    }
}

impl Sizes {
    /// What texts need in so many rows, with so many positions of picture and prompt before them.
    pub fn room(&self, n_read: usize, n_new: usize, n_rows: usize) -> Room {
        Room { rows: n_rows, positions: self.n_start.unwrap_or(n_read).saturating_add(n_new), read: n_read }
    }

    /// Refuses what the memory does not hold, `held_bytes` of which are held already.
    pub fn check(&self, room: Room, held_bytes: u64) -> Result<(), StrategyError> {
        let allowed = self.budget.allowed(held_bytes);
        if self.bytes(room) <= allowed { Ok(()) } else { Err(self.too_large(room, allowed)) }
    }

    fn too_large(&self, room: Room, allowed: u64) -> StrategyError {
        let (rows, positions) = (room.rows as u64, LanguageModel::capacity(room) as u64);
        let (position_bytes, row_bytes) = (self.position_bytes, self.row_bytes(room.read));
        StrategyError::TooLarge { rows, positions, position_bytes, row_bytes, needed: self.bytes(room), allowed }
    }

    fn bytes(&self, room: Room) -> u64 {
        let positions = LanguageModel::capacity(room) as u64;
        let row = self.position_bytes.saturating_mul(positions).saturating_add(self.row_bytes(room.read));
        row.saturating_mul(room.rows as u64)
    }

    /// What a row takes besides its positions: logits where the graph writes them and where searches change them, keys and values of
    /// what was encoded.
    fn row_bytes(&self, n_read: usize) -> u64 {
        self.encoded_bytes.saturating_mul(n_read as u64).saturating_add(8 * self.vocab_size as u64)
    }
}

/// What the decoder reads of a prefix: behind an encoder only what a text starts with.
fn opening<'a>(prefix: &'a Prefix, start: Option<&'a [TokenId]>) -> Opening<'a> {
    match start {
        Some(tokens) => Opening { cached: None, queries: None, tokens },
        None => Opening { cached: prefix.cached(), queries: prefix.queries(), tokens: &prefix.prompt },
    }
}

impl Model for LanguageModel {
    type Prompt = Prefix;
    type Error = RuntimeError;

    fn room(&self, prefix: &Prefix) -> Room {
        let start = self.encoder.is_some().then_some(self.start.as_slice());
        let positions = opening(prefix, start).n_positions() + prefix.max_new_tokens;
        Room { rows: 1, positions, read: prefix.n_positions() }
    }

    fn reserve(&mut self, wanted: Room) -> Result<bool, RuntimeError> {
        let (now, least) = (self.decoder.room(), wanted.or(self.least));
        let is_idle = self.decoder.is_idle();
        let has = self.holds(wanted);
        // Slots without a row cost little, but they cost. What was recorded is lost with its slots.
        let is_wasteful = is_idle && !self.decoder.records() && now.rows / 4 >= least.rows;
        if has && !is_wasteful {
            return Ok(true);
        }
        let rows = wanted.rows.max(self.decoder.n_live());
        let both = Room { rows, positions: now.positions.max(wanted.positions), read: now.read.max(wanted.read) };
        let doubled = Room { rows: wanted.rows.max(now.rows * 2), ..both };
        let candidates = if is_idle { [least, wanted] } else { [doubled, both] };
        let allowed = self.allowed_bytes();
        let Some(room) = candidates.into_iter().find(|room| self.bytes(*room) <= allowed) else { return Ok(has) };
        self.decoder.resize(room)?;
        Ok(true)
    }

    fn no_room(&self, wanted: Room) -> RuntimeError {
        RuntimeError::NoRoom {
            rows: wanted.rows,
            positions: wanted.positions,
            needed: self.bytes(wanted),
            allowed: self.allowed_bytes(),
        }
    }

    fn prefill(&mut self, prefixes: &[Prefix]) -> Result<(), RuntimeError> {
        let encoded = self.encode(prefixes)?;
        self.open_rows(prefixes, encoded)
    }

    fn step(&mut self, picks: &[Pick]) -> Result<(), RuntimeError> {
        self.decoder.step(picks)
    }

    fn scores(&self, rows: Range<usize>) -> Result<Scores<'_>, RuntimeError> {
        self.decoder.scores(rows)
    }

    fn keep(&mut self, rows: &[usize]) {
        self.decoder.keep(rows);
    }
}
