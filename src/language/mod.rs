//! [`Prefix`] → next-token logits, with a KV cache. Knowledge of the language model's family begins here.

mod cache;
mod decoder_only;
mod embedding;

pub use decoder_only::DecoderOnly;

use crate::decode::TokenId;
use crate::qformer::Queries;

/// What one text starts from: query tokens, prompt, and room for what is to be written.
#[derive(Clone, Debug)]
pub struct Prefix {
    /// `[queries, hidden]`, projected to the language model's width.
    pub queries: Queries,
    /// Token ids behind the queries.
    pub prompt: Vec<TokenId>,
    /// Tokens that may follow.
    pub max_new_tokens: usize,
}

impl Prefix {
    /// Token ids as the reference has them: the image token in the place of every query, then the prompt.
    pub fn history(&self, image_token: Option<TokenId>) -> Vec<TokenId> {
        let queries = image_token.into_iter().flat_map(|token| std::iter::repeat_n(token, self.queries.0.nrows()));
        queries.chain(self.prompt.iter().copied()).collect()
    }

    fn n_positions(&self) -> usize {
        self.queries.0.nrows() + self.prompt.len()
    }
}
