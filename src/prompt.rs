//! A task and its question → the prompt's token ids.

use crate::bundle::{Bundle, Family, QformerReads, QformerTextFacts, TaskName};
use crate::decode::TokenId;
use crate::text::{Text, TextError};

/// What is asked of a picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Describe it.
    Caption,
    /// Answer this question, put into the bundle's template.
    Ask(String),
    /// Answer this question, put into another template: `{}` takes it.
    AskAs(String, String),
    /// Continue this prompt, taken as it is, with the defaults of the named task.
    Raw(TaskName, String),
}

/// The text that the language model reads behind the query tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Template and question.
    pub text: String,
    /// The question alone; empty where there is none.
    pub question: String,
    /// Its tokens, special tokens included.
    pub ids: Vec<TokenId>,
}

/// Why a task cannot become a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// Nothing is asked.
    #[error("the question is empty")]
    Empty,
    /// A text to compare that says nothing.
    #[error("the text is empty")]
    EmptyText,
    /// Nothing to choose from.
    #[error("there are no candidates to rank")]
    NoCandidates,
    /// The Q-Former writes behind nothing but its start token.
    #[error("this bundle's captions take no prompt")]
    NoPrompt,
    /// A candidate that does not fit behind the prompt.
    #[error("the answer has {found} tokens; behind this prompt there is room for {room}")]
    AnswerTooLong {
        /// Tokens of the candidate.
        found: usize,
        /// Tokens that would fit.
        room: usize,
    },
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
            Self::Ask(_) | Self::AskAs(..) => TaskName::Ask,
            Self::Raw(name, _) => *name,
        }
    }

    /// The finished prompt. The bundle must offer the task.
    pub fn prompt(&self, bundle: &Bundle, text: &Text) -> Result<Prompt, PromptError> {
        let template = bundle.facts().prompts.get(&self.name()).map_or("", String::as_str);
        let (template, question) = match self {
            Self::Caption => (template, ""),
            Self::Raw(_, prompt) => (prompt.as_str(), ""),
            Self::Ask(question) => (template, question.trim()),
            Self::AskAs(question, template) => (template.as_str(), question.trim()),
        };
        let written = match self {
            Self::Caption | Self::Raw(..) => template.to_owned(),
            Self::Ask(_) | Self::AskAs(..) if question.is_empty() => return Err(PromptError::Empty),
            Self::Ask(_) | Self::AskAs(..) => template.replacen("{}", question, 1),
        };
        let ids = if bundle.facts().family == Family::Qformer {
            if !written.is_empty() {
                return Err(PromptError::NoPrompt);
            }
            bundle.language().token_ids.bos.into_iter().collect()
        } else {
            text.encode(&written)?
        };
        let (n_queries, positions) = (bundle.facts().qformer.n_queries, bundle.language().max_positions);
        let room = positions.saturating_sub(n_queries);
        if ids.len() > room {
            return Err(PromptError::TooLong { found: ids.len(), n_queries, room });
        }
        Ok(Prompt { text: written, question: question.to_owned(), ids })
    }
}

impl Prompt {
    /// What a Q-Former that reads questions gets of it.
    pub fn read_by_qformer(&self, facts: &QformerTextFacts) -> &str {
        match facts.reads.unwrap_or_default() {
            QformerReads::Prompt => &self.text,
            QformerReads::Question => &self.question,
        }
    }
}
