//! How texts are written, as native routes name it: as the command line does.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::decode::EarlyStopping;
use crate::engine::GenerationOptions;
use crate::server::error::ApiError;

/// More alternatives of a token tell nothing.
pub const MOST_ALTERNATIVES: usize = 20;
/// A longer list of stop strings or words is none.
const MOST_WORDS: usize = 64;

/// How texts are written; whatever is absent comes from the model.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Tokens to write at most.
    #[schema(minimum = 1)]
    max_new_tokens: Option<usize>,
    /// Tokens to write before the text may end.
    min_new_tokens: Option<usize>,
    /// Beams of the search; 1 is greedy search.
    #[schema(minimum = 1)]
    beams: Option<usize>,
    /// Exponent of the length that a beam's sum of log-probabilities is divided by.
    length_penalty: Option<f32>,
    /// When beam search ends: true, false or "never".
    early_stopping: Option<Early>,
    /// Texts, the best first.
    #[schema(minimum = 1)]
    num_return: Option<usize>,
    /// Draw tokens instead of taking the best.
    sample: bool,
    /// Divides scores before drawing.
    temperature: Option<f32>,
    /// Draw from this many of the best tokens.
    top_k: Option<usize>,
    /// Draw from the best tokens that together reach this probability.
    top_p: Option<f32>,
    /// Draw from tokens with at least this share of the best one's probability.
    min_p: Option<f32>,
    /// Draw from the tokens nearest to the expected information that together reach this probability.
    typical_p: Option<f32>,
    /// The same seed draws the same texts.
    seed: Option<u64>,
    /// Above 1, tokens that are already there become less likely.
    repetition_penalty: Option<f32>,
    /// No run of this many tokens occurs twice; 0 is off.
    no_repeat_ngram: usize,
    /// Words that are never written.
    bad_words: Vec<String>,
    /// The text ends before the first of these.
    stop: Vec<String>,
    /// Log-probabilities of the tokens, each with this many of the most probable in its place.
    #[schema(maximum = 20)]
    log_probs: Option<usize>,
    /// Let the model continue this text instead of the task's own prompt; of a question, `{}` takes it.
    pub prompt: Option<String>,
}

/// True, false or "never".
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
enum Early {
    Is(bool),
    Named(String),
}

impl Options {
    /// Whether several texts are wanted, or one that is settled only at its end.
    pub fn generation(&self) -> Result<GenerationOptions, ApiError> {
        if self.log_probs.is_some_and(|n| n > MOST_ALTERNATIVES) {
            return Err(ApiError::invalid(format!("{MOST_ALTERNATIVES} alternatives at most are told")).about("options.log_probs"));
        }
        for (name, words) in [("options.stop", &self.stop), ("options.bad_words", &self.bad_words)] {
            check_words(name, words)?;
        }
        let early = self.early_stopping.as_ref().map(Early::parsed).transpose()?;
        Ok(GenerationOptions {
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            beams: self.beams,
            length_penalty: self.length_penalty,
            early_stopping: early,
            n_return: self.num_return,
            sample: self.sample,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical_p,
            seed: self.seed,
            repetition_penalty: self.repetition_penalty,
            no_repeat_ngram: self.no_repeat_ngram,
            bad_words: self.bad_words.clone(),
            stop: self.stop.clone(),
            log_probs: self.log_probs,
            ..GenerationOptions::default()
        })
    }
}

/// Refuses lists of words that are too long.
pub fn check_words(param: &str, words: &[String]) -> Result<(), ApiError> {
    if words.len() > MOST_WORDS {
        return Err(ApiError::invalid(format!("{MOST_WORDS} texts at most can stand here")).about(param));
    }
    words.iter().try_for_each(|word| super::super::call::check_text(word, param))
}

/// Whether a field says nothing: absent, null, or one of the values that mean so.
pub fn is_plain(value: &Option<Value>, plain: &[Value]) -> bool {
    value.as_ref().is_none_or(|value| value.is_null() || plain.contains(value))
}

/// Refuses the first field that is not plain, for it would be passed over in silence.
pub fn check_plain(fields: &[(&str, bool)]) -> Result<(), ApiError> {
    match fields.iter().find(|(_, is_plain)| !is_plain) {
        Some((name, _)) => Err(ApiError::unsupported(name, format!("BLIP-2 has no {name}"))),
        None => Ok(()),
    }
}

impl Early {
    fn parsed(&self) -> Result<EarlyStopping, ApiError> {
        let name = match self {
            Self::Is(is) => is.to_string(),
            Self::Named(name) => name.clone(),
        };
        name.parse().map_err(|known: String| ApiError::invalid(known).about("options.early_stopping"))
    }
}
