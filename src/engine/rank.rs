//! Candidate answers by how probable the language model finds them.

use super::{Engine, Sight};
use crate::decode::{TokenId, log_softmax};
use crate::error::Error;
use crate::language::Prefix;
use crate::prompt::{PromptError, Task};

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

impl Engine {
    /// Candidates for the answer to a task, in the order in which they were given. Each is read behind the prompt and ended by the first
    /// end token, as `predict_class` of LAVIS does it.
    pub fn rank(&mut self, sight: &Sight, task: &Task, candidates: &[&str]) -> Result<Vec<Ranked>, Error> {
        if candidates.is_empty() {
            return Err(PromptError::NoCandidates.into());
        }
        let prefix = self.prefixes_of(&[(sight, task)])?.remove(0);
        let end = self.bundle.language().token_ids.eos[0];
        let tokens = candidates.iter().map(|candidate| self.answer_tokens(candidate, end, prefix.max_new_tokens));
        let tokens = tokens.collect::<Result<Vec<_>, _>>()?;
        let mut sums = vec![0.0; tokens.len()];
        for (chunk, sums) in tokens.chunks(BATCH).zip(sums.chunks_mut(BATCH)) {
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

    fn answer_tokens(&self, answer: &str, end: TokenId, room: usize) -> Result<Vec<TokenId>, PromptError> {
        if answer.trim().is_empty() {
            return Err(PromptError::EmptyText);
        }
        let mut tokens = self.text().encode_answer(answer)?;
        tokens.push(end);
        if tokens.len() > room {
            return Err(PromptError::AnswerTooLong { found: tokens.len(), room });
        }
        Ok(tokens)
    }
}
