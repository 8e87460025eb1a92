//! What may be asked for at once: options that make sense.

use super::Generation;
use crate::bundle::LanguageFacts;
use crate::decode::StrategyError;

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
