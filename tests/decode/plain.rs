//! The searches without a thought for speed: whole histories, full sorts, one value after the other.

use std::rc::Rc;

use blip2::decode::{
    BeamOptions, EarlyStopping, Ends, Finish, GreedyOptions, Hypothesis, LogProb, Past, Random, SampleOptions, TokenId, Warpers,
    log_softmax,
};

/// Logits behind the tokens of a row, prompt included.
pub type Logits<'a> = &'a dyn Fn(&[TokenId]) -> Vec<f32>;

/// Tokens, log-probabilities of each, and why the text ended.
pub type Text = (Vec<TokenId>, Vec<LogProb>, Option<Finish>);

pub fn greedy(prompt: &[TokenId], options: &GreedyOptions, model: Logits<'_>) -> Text {
    let GreedyOptions { ends, processors, log_probs } = options;
    write(prompt, ends, *log_probs, model, |past, mut scores| {
        processors.apply(past, &mut scores);
        let best = |best: usize, token: usize| if scores[token] > scores[best] { token } else { best };
        (0..scores.len()).fold(0, best) as TokenId
    })
}

pub fn sample(prompt: &[TokenId], options: &SampleOptions, model: Logits<'_>) -> Text {
    let SampleOptions { ends, processors, warpers, seed, log_probs } = options;
    let mut random = Random::new(*seed);
    write(prompt, ends, *log_probs, model, |past, mut scores| {
        processors.apply(past, &mut scores);
        shape(warpers, 1, &mut scores);
        let probabilities = softmax(&scores);
        let mut left = random.uniform() * probabilities.iter().map(|p| f64::from(*p)).sum::<f64>();
        let mut last = 0;
        for token in (0..scores.len()).filter(|token| probabilities[*token] > 0.0) {
            last = token;
            left -= f64::from(probabilities[token]);
            if left < 0.0 {
                break;
            }
        }
        last as TokenId
    })
}

fn write(
    prompt: &[TokenId],
    ends: &Ends,
    n_alternatives: Option<usize>,
    model: Logits<'_>,
    mut choose: impl FnMut(Past<'_>, Vec<f32>) -> TokenId,
) -> Text {
    let (mut tokens, mut log_probs) = (prompt.to_vec(), Vec::new());
    loop {
        let logits = model(&tokens);
        let token = choose(Past { tokens: &tokens, n_prompt: prompt.len(), ends }, logits.clone());
        tokens.push(token);
        log_probs.extend(n_alternatives.map(|n| log_prob(token, &logits, n)));
        let written = &tokens[prompt.len()..];
        if let Some(finish) = finish(ends, written) {
            return (written.to_vec(), log_probs, Some(finish));
        }
    }
}

fn finish(ends: &Ends, written: &[TokenId]) -> Option<Finish> {
    let is_end = written.last().is_some_and(|last| ends.end.contains(last));
    if is_end || ends.stop.as_ref().is_some_and(|stop| stop.0(written)) {
        return Some(Finish::Stop);
    }
    (written.len() >= ends.max_new_tokens).then_some(Finish::Length)
}

fn log_prob(token: TokenId, logits: &[f32], n_alternatives: usize) -> LogProb {
    let all: Vec<f32> = log_softmax(logits).collect();
    let mut order: Vec<usize> = (0..all.len()).filter(|token| all[*token] > f32::NEG_INFINITY).collect();
    order.sort_by(|a, b| all[*b].total_cmp(&all[*a]));
    let alternatives = order.into_iter().take(n_alternatives).map(|token| (token as TokenId, all[token])).collect();
    LogProb { token, log_prob: all[token as usize], alternatives }
}

#[derive(Clone)]
struct Row {
    tokens: Vec<TokenId>,
    sum: f32,
    log_probs: Vec<LogProb>,
    /// What its last token was chosen from.
    logits: Rc<Vec<f32>>,
    /// What continuations are compared by: sums, or how early they came.
    rank: f64,
}

pub fn beam(prompt: &[TokenId], options: &BeamOptions, model: Logits<'_>) -> Vec<Hypothesis> {
    let BeamOptions { beams, ends, .. } = options;
    let mut random = Random::new(options.sample.map_or(0, |sample| sample.seed));
    let mut rows = vec![Row { tokens: prompt.to_vec(), sum: 0.0, log_probs: Vec::new(), logits: Rc::default(), rank: 0.0 }];
    let mut finished: Vec<Hypothesis> = Vec::new();
    loop {
        let mut next: Vec<Row> =
            rows.iter().flat_map(|row| continuations(row, prompt.len(), options, model, &mut random)).collect();
        next.sort_by(|a, b| b.rank.total_cmp(&a.rank));
        next.truncate(2.max(1 + ends.end.len()) * beams);
        for row in &mut next {
            let token = row.tokens[row.tokens.len() - 1];
            row.log_probs.extend(options.log_probs.map(|n| log_prob(token, &row.logits, n)));
        }
        let finish_of = |row: &Row| finish(ends, &row.tokens[prompt.len()..]);
        let length = rows[0].tokens.len() + 1 - prompt.len();
        let penalised = |sum: f32, length: usize| sum / (length as f64).powf(f64::from(options.length_penalty)) as f32;
        for row in next.iter().take(*beams) {
            let Some(finish) = finish_of(row) else { continue };
            let (tokens, score) = (row.tokens[prompt.len()..].to_vec(), Some(penalised(row.sum, length)));
            finished.push(Hypothesis { tokens, score, finish, log_probs: row.log_probs.clone() });
        }
        finished.sort_by(|a, b| b.score.unwrap().total_cmp(&a.score.unwrap()));
        finished.truncate(*beams);
        next.retain(|row| finish_of(row).is_none());
        next.sort_by(|a, b| b.sum.total_cmp(&a.sum));
        next.truncate(*beams);
        let reckoned = match options.early_stopping {
            EarlyStopping::Impossible if options.length_penalty > 0.0 => ends.max_new_tokens,
            _ => length,
        };
        let is_over = |best: &Row| {
            let worst = finished.last().filter(|_| finished.len() == *beams);
            worst.is_some_and(|worst| {
                options.early_stopping == EarlyStopping::Enough || penalised(best.sum, reckoned) <= worst.score.unwrap()
            })
        };
        if next.first().is_none_or(is_over) {
            return finished;
        }
        rows = next;
    }
}

fn continuations(row: &Row, n_prompt: usize, options: &BeamOptions, model: Logits<'_>, random: &mut Random) -> Vec<Row> {
    let BeamOptions { ends, processors, sample, .. } = options;
    let logits = Rc::new(model(&row.tokens));
    let mut scores: Vec<f32> = log_softmax(&logits).collect();
    processors.apply(Past { tokens: &row.tokens, n_prompt, ends }, &mut scores);
    if let Some(sample) = sample {
        shape(&sample.warpers, 1 + ends.end.len(), &mut scores);
    }
    let possible = (0..scores.len()).filter(|token| row.sum + scores[*token] > f32::NEG_INFINITY);
    let continued = possible.map(|token| {
        let mut next = row.clone();
        next.tokens.push(token as TokenId);
        next.sum += scores[token];
        next.rank = f64::from(if sample.is_some() { scores[token] } else { next.sum });
        next.logits = logits.clone();
        next
    });
    let keep = 2.max(1 + ends.end.len()) * options.beams;
    if sample.is_some() { drawn(row.sum, continued.collect(), keep, random) } else { continued.collect() }
}

/// Draws without putting back, at random times: the next comes at the rate of all that are left.
fn drawn(sum: f32, mut left: Vec<Row>, keep: usize, random: &mut Random) -> Vec<Row> {
    let (mut random, mut time, mut drawn) = (Random::new(random.bits()), 0.0, Vec::new());
    while drawn.len() < keep && !left.is_empty() {
        let total = left.iter().map(|row| row.rank.exp()).sum::<f64>();
        let mut luck = random.uniform() * total;
        let falls = |row: &Row| {
            luck -= row.rank.exp();
            luck < 0.0
        };
        let mut next = left.remove(left.iter().position(falls).unwrap_or(left.len() - 1));
        time += random.exponential() / total;
        next.rank = f64::from(sum) - time.ln();
        drawn.push(next);
    }
    drawn
}

/// What is dropped becomes −∞.
pub fn shape(warpers: &Warpers, keep: usize, scores: &mut [f32]) {
    scores.iter_mut().for_each(|score| *score /= warpers.temperature);
    if warpers.top_k > 0 {
        let mut sorted = scores.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let threshold = sorted[warpers.top_k.max(keep).min(sorted.len()) - 1];
        scores.iter_mut().filter(|score| **score < threshold).for_each(|score| *score = f32::NEG_INFINITY);
    }
    if warpers.top_p < 1.0 {
        let probabilities = softmax(scores);
        let order = sorted_by(scores.len(), |token| -probabilities[token]);
        let mut sum = 0.0;
        let smallest_first = order.iter().skip(keep).rev();
        let dropped: Vec<usize> = smallest_first
            .copied()
            .take_while(|token| {
                sum += f64::from(probabilities[*token]);
                sum as f32 <= 1.0 - warpers.top_p
            })
            .collect();
        drop_all(&dropped, scores);
    }
    if warpers.min_p > 0.0 {
        let probabilities = softmax(scores);
        let order = sorted_by(scores.len(), |token| -probabilities[token]);
        let threshold = warpers.min_p * probabilities[order[0]];
        let dropped: Vec<usize> = order.into_iter().skip(keep).filter(|token| probabilities[*token] < threshold).collect();
        drop_all(&dropped, scores);
    }
    if warpers.typical_p < 1.0 {
        keep_typical(warpers.typical_p, keep, scores);
    }
}

fn keep_typical(mass: f32, keep: usize, scores: &mut [f32]) {
    let probabilities = softmax(scores);
    let logs: Vec<f32> = log_softmax(scores).collect();
    let information = |(p, log): (&f32, &f32)| if *p > 0.0 { f64::from(-p * log) } else { 0.0 };
    let expected = probabilities.iter().zip(&logs).map(information).sum::<f64>() as f32;
    let distances: Vec<f32> = logs.iter().map(|log| (-log - expected).abs()).collect();
    let order = sorted_by(scores.len(), |token| distances[token]);
    let mut sum = 0.0;
    let is_below = |token: &&usize| {
        sum += f64::from(probabilities[**token]);
        (sum as f32) < mass
    };
    let last = order.iter().take_while(is_below).count().min(order.len() - 1);
    let threshold = distances[order[last]];
    let dropped: Vec<usize> = order.into_iter().skip(keep).filter(|token| distances[*token] > threshold).collect();
    drop_all(&dropped, scores);
}

fn sorted_by(n: usize, key: impl Fn(usize) -> f32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| key(*a).total_cmp(&key(*b)));
    order
}

fn drop_all(tokens: &[usize], scores: &mut [f32]) {
    tokens.iter().for_each(|token| scores[*token] = f32::NEG_INFINITY);
}

pub fn softmax(scores: &[f32]) -> Vec<f32> {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total = weights.iter().map(|weight| f64::from(*weight)).sum::<f64>() as f32;
    weights.iter().map(|weight| weight / total).collect()
}
