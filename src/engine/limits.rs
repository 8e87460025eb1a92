//! What may be asked for at once: options that make sense, and no more memory than there is.

use super::{Engine, Generation, Request};
use crate::bundle::LanguageFacts;
use crate::decode::{Strategy, StrategyError};
use crate::language::{CAPACITY_STEP, Prefix};
use crate::prompt::Prompt;

/// Bytes that texts may take which are read again together, for their likelihood.
const REREAD_BYTES: usize = 1 << 30;

impl Generation {
    /// Refuses options that make no sense, alone or together, for this language model.
    pub fn check(&self, language: &LanguageFacts) -> Result<(), StrategyError> {
        self.strategy.check(&self.processors, language.vocab_size, &language.token_ids.eos)?;
        if self.stop.iter().any(String::is_empty) {
            return Err(StrategyError::EmptyStop);
        }
        let min = self.processors.min_new_tokens;
        match self.max_new_tokens {
            Some(0) => Err(StrategyError::Zero("the limit of new tokens")),
            Some(max) if max < min => Err(StrategyError::Lengths { min, max }),
            _ => Ok(()),
        }
    }
}

impl Engine {
    /// Refuses more rows than fit into memory together with what they write.
    pub(super) fn check_memory(&self, requests: &[Request<'_>], prompts: &[Prompt]) -> Result<(), StrategyError> {
        let n_rows = requests.iter().map(|request| request.generation.strategy.n_rows() as u64);
        let n_rows = n_rows.fold(0u64, u64::saturating_add);
        // Beams fork, and slots for them come in powers of two.
        let forks = requests.iter().any(|request| matches!(request.generation.strategy, Strategy::Beam { .. }));
        let rows = if forks { n_rows.checked_next_power_of_two().unwrap_or(u64::MAX) } else { n_rows };
        let (language, n_queries) = (self.bundle.language(), self.bundle.facts().qformer.n_queries);
        let encoded = language.cross_attention.as_ref().map(|facts| facts.tensors().count() * facts.n_heads * facts.head_dim);
        let read = |prompt: &Prompt| n_queries + prompt.ids.len();
        let before = |prompt| if encoded.is_some() { 1 } else { read(prompt) };
        let written = |request, prompt: &Prompt| self.n_new(request, self.bundle.room_behind(prompt.ids.len()));
        let positions = requests.iter().zip(prompts).map(|(request, prompt)| before(prompt) + written(request, prompt)).max();
        let positions = positions.unwrap_or(0).next_multiple_of(CAPACITY_STEP) as u64;
        let longest = prompts.iter().map(read).max().unwrap_or(0);
        let position_bytes = language.kv_cache.bytes_per_position() as u64;
        // Logits where the graph writes them, and where searches read them; keys and values of what an encoder read.
        let row_bytes = (4 * (2 * language.vocab_size + encoded.unwrap_or(0) * longest)) as u64;
        let needed = rows.saturating_mul(positions.saturating_mul(position_bytes).saturating_add(row_bytes));
        let allowed = self.runtime.memory_bytes();
        if needed <= allowed {
            return Ok(());
        }
        Err(StrategyError::TooLarge { rows, positions, position_bytes, row_bytes, needed, allowed })
    }

    /// How many texts of up to `longest` tokens are read again in one batch.
    pub(super) fn texts_at_once(&self, prefix: &Prefix, longest: usize) -> usize {
        let language = self.bundle.language();
        let positions = self.bundle.facts().qformer.n_queries + prefix.prompt.len() + longest;
        let bytes = positions * (language.kv_cache.bytes_per_position() + 4 * language.hidden) + longest * language.vocab_size * 4;
        (REREAD_BYTES / bytes.max(1)).max(1)
    }
}
