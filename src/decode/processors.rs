//! What changes scores before a token is chosen, in the order of `transformers` (`generation/logits_process.py`).

use super::{Ends, TokenId};

/// Which scores are changed, and how. The default changes nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Processors {
    /// Divides positive and multiplies negative scores of every token that is already there, prompt included; 1 is off.
    pub repetition_penalty: f32,
    /// No run of this many tokens occurs twice, prompt included; 0 is off.
    pub no_repeat_ngram: usize,
    /// Sequences of tokens that are never completed.
    pub bad_words: Vec<Vec<TokenId>>,
    /// No end token before this many new tokens.
    pub min_new_tokens: usize,
    /// The first token behind a prompt of one token.
    pub forced_first: Option<TokenId>,
    /// The tokens, one of which comes last if the limit is reached.
    pub forced_last: Vec<TokenId>,
    /// Tokens that never occur.
    pub suppressed: Vec<TokenId>,
    /// Tokens that are not the first one.
    pub suppressed_first: Vec<TokenId>,
}

impl Default for Processors {
    fn default() -> Self {
        Self {
            repetition_penalty: 1.0,
            no_repeat_ngram: 0,
            bad_words: Vec::new(),
            min_new_tokens: 0,
            forced_first: None,
            forced_last: Vec::new(),
            suppressed: Vec::new(),
            suppressed_first: Vec::new(),
        }
    }
}

/// A row whose next token is to be chosen.
#[derive(Clone, Copy, Debug)]
pub struct Past<'a> {
    /// Prompt, image tokens included, and what was written behind it.
    pub tokens: &'a [TokenId],
    /// How many of them are the prompt.
    pub n_prompt: usize,
    /// Where the text ends.
    pub ends: &'a Ends,
}

impl Past<'_> {
    fn n_new(&self) -> usize {
        self.tokens.len() - self.n_prompt
    }
}

impl Processors {
    /// Whether the scores of this row stay as they are.
    pub fn is_idle(&self, past: Past<'_>) -> bool {
        let is_always_off = self.repetition_penalty == 1.0 && self.no_repeat_ngram == 0 && self.bad_words.is_empty();
        is_always_off
            && self.suppressed.is_empty()
            && past.n_new() >= self.min_new_tokens
            && !self.is_first(past)
            && !self.is_last(past)
            && !self.is_beginning(past)
    }

    /// Changes the scores of one row, logits or log-probabilities.
    pub fn apply(&self, past: Past<'_>, scores: &mut [f32]) {
        self.penalise_repetition(past.tokens, scores);
        self.bar_repeated_ngrams(past.tokens, scores);
        self.bar_bad_words(past, scores);
        if past.n_new() < self.min_new_tokens {
            bar(&past.ends.end, scores);
        }
        if let Some(first) = self.forced_first.filter(|_| self.is_first(past)) {
            force(&[first], scores);
        }
        if self.is_last(past) {
            force(&self.forced_last, scores);
        }
        bar(&self.suppressed, scores);
        if self.is_beginning(past) {
            bar(&self.suppressed_first, scores);
        }
    }

    fn is_first(&self, past: Past<'_>) -> bool {
        self.forced_first.is_some() && past.tokens.len() == 1
    }

    fn is_last(&self, past: Past<'_>) -> bool {
        !self.forced_last.is_empty() && past.n_new() + 1 == past.ends.max_new_tokens
    }

    fn is_beginning(&self, past: Past<'_>) -> bool {
        // A forced first token moves the beginning by one.
        let beginning = usize::from(self.forced_first.is_some() && past.n_prompt == 1);
        !self.suppressed_first.is_empty() && past.n_new() == beginning
    }

    fn penalise_repetition(&self, tokens: &[TokenId], scores: &mut [f32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let mut there = tokens.to_vec();
        there.sort_unstable();
        there.dedup();
        for token in there {
            if let Some(score) = scores.get_mut(token as usize) {
                *score = if *score < 0.0 { *score * self.repetition_penalty } else { *score / self.repetition_penalty };
            }
        }
    }

    fn bar_repeated_ngrams(&self, tokens: &[TokenId], scores: &mut [f32]) {
        let n = self.no_repeat_ngram;
        if n == 0 || tokens.len() + 1 < n {
            return;
        }
        let ending = &tokens[tokens.len() + 1 - n..];
        for ngram in tokens.windows(n).filter(|ngram| ngram[..n - 1] == *ending) {
            bar(&ngram[n - 1..], scores);
        }
    }

    fn bar_bad_words(&self, past: Past<'_>, scores: &mut [f32]) {
        for word in &self.bad_words {
            let Some((last, before)) = word.split_last() else { continue };
            let is_end = before.is_empty() && past.ends.end.contains(last);
            if !is_end && word.len() <= past.tokens.len().max(1) && past.tokens.ends_with(before) {
                bar(&[*last], scores);
            }
        }
    }
}

fn bar(tokens: &[TokenId], scores: &mut [f32]) {
    for token in tokens {
        if let Some(score) = scores.get_mut(*token as usize) {
            *score = f32::NEG_INFINITY;
        }
    }
}

fn force(tokens: &[TokenId], scores: &mut [f32]) {
    scores.fill(f32::NEG_INFINITY);
    for token in tokens {
        if let Some(score) = scores.get_mut(*token as usize) {
            *score = 0.0;
        }
    }
}
