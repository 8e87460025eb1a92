//! A task and its question → the prompt's token ids.

use crate::bundle::{Bundle, TaskName};
use crate::decode::TokenId;
use crate::text::{Text, TextError};

/// What is asked of a picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Describe it.
    Caption,
    /// Answer this question, put into the bundle's template.
    Ask(String),
    /// Continue this prompt, taken as it is, with the defaults of the named task.
    Raw(TaskName, String),
}

/// The text that the language model reads behind the query tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Template and question.
    pub text: String,
    /// Its tokens, special tokens included.
    pub ids: Vec<TokenId>,
}

/// Why a task cannot become a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// Nothing is asked.
    #[error("the question is empty")]
    Empty,
    /// The text does not go into tokens.
    #[error(transparent)]
    Text(#[from] TextError),
    /// More positions than the model has.
    #[error("the prompt has {found} tokens; beside {n_queries} query tokens this model has room for {room}")]
    TooLong {
        /// Tokens of the prompt.
        found: usize,
        /// Query tokens before it.
        n_queries: usize,
        /// Tokens that would fit.
        room: usize,
    },
}

impl Task {
    /// The name under which a bundle lists what this task needs.
    pub fn name(&self) -> TaskName {
        match self {
            Self::Caption => TaskName::Caption,
            Self::Ask(_) => TaskName::Ask,
            Self::Raw(name, _) => *name,
        }
    }

    /// The finished prompt. The bundle must offer the task.
    pub fn prompt(&self, bundle: &Bundle, text: &Text) -> Result<Prompt, PromptError> {
        let template = bundle.facts().prompts.get(&self.name()).map_or("", String::as_str);
        let written = match self {
            Self::Caption => template.to_owned(),
            Self::Ask(question) if question.trim().is_empty() => return Err(PromptError::Empty),
            Self::Ask(question) => template.replacen("{}", question.trim(), 1),
            Self::Raw(_, prompt) => prompt.clone(),
        };
        let ids = text.encode(&written)?;
        let (n_queries, positions) = (bundle.facts().qformer.n_queries, bundle.facts().language.max_positions);
        let room = positions.saturating_sub(n_queries);
        if ids.len() > room {
            return Err(PromptError::TooLong { found: ids.len(), n_queries, room });
        }
        Ok(Prompt { text: written, ids })
    }
}
