//! Candidate answers by how probable the language model finds them.

use super::{Engine, Sight};
use crate::bundle::TaskName;
use crate::decode::{TokenId, log_softmax};
use crate::error::Error;
use crate::language::Prefix;
use crate::prompt::{Prompt, PromptError, Task};
use crate::text::Warning;

/// Candidates that run in one batch.
const BATCH: usize = 16;

/// A candidate with its likelihood.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Ranked {
    /// The candidate.
    pub text: String,
    /// Its place in the list that was given.
    pub index: usize,
    /// Sum of the log-probabilities of its tokens, the end token included.
    pub log_likelihood: f32,
    /// How many tokens that are.
    pub n_tokens: usize,
}

impl Ranked {
    /// The log-likelihood of a token on average.
    pub fn per_token(&self) -> f32 {
        self.log_likelihood / self.n_tokens as f32
    }
}

/// A candidate behind its prompt, as the language model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// Token ids, the end token included.
    pub ids: Vec<TokenId>,
    /// What of the candidate is not read as it stands.
    pub warnings: Vec<Warning>,
}

impl Engine {
    /// Candidates for the answer to a task, in the order in which they were given. Each is read behind the prompt and ended by the first
    /// end token, as `predict_class` of LAVIS does it. All fail together where one fails in [`candidate`](Self::candidate).
    pub fn rank(&mut self, sight: &Sight, task: &Task, candidates: &[&str]) -> Result<Vec<Ranked>, Error> {
        if candidates.is_empty() {
            return Err(PromptError::NoCandidates.into());
        }
        let prompt = self.prompt(task)?;
        let read = candidates.iter().map(|candidate| self.candidate(&prompt, candidate));
        let tokens: Vec<Vec<TokenId>> = read.map(|read| Ok(read?.ids)).collect::<Result<_, Error>>()?;
        let prefix = self.prefixes_of(&[sight], &[prompt])?.remove(0);
        let mut sums = vec![0.0; tokens.len()];
        let batch = self.texts_at_once(&prefix, tokens.iter().map(Vec::len).max().unwrap_or(1)).min(BATCH);
        for (chunk, sums) in tokens.chunks(batch).zip(sums.chunks_mut(batch)) {
            let texts: Vec<&[TokenId]> = chunk.iter().map(Vec::as_slice).collect();
            let prefixes: Vec<&Prefix> = vec![&prefix; chunk.len()];
            let mut read = vec![0; chunk.len()];
            self.language().reread(&prefixes, &texts, |row, logits| {
                let token = texts[row][read[row]] as usize;
                sums[row] += log_softmax(logits).nth(token).unwrap_or(f32::NEG_INFINITY);
                read[row] += 1;
            })?;
        }
        let ranked = |(index, (text, tokens)): (usize, (&&str, &Vec<TokenId>))| Ranked {
            text: (*text).to_owned(),
            index,
            log_likelihood: sums[index],
            n_tokens: tokens.len(),
        };
        Ok(candidates.iter().zip(&tokens).enumerate().map(ranked).collect())
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
}
