//! [`Prefix`] → next-token logits, with a KV cache. Knowledge of the language model's family begins here.

mod cache;
mod decoder;
mod embedding;
mod encoder;

use crate::bundle::{Bundle, BundleError, Family, TokenIds};
use crate::decode::{Model, Pick, TokenId};
use crate::qformer::{Queries, QueryCache};
use crate::runtime::{Runtime, RuntimeError};
pub use decoder::CAPACITY_STEP;
use decoder::{Decoder, Opening};
use encoder::{Encoded, Encoder};

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
    /// What a decoder behind an encoder reads first.
    start: Vec<TokenId>,
}

impl LanguageModel {
    /// Loads the bundle's graphs.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        let family = bundle.facts().family;
        let encoder = (family == Family::EncoderDecoder).then(|| Encoder::open(runtime, bundle)).transpose()?;
        let token_ids = bundle.language().token_ids.clone();
        let start = token_ids.decoder_start.into_iter().collect();
        Ok(Self { decoder: Decoder::open(runtime, bundle)?, encoder, family, token_ids, start })
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

    /// Logits in front of every token of given texts, each behind its prefix. Live rows do not notice. `each` gets the row and the logits,
    /// for a row's tokens in order.
    pub fn reread(
        &mut self,
        prefixes: &[&Prefix],
        texts: &[&[TokenId]],
        mut each: impl FnMut(usize, &[f32]),
    ) -> Result<(), RuntimeError> {
        // Behind cached positions GroupQueryAttention takes several new ones for one row only.
        let together = if self.family == Family::Qformer { 1 } else { prefixes.len().max(1) };
        for (at, (prefixes, texts)) in prefixes.chunks(together).zip(texts.chunks(together)).enumerate() {
            self.reread_batch(prefixes, texts, |row, logits| each(at * together + row, logits))?;
        }
        Ok(())
    }

    fn reread_batch(
        &mut self,
        prefixes: &[&Prefix],
        texts: &[&[TokenId]],
        each: impl FnMut(usize, &[f32]),
    ) -> Result<(), RuntimeError> {
        let encoded = self.encode(prefixes)?;
        let read = |(prefix, text): (&&Prefix, &&[TokenId])| [self.first_tokens(prefix), &text[..text.len().max(1) - 1]].concat();
        let tokens: Vec<Vec<TokenId>> = prefixes.iter().zip(texts).map(read).collect();
        let openings: Vec<Opening<'_>> =
            prefixes.iter().zip(&tokens).map(|(prefix, tokens)| opening(prefix, tokens, self.encoder.is_some())).collect();
        let n_logits: Vec<usize> = texts.iter().map(|text| text.len()).collect();
        self.decoder.look(&openings, &n_logits, encoded, each)
    }

    fn encode(&mut self, prefixes: &[&Prefix]) -> Result<Option<Encoded>, RuntimeError> {
        let (Some(encoder), Some(layout)) = (&mut self.encoder, self.decoder.cross_layout().cloned()) else { return Ok(None) };
        encoder.encode(prefixes, &mut self.decoder.embedding, &layout).map(Some)
    }

    /// What the decoder reads behind the queries.
    fn first_tokens<'a>(&'a self, prefix: &'a Prefix) -> &'a [TokenId] {
        if self.encoder.is_some() { &self.start } else { &prefix.prompt }
    }
}

/// Behind an encoder the decoder does not see the queries themselves.
fn opening<'a>(prefix: &'a Prefix, tokens: &'a [TokenId], has_encoder: bool) -> Opening<'a> {
    let queries = if has_encoder { None } else { prefix.queries() };
    Opening { cached: prefix.cached(), queries, tokens, max_new_tokens: prefix.max_new_tokens }
}

impl Model for LanguageModel {
    type Prompt = Prefix;
    type Error = RuntimeError;

    fn vocabulary(&self) -> usize {
        self.decoder.vocabulary()
    }

    fn prefill(&mut self, prompts: &[Prefix], scores: &mut Vec<f32>) -> Result<(), RuntimeError> {
        let encoded = self.encode(&prompts.iter().collect::<Vec<_>>())?;
        let has_encoder = self.encoder.is_some();
        let openings: Vec<Opening<'_>> = prompts
            .iter()
            .map(|prefix| opening(prefix, if has_encoder { &self.start } else { &prefix.prompt }, has_encoder))
            .collect();
        self.decoder.open_rows(&openings, encoded, scores)
    }

    fn step(&mut self, picks: &[Pick], scores: &mut Vec<f32>) -> Result<(), RuntimeError> {
        self.decoder.step(picks, scores)
    }

    fn clear(&mut self) {
        self.decoder.clear();
    }
}
