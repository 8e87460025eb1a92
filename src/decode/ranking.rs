//! The best, or the first drawn, continuations of all rows of a request.

use super::TokenId;
use super::best::Best;
use super::processors::{Past, Processors};
use super::random::Random;
use super::softmax::log_sum_exp;
use super::warpers::{Shortlist, Warpers};

/// Ranks the continuations of a step. Keeps its memory from one step to the next.
#[derive(Debug)]
pub(super) struct Ranking {
    keep: usize,
    best: Best,
    /// One row's log-probabilities where something changes them.
    changed: Vec<f32>,
    list: Shortlist,
    drawn: Vec<Drawn>,
    random: Random,
}

/// A token behind a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Continuation {
    /// Of the log-probabilities, as they were changed.
    pub(super) sum: f32,
    pub(super) row: usize,
    pub(super) token: TokenId,
}

#[derive(Clone, Copy, Debug)]
struct Drawn {
    rank: f64,
    next: Continuation,
}

/// A row whose continuations are ranked.
pub(super) struct Ranked<'a> {
    pub(super) row: usize,
    pub(super) sum: f32,
    pub(super) past: Past<'a>,
    pub(super) logits: &'a [f32],
}

impl Ranking {
    /// Keeps this many; draws them with this seed.
    pub(super) fn new(keep: usize, seed: u64) -> Self {
        let (list, random) = (Shortlist::default(), Random::new(seed));
        Self { keep, best: Best::default(), changed: Vec::new(), list, drawn: Vec::new(), random }
    }

    pub(super) fn start(&mut self) {
        self.best.start(self.keep);
        self.drawn.clear();
    }

    /// Looks at all continuations of a row.
    pub(super) fn look(&mut self, Ranked { row, sum, past, logits }: Ranked<'_>, processors: &Processors) {
        let (shift, first) = (log_sum_exp(logits), row * logits.len());
        if processors.is_idle(past) {
            return self.best.look(logits, first, |logit| sum + (logit - shift));
        }
        self.changed.clear();
        self.changed.extend(logits.iter().map(|logit| logit - shift));
        processors.apply(past, &mut self.changed);
        self.best.look(&self.changed, first, |score| sum + score);
    }

    /// Draws from the continuations of a row: those with the most luck are drawn without putting back.
    pub(super) fn draw(&mut self, ranked: Ranked<'_>, processors: &Processors, (warpers, least): (&Warpers, usize)) {
        let Ranked { row, sum, past, logits } = ranked;
        let shift = log_sum_exp(logits);
        self.list.start(logits.iter().map(|logit| logit - shift));
        processors.apply(past, &mut self.list.scores);
        warpers.apply(least, &mut self.list);
        for (&token, score) in self.list.tokens.iter().zip(&self.list.scores) {
            let sum = sum + score;
            if sum > f32::NEG_INFINITY {
                let full = self.drawn.len() == self.keep;
                let last = self.drawn.last().filter(|_| full).map_or(f64::NEG_INFINITY, |last| last.rank);
                let Some(luck) = self.random.gumbel_above(last - f64::from(sum)) else { continue };
                let rank = f64::from(sum) + luck;
                if rank > last {
                    self.drawn.truncate(self.keep - 1);
                    let at = self.drawn.partition_point(|other| other.rank >= rank);
                    self.drawn.insert(at, Drawn { rank, next: Continuation { sum, row, token } });
                }
            }
        }
    }

    /// What was found, the best or the first drawn first.
    pub(super) fn found(&mut self, vocabulary: usize) -> Vec<Continuation> {
        if !self.drawn.is_empty() {
            return self.drawn.iter().map(|drawn| drawn.next).collect();
        }
        let continuation = |sum, at| Continuation { sum, row: at / vocabulary, token: (at % vocabulary) as TokenId };
        self.best.sorted().iter().map(|best| continuation(best.score, best.at)).collect()
    }
}
