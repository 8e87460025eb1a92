//! Always the most probable token.

use super::processors::{Past, Processors};
use super::{Ends, Finish, Pick, Scores, Search, TokenId};

/// How greedy search goes.
#[derive(Clone, Debug, Default)]
pub struct GreedyOptions {
    /// Where the text ends.
    pub ends: Ends,
    /// What changes scores.
    pub processors: Processors,
}

/// Greedy search over one row.
#[derive(Debug)]
pub struct Greedy {
    options: GreedyOptions,
    n_prompt: usize,
    /// Prompt and new tokens.
    tokens: Vec<TokenId>,
    changed: Vec<f32>,
    finish: Option<Finish>,
}

impl Greedy {
    /// A search behind `prompt`, image tokens included. With a limit of 0 tokens it writes one, as `generate()` of `transformers` does.
    pub fn new(prompt: &[TokenId], options: GreedyOptions) -> Self {
        Self { options, n_prompt: prompt.len(), tokens: prompt.to_vec(), changed: Vec::new(), finish: None }
    }

    fn best(&mut self, logits: &[f32]) -> TokenId {
        if self.options.processors.is_idle() {
            return largest(logits);
        }
        self.changed.clear();
        self.changed.extend_from_slice(logits);
        let past = Past { tokens: &self.tokens, n_prompt: self.n_prompt, ends: &self.options.ends };
        self.options.processors.apply(past, &mut self.changed);
        largest(&self.changed)
    }
}

/// Of equals the smallest id, as torch.argmax gives on CPU.
fn largest(scores: &[f32]) -> TokenId {
    let mut best = (f32::NEG_INFINITY, 0);
    for (token, &score) in scores.iter().enumerate() {
        if score > best.0 {
            best = (score, token);
        }
    }
    best.1 as TokenId
}

impl Search for Greedy {
    fn advance(&mut self, scores: Scores<'_>, picks: &mut Vec<Pick>) {
        let token = self.best(scores.row(0));
        self.tokens.push(token);
        self.finish = self.options.ends.finish(self.settled());
        if self.finish.is_none() {
            picks.push(Pick { parent: 0, token });
        }
    }

    fn settled(&self) -> &[TokenId] {
        &self.tokens[self.n_prompt..]
    }

    fn finish(&self) -> Option<Finish> {
        self.finish
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds rows of logits until the search ends; gives the tokens and the reason.
    fn run(table: &[&[f32]], max_new_tokens: usize, min_new_tokens: usize) -> (Vec<TokenId>, Option<Finish>) {
        let processors = Processors { min_new_tokens, ..Processors::default() };
        let mut search =
            Greedy::new(&[7, 7], GreedyOptions { ends: Ends { max_new_tokens, end: vec![0, 3], stop: None }, processors });
        for row in table {
            let mut picks = Vec::new();
            search.advance(Scores::new(row, row.len()), &mut picks);
            let Some(pick) = picks.first() else { break };
            assert_eq!(pick, &Pick { parent: 0, token: *search.settled().last().unwrap() });
        }
        (search.settled().to_vec(), search.finish())
    }

    #[test]
    fn takes_the_largest_logit_and_the_smallest_id_among_equals() {
        let table: [&[f32]; 3] = [&[0.0, 2.0, 1.0, 0.0], &[-3.0, -1.0, -1.0, -2.0], &[0.0, 0.0, 9.0, 0.0]];
        assert_eq!(run(&table, 9, 0), (vec![1, 1, 2], None));
    }

    #[test]
    fn any_end_token_ends_the_text_and_belongs_to_it() {
        let table: [&[f32]; 3] = [&[0.0, 2.0, 1.0, 0.0], &[0.0, 0.0, 0.0, 1.0], &[0.0, 1.0, 0.0, 0.0]];
        assert_eq!(run(&table, 9, 0), (vec![1, 3], Some(Finish::Stop)));
    }

    #[test]
    fn end_tokens_wait_for_the_smallest_length() {
        let table: [&[f32]; 3] = [&[9.0, 1.0, 2.0, 8.0], &[9.0, 2.0, 1.0, 8.0], &[9.0, 2.0, 1.0, 8.0]];
        assert_eq!(run(&table, 9, 2), (vec![2, 1, 0], Some(Finish::Stop)));
    }

    #[test]
    fn an_end_token_at_the_limit_counts_as_stop() {
        let table: [&[f32]; 2] = [&[0.0, 2.0, 1.0, 0.0], &[1.0, 0.0, 0.0, 0.0]];
        assert_eq!(run(&table, 2, 0), (vec![1, 0], Some(Finish::Stop)));
        assert_eq!(run(&table, 1, 0), (vec![1], Some(Finish::Length)));
    }
}
