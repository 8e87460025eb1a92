//! What every part of an engine knows: the bundle and its tokenizers. It never changes, so threads may share it.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::answer::Generation;
use super::vocabulary;
use crate::bundle::{Bundle, BundleError, TaskName};
use crate::decode::TokenId;
use crate::error::Error;
use crate::prompt::{Prompt, PromptError, Task, Tokenizers};
use crate::text::{Text, Warning};

/// A bundle with its tokenizers.
#[derive(Debug)]
pub struct Context {
    pub(super) bundle: Bundle,
    /// The tokenizer of what writes.
    pub(super) text: Option<Arc<Text>>,
    /// The tokenizer of what the Q-Former reads.
    pub(super) qformer_text: Option<Text>,
    fingerprint: u64,
}

/// What the Q-Former reads of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Token ids, special tokens included.
    pub ids: Vec<TokenId>,
    /// What of the text is not read as it stands.
    pub warnings: Vec<Warning>,
}

/// A candidate behind its prompt, as the language model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// Token ids, the end token included.
    pub ids: Vec<TokenId>,
    /// What of the candidate is not read as it stands.
    pub warnings: Vec<Warning>,
}

/// The tokenizers of a bundle.
pub(super) struct Texts {
    text: Option<Arc<Text>>,
    qformer_text: Option<Text>,
}

impl Texts {
    pub fn open(bundle: &Bundle) -> Result<Self, BundleError> {
        let writes = bundle.facts().language.is_some();
        let text = writes.then(|| Text::open(bundle, bundle.tokenizer())).transpose()?.map(Arc::new);
        let qformer_text = bundle.facts().qformer.text.as_ref().map(|facts| Text::open(bundle, &facts.tokenizer)).transpose()?;
        vocabulary::check(bundle, text.as_deref(), qformer_text.as_ref())?;
        Ok(Self { text, qformer_text })
    }
}

impl Context {
    pub(super) fn new(bundle: Bundle, texts: Texts) -> Self {
        let (Texts { text, qformer_text }, fingerprint) = (texts, fingerprint(&bundle));
        Self { bundle, text, qformer_text, fingerprint }
    }

    /// The bundle in use.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// The prompt that a task becomes, with what there is to say about it; an error if this bundle or its tokenizers cannot take it.
    pub fn prompt(&self, task: &Task) -> Result<Prompt, Error> {
        self.bundle.require(task.name())?;
        let text = self.text.as_deref().ok_or(PromptError::NotWriting(task.name()))?;
        let qformer = self.qformer_text.as_ref().zip(self.bundle.facts().qformer.text.as_ref());
        Ok(task.prompt(&self.bundle, Tokenizers { text, qformer })?)
    }

    /// The prompt of a task with what there is to say about it, or why it cannot be written so. Whatever this lets pass is at fault
    /// neither for its text nor for its options.
    pub fn check(&self, task: &Task, generation: &Generation) -> Result<Prompt, Error> {
        let mut prompt = self.prompt(task)?;
        generation.check(self.bundle.language())?;
        let (wanted, room) = (generation.processors.min_new_tokens, self.bundle.room_behind(prompt.ids.len()));
        if wanted > room {
            prompt.warnings.push(Warning::NoRoom { wanted, room });
        }
        Ok(prompt)
    }

    /// What a candidate becomes behind a prompt; an error if it cannot be ranked.
    pub fn candidate(&self, prompt: &Prompt, answer: &str) -> Result<Answered, Error> {
        if answer.trim().is_empty() {
            return Err(PromptError::EmptyText.into());
        }
        let text = self.text.as_deref().ok_or(PromptError::NotWriting(TaskName::Match))?;
        let read = text.encode_answer(answer).map_err(PromptError::from)?;
        let mut ids = read.ids;
        ids.extend(self.bundle.language().token_ids.eos.first());
        let room = self.bundle.room_behind(prompt.ids.len());
        if ids.len() > room {
            return Err(PromptError::AnswerTooLong { found: ids.len(), room }.into());
        }
        Ok(Answered { ids, warnings: Warning::about(answer, read.unknown, 0) })
    }

    /// What a text becomes that is matched or embedded; an error if it cannot be. Several texts fail together where one of them fails
    /// here, so ask this first of each.
    pub fn reading(&self, text: &str) -> Result<Reading, Error> {
        self.bundle.require(TaskName::Embed)?;
        let parts = self.qformer_text.as_ref().zip(self.bundle.facts().qformer.text.as_ref());
        let (tokenizer, facts) = parts.expect("stage 1 reads text");
        if text.trim().is_empty() {
            return Err(PromptError::EmptyText.into());
        }
        let read = tokenizer.encode_cut(text, facts).map_err(PromptError::from)?;
        Ok(Reading { ids: read.ids, warnings: Warning::about(text, read.unknown, read.n_cut) })
    }

    /// Token ids of a word as it may stand in a text: at its beginning and behind a space. The vocabulary must have it.
    pub fn spellings(&self, word: &str) -> Result<Vec<Vec<TokenId>>, Error> {
        let text = self.text.as_deref().ok_or(PromptError::NotWriting(TaskName::Match))?;
        let found = [text.encode_plain(word), text.encode_answer(word)];
        let [alone, spaced] = found.map(|found| found.map_err(PromptError::from));
        let (alone, spaced) = (alone?, spaced?);
        Warning::refuse_unknown(&Warning::about(word, alone.unknown, 0)).map_err(PromptError::from)?;
        let mut found = vec![alone.ids, spaced.ids];
        found.dedup();
        Ok(found)
    }

    /// The text of tokens that the bundle wrote; empty in one that does not write.
    pub fn decode(&self, tokens: &[TokenId]) -> String {
        self.text.as_ref().map(|text| text.decode(tokens)).unwrap_or_default()
    }

    /// Tells what this bundle made of a picture from what others made.
    pub(super) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// Tokens that a text may come to behind its prompt. A default maximum gives way to a larger minimum.
    pub fn n_new(&self, task: &Task, generation: &Generation, prompt: &Prompt) -> usize {
        let default = self.bundle.facts().generation.get(&task.name()).map_or(1, |generation| generation.max_new_tokens);
        let least = generation.processors.min_new_tokens;
        generation.max_new_tokens.unwrap_or(default.max(least)).min(self.bundle.room_behind(prompt.ids.len()))
    }
}

/// Tells bundles apart by the hashes of their files, for as long as the process lives.
fn fingerprint(bundle: &Bundle) -> u64 {
    let mut hasher = DefaultHasher::new();
    for (name, file) in &bundle.facts().files {
        (name, &file.sha256).hash(&mut hasher);
    }
    hasher.finish()
}
