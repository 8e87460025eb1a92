//! A task and its question → the prompt's token ids.

use crate::bundle::{Bundle, Family, QformerReads, QformerTextFacts, TaskName};
use crate::decode::TokenId;
use crate::text::{Text, TextError, Warning};

/// What is asked of a picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Describe it.
    Caption,
    /// Answer this question, put into the bundle's template.
    Ask(String),
    /// Answer this question, put into another template: its one `{}` takes it. Where the Q-Former reads the question itself, there may be none.
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
    /// What the Q-Former reads of it, special tokens included, where it reads anything.
    pub question_ids: Option<Vec<TokenId>>,
    /// What of it is not read as it stands.
    pub warnings: Vec<Warning>,
}

/// The tokenizers of a bundle that writes.
#[derive(Clone, Copy, Debug)]
pub struct Tokenizers<'a> {
    /// Of what writes.
    pub text: &'a Text,
    /// Of what the Q-Former reads, and how much of it.
    pub qformer: Option<(&'a Text, &'a QformerTextFacts)>,
}

/// Why a task cannot become a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// Nothing is asked.
    #[error("the question is empty")]
    Empty,
    /// The question has no place, or several.
    #[error("the prompt around a question needs one {{}}, which takes it; this one has {0}")]
    Template(usize),
    /// The defaults of a task that writes nothing.
    #[error("no text is written for the task {0}; caption and ask are for that")]
    NotWriting(TaskName),
    /// What another bundle made of a picture means nothing here.
    #[error("the picture was looked at through another bundle")]
    OtherBundle,
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
    pub fn prompt(&self, bundle: &Bundle, tokenizers: Tokenizers<'_>) -> Result<Prompt, PromptError> {
        let (text, question) = (self.written(bundle)?, self.question());
        let mut prompt = Prompt { text, question: question.to_owned(), ids: Vec::new(), question_ids: None, warnings: Vec::new() };
        let mut unknown = Vec::new();
        if bundle.facts().family != Family::Qformer {
            let encoded = tokenizers.text.encode(&prompt.text)?;
            (prompt.ids, unknown) = (encoded.ids, encoded.unknown);
        } else if prompt.text.is_empty() {
            prompt.ids = bundle.language().token_ids.bos.into_iter().collect();
        } else {
            return Err(PromptError::NoPrompt);
        }
        let mut n_cut = 0;
        if let Some((text, facts)) = tokenizers.qformer.filter(|_| bundle.facts().family != Family::Qformer) {
            let read = text.encode_cut(prompt.read_by_qformer(facts), facts)?;
            unknown.extend(read.unknown.into_iter().filter(|piece| !unknown.contains(piece)).collect::<Vec<_>>());
            (prompt.question_ids, n_cut) = (Some(read.ids), read.n_cut);
        }
        let said = if question.is_empty() { &prompt.text } else { question };
        prompt.warnings = Warning::about(said, unknown, n_cut);
        prompt.fits(bundle)
    }

    /// The task's template with the question in it.
    fn written(&self, bundle: &Bundle) -> Result<String, PromptError> {
        let own = bundle.facts().prompts.get(&self.name()).map_or("", String::as_str);
        let template = match self {
            Self::Raw(name @ (TaskName::Match | TaskName::Embed), _) => return Err(PromptError::NotWriting(*name)),
            Self::Caption => return Ok(own.to_owned()),
            Self::Raw(_, prompt) => return Ok(prompt.clone()),
            Self::Ask(_) => own,
            Self::AskAs(_, template) => template,
        };
        if self.question().is_empty() {
            return Err(PromptError::Empty);
        }
        check_template(bundle, template)?;
        Ok(template.replacen("{}", self.question(), 1))
    }

    fn question(&self) -> &str {
        match self {
            Self::Caption | Self::Raw(..) => "",
            Self::Ask(question) | Self::AskAs(question, _) => question.trim(),
        }
    }
}

/// Refuses a text around a question that does not take it exactly once. It need not where the Q-Former reads the question itself.
pub fn check_template(bundle: &Bundle, template: &str) -> Result<(), PromptError> {
    let reads_question = |facts: &QformerTextFacts| facts.reads == Some(QformerReads::Question);
    match template.matches("{}").count() {
        1 => Ok(()),
        0 if bundle.facts().qformer.text.as_ref().is_some_and(reads_question) => Ok(()),
        found => Err(PromptError::Template(found)),
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

    /// Refuses more tokens than the model has positions for.
    fn fits(self, bundle: &Bundle) -> Result<Self, PromptError> {
        let (n_queries, positions) = (bundle.facts().qformer.n_queries, bundle.language().max_positions);
        let room = positions.saturating_sub(n_queries);
        if self.ids.len() > room {
            return Err(PromptError::TooLong { found: self.ids.len(), n_queries, room });
        }
        Ok(self)
    }
}
