//! What people ask for, with a bundle's defaults for the rest.

use super::Generation;
use super::context::Context;
use crate::bundle::{Bundle, GenerationFacts, TaskName};
use crate::decode::{EarlyStopping, Processors, Strategy, StrategyError, TokenId, Warpers};
use crate::error::Error;
use crate::prompt::PromptError;

/// How a text is to be written; whatever is absent comes from the bundle. The command line and servers name these options alike.
#[derive(Clone, Debug, Default)]
pub struct GenerationOptions {
    /// Tokens to write at most.
    pub max_new_tokens: Option<usize>,
    /// Tokens to write before the text may end.
    pub min_new_tokens: Option<usize>,
    /// Beams of the search; one is greedy search.
    pub beams: Option<usize>,
    /// Exponent of the length that a beam's sum is divided by.
    pub length_penalty: Option<f32>,
    /// When beam search ends.
    pub early_stopping: Option<EarlyStopping>,
    /// Texts, one if absent.
    pub n_return: Option<usize>,
    /// Whether tokens are drawn: with one beam from all, with several as continuations.
    pub sample: bool,
    /// As in [`Warpers`].
    pub temperature: Option<f32>,
    /// As in [`Warpers`].
    pub top_k: Option<usize>,
    /// As in [`Warpers`].
    pub top_p: Option<f32>,
    /// As in [`Warpers`].
    pub min_p: Option<f32>,
    /// As in [`Warpers`].
    pub typical_p: Option<f32>,
    /// The same seed draws the same texts; 0 if absent.
    pub seed: Option<u64>,
    /// As in [`Processors`]; 1 if absent.
    pub repetition_penalty: Option<f32>,
    /// As in [`Processors`]; 0 is off.
    pub no_repeat_ngram: usize,
    /// Words that are never written.
    pub bad_words: Vec<String>,
    /// The text ends before the first of these.
    pub stop: Vec<String>,
    /// Tokens that are never written.
    pub suppressed: Vec<TokenId>,
    /// Tokens that the text does not begin with.
    pub suppressed_first: Vec<TokenId>,
    /// The token behind a decoder's start token.
    pub forced_first: Option<TokenId>,
    /// Tokens, one of which comes last when the limit is reached.
    pub forced_last: Vec<TokenId>,
    /// Log-probabilities of the tokens, each with as many alternatives.
    pub log_probs: Option<usize>,
}

impl Context {
    /// How a text for this task is written; an error if the options make no sense together or for this bundle.
    pub fn generation(&self, task: TaskName, options: &GenerationOptions) -> Result<Generation, Error> {
        let mut generation = options.generation(self.bundle(), task)?;
        for word in &options.bad_words {
            generation.processors.bad_words.extend(self.spellings(word)?);
        }
        Ok(generation)
    }
}

impl GenerationOptions {
    /// As [`Context::generation`] before there are tokenizers: without the words that are never written.
    pub fn generation(&self, bundle: &Bundle, task: TaskName) -> Result<Generation, Error> {
        bundle.require(task)?;
        let defaults = bundle.facts().generation.get(&task).ok_or(PromptError::NotWriting(task))?;
        let (processors, strategy) = (self.processors(defaults), self.strategy(defaults)?);
        let (max_new_tokens, stop, log_probs) = (self.max_new_tokens, self.stop.clone(), self.log_probs);
        let generation = Generation { max_new_tokens, processors, strategy, stop, log_probs };
        generation.check(bundle.language())?;
        Ok(generation)
    }

    fn processors(&self, defaults: &GenerationFacts) -> Processors {
        // The bundle's own minimum gives way to a limit that was asked for.
        let least = || defaults.min_new_tokens.min(self.max_new_tokens.unwrap_or(usize::MAX));
        let plain = Processors::default();
        Processors {
            min_new_tokens: self.min_new_tokens.unwrap_or_else(least),
            repetition_penalty: self.repetition_penalty.unwrap_or(plain.repetition_penalty),
            no_repeat_ngram: self.no_repeat_ngram,
            suppressed: self.suppressed.clone(),
            suppressed_first: self.suppressed_first.clone(),
            forced_first: self.forced_first,
            forced_last: self.forced_last.clone(),
            ..plain
        }
    }

    fn strategy(&self, defaults: &GenerationFacts) -> Result<Strategy, StrategyError> {
        let n_return = self.n_return.unwrap_or(1);
        let drawn = self.sample.then(|| (self.warpers(), self.seed.unwrap_or(0)));
        let beams = self.beams.unwrap_or(if self.sample { 1 } else { defaults.beams });
        if beams == 1 && (self.length_penalty.is_some() || self.early_stopping.is_some()) {
            return Err(StrategyError::OneBeam);
        }
        match (beams, drawn) {
            (1, Some((warpers, seed))) => Ok(Strategy::Sample { warpers, seed, n_return }),
            (1, None) if n_return == 1 => Ok(Strategy::Greedy),
            (1, None) if n_return == 0 => Err(StrategyError::Zero("the number of texts")),
            (1, None) => Err(StrategyError::OneText),
            (beams, sample) => Ok(Strategy::Beam {
                beams,
                length_penalty: self.length_penalty.unwrap_or(defaults.length_penalty),
                early_stopping: self.early_stopping.unwrap_or_default(),
                n_return,
                sample,
            }),
        }
    }

    fn warpers(&self) -> Warpers {
        let plain = Warpers::default();
        Warpers {
            temperature: self.temperature.unwrap_or(plain.temperature),
            top_k: self.top_k.unwrap_or(plain.top_k),
            top_p: self.top_p.unwrap_or(plain.top_p),
            min_p: self.min_p.unwrap_or(plain.min_p),
            typical_p: self.typical_p.unwrap_or(plain.typical_p),
        }
    }
}
