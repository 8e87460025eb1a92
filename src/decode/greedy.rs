//! Always the most probable token.

use super::best::argmax;
use super::processors::Processors;
use super::row::Row;
use super::{Ends, Finish, LogProb, Pick, Scores, Search, TokenId};

/// How greedy search goes.
#[derive(Clone, Debug, Default)]
pub struct GreedyOptions {
    /// Where the text ends.
    pub ends: Ends,
    /// What changes scores.
    pub processors: Processors,
    /// Log-probabilities, each with as many alternatives.
    pub log_probs: Option<usize>,
}

/// Greedy search over one row.
#[derive(Debug)]
pub struct Greedy {
    options: GreedyOptions,
    row: Row,
    changed: Vec<f32>,
}

impl Greedy {
    /// A search behind `prompt`, image tokens included. With a limit of 0 tokens it writes one, as `generate()` of `transformers` does.
    pub fn new(prompt: &[TokenId], options: GreedyOptions) -> Self {
        Self { options, row: Row::new(prompt), changed: Vec::new() }
    }

    fn best(&mut self, logits: &[f32]) -> TokenId {
        let past = self.row.past(&self.options.ends);
        if self.options.processors.is_idle(past) {
            return argmax(logits) as TokenId;
        }
        self.changed.clear();
        self.changed.extend_from_slice(logits);
        self.options.processors.apply(past, &mut self.changed);
        argmax(&self.changed) as TokenId
    }
}

impl Search for Greedy {
    fn advance(&mut self, scores: Scores<'_>, picks: &mut Vec<Pick>) {
        let logits = scores.row(0);
        let token = self.best(logits);
        self.row.push(token, &self.options.ends);
        self.row.log_probs.extend(self.options.log_probs.map(|n| LogProb::new(token, logits, n)));
        if self.row.finish.is_none() {
            picks.push(Pick { parent: 0, token });
        }
    }

    fn settled(&self) -> &[TokenId] {
        self.row.written()
    }

    fn log_probs(&self) -> &[LogProb] {
        &self.row.log_probs
    }

    fn finish(&self) -> Option<Finish> {
        self.row.finish
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds rows of logits until the search ends; gives the tokens and the reason.
    fn run(table: &[&[f32]], max_new_tokens: usize, min_new_tokens: usize) -> (Vec<TokenId>, Option<Finish>) {
        let processors = Processors { min_new_tokens, ..Processors::default() };
        let mut search = Greedy::new(
            &[7, 7],
            GreedyOptions { ends: Ends { max_new_tokens, end: vec![0, 3], stop: None }, processors, log_probs: None },
        );
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
