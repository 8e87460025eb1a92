//! Beam search, step by step as `transformers` does it (`generation/utils.py`, `_beam_search`).
//!
//! 1. Log-probabilities of every running row, then the processors, then the row's sum so far.
//! 2. The best `max(2, 1 + end tokens) × beams` continuations over all rows, best first.
//! 3. Those that end and stand among the first `beams` go to the finished texts, scored by sum / length ^ penalty.
//! 4. The best `beams` that do not end run on.
//! 5. It is over when nothing can run on, when the running rows cannot improve on the worst finished text (how that is judged is
//!    [`EarlyStopping`]), or when all places are taken and that is enough.

use super::processors::{Past, Processors};
use super::ranking::{Continuation, Ranked, Ranking};
use super::warpers::Warpers;
use super::{Ends, Finish, Hypothesis, LogProb, Pick, Scores, Search, TokenId};

/// When beam search ends although rows could run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// As soon as `beams` texts are finished.
    Enough,
    /// When the best running row, at its length now, would score no better than the worst finished text.
    #[default]
    Unlikely,
    /// As `Unlikely`, but a positive length penalty is reckoned at the longest length.
    Impossible,
}

impl std::str::FromStr for EarlyStopping {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "true" => Ok(Self::Enough),
            "false" => Ok(Self::Unlikely),
            "never" => Ok(Self::Impossible),
            _ => Err("false, true and never are known".into()),
        }
    }
}

/// How beam search goes.
#[derive(Clone, Debug)]
pub struct BeamOptions {
    /// Rows that run side by side.
    pub beams: usize,
    /// Exponent of the length that sums are divided by; 0 compares plain sums.
    pub length_penalty: f32,
    /// When to end.
    pub early_stopping: EarlyStopping,
    /// Where a text ends.
    pub ends: Ends,
    /// What changes scores.
    pub processors: Processors,
    /// Draws continuations instead of taking the best.
    pub sample: Option<BeamSample>,
    /// Log-probabilities, each with as many alternatives.
    pub log_probs: Option<usize>,
}

/// How continuations are drawn: without putting back, from the sums over all rows.
#[derive(Clone, Copy, Debug)]
pub struct BeamSample {
    /// How each row's scores are shaped before they are summed.
    pub warpers: Warpers,
    /// The same seed draws the same continuations.
    pub seed: u64,
}

#[derive(Debug, Default)]
struct Row {
    /// Prompt and new tokens.
    tokens: Vec<TokenId>,
    sum: f32,
    /// Its last token among the links.
    link: Option<usize>,
}

/// How probable tokens are, each with the link of the token before it: what rows have in common is kept once.
#[derive(Debug, Default)]
struct Links(Vec<(LogProb, Option<usize>)>);

impl Links {
    fn add(&mut self, log_prob: LogProb, before: Option<usize>) -> usize {
        self.0.push((log_prob, before));
        self.0.len() - 1
    }

    /// From the first token to that of `last`.
    fn up_to(&self, last: Option<usize>) -> Vec<LogProb> {
        let mut all: Vec<LogProb> =
            std::iter::successors(last, |link| self.0[*link].1).map(|link| self.0[link].0.clone()).collect();
        all.reverse();
        all
    }
}

/// Beam search over one prompt.
#[derive(Debug)]
pub struct Beam {
    options: BeamOptions,
    n_prompt: usize,
    rows: Vec<Row>,
    /// Rows of the step before, for their memory.
    old_rows: Vec<Row>,
    ranking: Ranking,
    links: Links,
    /// With the links of their last tokens.
    finished: Vec<(Hypothesis, Option<usize>)>,
    hypotheses: Vec<Hypothesis>,
    finish: Option<Finish>,
}

impl Beam {
    /// A search behind `prompt`, image tokens included.
    ///
    /// # Panics
    /// If `options` ask for no beams.
    pub fn new(prompt: &[TokenId], options: BeamOptions) -> Self {
        assert!(options.beams > 0, "beam search needs at least one beam");
        let keep = 2.max(1 + options.ends.end.len()) * options.beams;
        Self {
            n_prompt: prompt.len(),
            rows: vec![Row { tokens: prompt.to_vec(), ..Row::default() }],
            old_rows: Vec::new(),
            ranking: Ranking::new(keep, options.sample.map_or(0, |sample| sample.seed)),
            links: Links::default(),
            finished: Vec::new(),
            hypotheses: Vec::new(),
            finish: None,
            options,
        }
    }

    /// The continuations under consideration, the best (or the first drawn) first, and why they end.
    fn continuations(&mut self, scores: Scores<'_>) -> Vec<(Continuation, Option<Finish>)> {
        let BeamOptions { ends, processors, sample, .. } = &self.options;
        self.ranking.start();
        for (index, Row { tokens, sum, .. }) in self.rows.iter().enumerate() {
            let past = Past { tokens, n_prompt: self.n_prompt, ends };
            let ranked = Ranked { row: index, sum: *sum, past, logits: scores.row(index) };
            match sample {
                Some(sample) => self.ranking.draw(ranked, processors, (&sample.warpers, 1 + ends.end.len())),
                None => self.ranking.look(ranked, processors),
            }
        }
        let found = self.ranking.found(scores.row(0).len());
        found.into_iter().map(|next| (next, ends.finish_behind(self.written(next.row), next.token))).collect()
    }

    fn written(&self, row: usize) -> &[TokenId] {
        &self.rows[row].tokens[self.n_prompt..]
    }

    fn penalised(&self, sum: f32, length: usize) -> f32 {
        sum / (length as f64).powf(f64::from(self.options.length_penalty)) as f32
    }

    /// Records how probable a continuation's token is, where that is asked for.
    fn link(&mut self, next: &Continuation, scores: Scores<'_>) -> Option<usize> {
        let n_alternatives = self.options.log_probs?;
        let log_prob = LogProb::new(next.token, scores.row(next.row), n_alternatives);
        Some(self.links.add(log_prob, self.rows[next.row].link))
    }

    fn take_finished(&mut self, next: &Continuation, finish: Finish, scores: Scores<'_>) {
        let tokens = [self.written(next.row), &[next.token]].concat();
        let score = Some(self.penalised(next.sum, tokens.len()));
        let link = self.link(next, scores);
        self.finished.push((Hypothesis { tokens, score, finish, log_probs: Vec::new() }, link));
        self.finished.sort_by(|(a, _), (b, _)| score_of(b).total_cmp(&score_of(a)));
        self.finished.truncate(self.options.beams);
    }

    /// Judged after the step: `best` is the best sum that runs on, at `length`.
    fn is_over(&self, best: f32, length: usize) -> bool {
        let is_full = self.finished.len() == self.options.beams;
        let reckoned = match self.options.early_stopping {
            EarlyStopping::Enough if is_full => return true,
            EarlyStopping::Impossible if self.options.length_penalty > 0.0 => self.options.ends.max_new_tokens,
            _ => length,
        };
        is_full && self.finished.last().is_some_and(|(worst, _)| self.penalised(best, reckoned) <= score_of(worst))
    }

    fn settle(&mut self) {
        for (hypothesis, link) in self.finished.drain(..) {
            self.hypotheses.push(Hypothesis { log_probs: self.links.up_to(link), ..hypothesis });
        }
        self.finish = Some(self.hypotheses.first().map_or(Finish::Length, |best| best.finish));
    }

    fn run_on(&mut self, running: &[Continuation], scores: Scores<'_>) {
        let mut rows = std::mem::take(&mut self.old_rows);
        rows.resize_with(running.len(), Row::default);
        for (row, next) in rows.iter_mut().zip(running) {
            row.tokens.clone_from(&self.rows[next.row].tokens);
            row.tokens.push(next.token);
            (row.sum, row.link) = (next.sum, self.link(next, scores));
        }
        self.old_rows = std::mem::replace(&mut self.rows, rows);
    }
}

impl Search for Beam {
    fn advance(&mut self, scores: Scores<'_>, picks: &mut Vec<Pick>) {
        let length = self.written(0).len() + 1;
        let found = self.continuations(scores);
        for (next, finish) in found.iter().take(self.options.beams) {
            if let Some(finish) = *finish {
                self.take_finished(next, finish, scores);
            }
        }
        let mut running: Vec<Continuation> = found.iter().filter(|(_, finish)| finish.is_none()).map(|(next, _)| *next).collect();
        running.sort_by(|a, b| b.sum.total_cmp(&a.sum));
        running.truncate(self.options.beams);
        if running.first().is_none_or(|best| self.is_over(best.sum, length)) {
            return self.settle();
        }
        self.run_on(&running, scores);
        picks.extend(running.iter().map(|next| Pick { parent: next.row, token: next.token }));
    }

    fn settled(&self) -> &[TokenId] {
        self.hypotheses.first().map_or(&[], |best| &best.tokens)
    }

    fn log_probs(&self) -> &[LogProb] {
        self.hypotheses.first().map_or(&[], |best| &best.log_probs)
    }

    fn finish(&self) -> Option<Finish> {
        self.finish
    }

    fn hypotheses(&self) -> &[Hypothesis] {
        &self.hypotheses
    }
}

fn score_of(hypothesis: &Hypothesis) -> f32 {
    hypothesis.score.unwrap_or(f32::NEG_INFINITY)
}
