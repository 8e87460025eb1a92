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
    /// Minus the logarithm of the time at which it came.
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

    /// Draws continuations of a row without putting back: each comes at a random time, at the rate of its probability, and over all rows the
    /// first to come are those drawn. Only these are ever looked at, for the next comes at the rate of all that are left together, and is
    /// each of them as probably as that one's share is large.
    pub(super) fn draw(&mut self, ranked: Ranked<'_>, processors: &Processors, (warpers, least): (&Warpers, usize)) {
        let Ranked { row, sum, past, logits } = ranked;
        let shift = self.list.weights.weigh(logits);
        self.list.start(logits.iter().map(|logit| logit - shift));
        processors.apply(past, &mut self.list.scores);
        warpers.apply(least, &mut self.list);
        let is_plain = processors.is_idle(past) && *warpers == Warpers::default();
        // A stream of its own: how many of a row's continuations are looked at changes nothing in the next row.
        let mut random = Random::new(self.random.bits());
        let (mut of_all, mut time) = (if is_plain { 0.0 } else { self.list.weigh() }, 0.0);
        for _ in 0..self.keep {
            if self.list.weights.share() == 0.0 {
                // All that is left is too improbable to have a weight beside what came before it.
                (of_all, time) = (self.list.weigh(), 0.0);
            }
            let Some(place) = self.list.weights.draw(random.uniform()) else { return };
            time += random.exponential() / self.list.weights.share();
            let next = Continuation { sum: sum + self.list.scores[place], row, token: self.list.tokens[place] };
            if !self.comes(Drawn { rank: f64::from(sum) + f64::from(of_all) - time.ln(), next }) {
                return;
            }
            self.list.take(place);
        }
    }

    /// Whether a continuation is among the first so far.
    fn comes(&mut self, drawn: Drawn) -> bool {
        let at = self.drawn.partition_point(|other| other.rank >= drawn.rank);
        self.drawn.insert(at, drawn);
        self.drawn.truncate(self.keep);
        at < self.keep
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::Ends;

    fn drawn(rows: &[(f32, &[f32])], keep: usize, seed: u64) -> Vec<Continuation> {
        let mut ranking = Ranking::new(keep, seed);
        ranking.start();
        for (row, (sum, logits)) in rows.iter().enumerate() {
            let past = Past { tokens: &[], n_prompt: 0, ends: &Ends::default() };
            let ranked = Ranked { row, sum: *sum, past, logits };
            ranking.draw(ranked, &Processors::default(), (&Warpers::default(), 1));
        }
        ranking.found(rows[0].1.len())
    }

    #[test]
    fn the_first_drawn_is_of_any_row_by_its_sum() {
        const N_DRAWS: u64 = 20_000;
        let rows: [(f32, &[f32]); 2] = [(-1.0, &[0.0, 1.0, 2.0]), (-1.5, &[2.0, 0.0, -1.0])];
        let mut counts = [[0.0; 3]; 2];
        for seed in 0..N_DRAWS {
            let first = drawn(&rows, 2, seed)[0];
            counts[first.row][first.token as usize] += 1.0 / N_DRAWS as f64;
        }
        let whole: f64 = rows.iter().map(|(sum, _)| f64::from(*sum).exp()).sum();
        for ((sum, logits), counts) in rows.iter().zip(counts) {
            for (logit, found) in logits.iter().zip(counts) {
                let wanted = f64::from(sum + logit - log_sum_exp(logits)).exp() / whole;
                let spread = (wanted * (1.0 - wanted) / N_DRAWS as f64).sqrt();
                assert!((found - wanted).abs() < 4.0 * spread, "{found}, {wanted}");
            }
        }
    }

    #[test]
    fn what_has_no_weight_beside_others_is_drawn_behind_them() {
        let rows: [(f32, &[f32]); 1] = [(-3.0, &[-200.0, 0.0, f32::NEG_INFINITY, -450.0])];
        let found: Vec<_> = drawn(&rows, 4, 1).iter().map(|next| (next.token, next.sum)).collect();
        assert_eq!(found, [(1, -3.0), (0, -203.0), (3, -453.0)]);
    }
}
