//! Forced decoding: given texts are read behind one prompt, to find how probable they are.

use std::ops::Range;

use super::softmax::log_sum_exp;
use super::{Finish, Hypothesis, Pick, Scores, Search, TokenId};

/// Reads given texts. Texts that begin alike share a row as long as they do: rows are the branches of a trie. A text that is through leaves.
/// None is settled; the score of a hypothesis is the sum of the log-probabilities of its tokens.
#[derive(Debug)]
pub struct Forced {
    /// In lexicographic order: texts that share a row stand side by side, the shortest first.
    texts: Vec<Vec<TokenId>>,
    /// Sums of log-probabilities.
    sums: Vec<f32>,
    /// Where each text was given.
    places: Vec<usize>,
    /// What each row reads; none of it is through.
    rows: Vec<Range<usize>>,
    /// Tokens that were read of each text.
    n_read: usize,
    hypotheses: Vec<Hypothesis>,
    finish: Option<Finish>,
}

impl Forced {
    /// Reads `texts`, which bring their end tokens with them.
    pub fn new(texts: Vec<Vec<TokenId>>) -> Self {
        let mut texts: Vec<(Vec<TokenId>, usize)> = texts.into_iter().zip(0..).collect();
        texts.sort();
        let (texts, places): (Vec<_>, Vec<_>) = texts.into_iter().unzip();
        let n_empty = texts.iter().take_while(|text| text.is_empty()).count();
        let (sums, all) = (vec![0.0; texts.len()], n_empty..texts.len());
        Self { texts, sums, places, rows: vec![all], n_read: 0, hypotheses: Vec::new(), finish: None }
    }

    /// Rows that it runs side by side at most.
    pub fn n_rows(&self) -> usize {
        let longest = self.texts.iter().map(Vec::len).max().unwrap_or(0);
        let at = |n_read| {
            let mut beginnings: Vec<_> = self.texts.iter().filter(|text| text.len() > n_read).map(|text| &text[..n_read]).collect();
            beginnings.dedup();
            beginnings.len()
        };
        (0..longest).map(at).max().unwrap_or(0).max(1)
    }

    /// Adds what the row's scores say about its texts; calls `branch` with each next token and the texts that go on behind it.
    fn read(&mut self, row: Range<usize>, logits: &[f32], mut branch: impl FnMut(TokenId, Range<usize>)) {
        let shift = log_sum_exp(logits);
        let mut start = row.start;
        for alike in self.texts[row].chunk_by(|a, b| a[self.n_read] == b[self.n_read]) {
            let token = alike[0][self.n_read];
            let log_prob = logits.get(token as usize).map_or(f32::NEG_INFINITY, |logit| logit - shift);
            let n_through = alike.iter().take_while(|text| text.len() == self.n_read + 1).count();
            let all = start..start + alike.len();
            start = all.end;
            if n_through < alike.len() {
                branch(token, all.start + n_through..all.end);
            }
            self.sums[all].iter_mut().for_each(|sum| *sum += log_prob);
        }
    }

    fn settle(&mut self) {
        let hypothesis = |(tokens, sum)| Hypothesis { tokens, score: Some(sum), finish: Finish::Stop, log_probs: Vec::new() };
        let texts = std::mem::take(&mut self.texts).into_iter().zip(self.sums.drain(..));
        let mut placed: Vec<_> = self.places.drain(..).zip(texts.map(hypothesis)).collect();
        placed.sort_by_key(|(place, _)| *place);
        self.hypotheses = placed.into_iter().map(|(_, hypothesis)| hypothesis).collect();
        self.finish = Some(Finish::Stop);
    }
}

impl Search for Forced {
    fn advance(&mut self, scores: Scores<'_>, picks: &mut Vec<Pick>) {
        let mut next = Vec::new();
        for (parent, row) in std::mem::take(&mut self.rows).into_iter().enumerate() {
            self.read(row, scores.row(parent), |token, texts| {
                picks.push(Pick { parent, token });
                next.push(texts);
            });
        }
        self.rows = next;
        self.n_read += 1;
        if self.rows.is_empty() {
            self.settle();
        }
    }

    fn settled(&self) -> &[TokenId] {
        &[]
    }

    fn finish(&self) -> Option<Finish> {
        self.finish
    }

    fn hypotheses(&self) -> &[Hypothesis] {
        &self.hypotheses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_share_a_row_as_long_as_they_begin_alike_and_keep_their_order() {
        let texts: Vec<Vec<TokenId>> =
            [&[1, 2, 3][..], &[5], &[1, 2], &[], &[1, 4, 3], &[1, 2, 3]].iter().map(|text| text.to_vec()).collect();
        let mut search = Forced::new(texts.clone());
        assert_eq!(search.n_rows(), 2);
        let row: Vec<f32> = (0..8).map(|token| token as f32).collect();
        let mut seen = Vec::new();
        while search.finish().is_none() {
            let n_rows = seen.last().map_or(1, |picks: &Vec<Pick>| picks.len());
            let (scores, mut picks) = (row.repeat(n_rows), Vec::new());
            search.advance(Scores::new(&scores, 8), &mut picks);
            seen.push(picks);
        }
        let pick = |parent, token| Pick { parent, token };
        assert_eq!(seen, [vec![pick(0, 1)], vec![pick(0, 2), pick(0, 4)], vec![]]);
        let shift = row.iter().map(|logit| logit.exp()).sum::<f32>().ln();
        for (hypothesis, text) in search.hypotheses().iter().zip(&texts) {
            let wanted: f32 = text.iter().map(|token| *token as f32 - shift).sum();
            assert_eq!(&hypothesis.tokens, text);
            assert!((hypothesis.score.unwrap() - wanted).abs() < 1e-5, "{text:?}: {hypothesis:?}, {wanted}");
        }
        assert_eq!(search.hypotheses().len(), texts.len());
    }

    #[test]
    fn nothing_to_read_is_over_at_once() {
        for texts in [vec![], vec![vec![]]] {
            let mut search = Forced::new(texts.clone());
            let mut picks = Vec::new();
            search.advance(Scores::new(&[0.0, 1.0], 2), &mut picks);
            assert_eq!((picks.len(), search.finish(), search.hypotheses().len()), (0, Some(Finish::Stop), texts.len()));
        }
    }
}
