//! One step of each search over the vocabulary of OPT, beside what comes to mind first. 32 rows in one loop, or 6 requests of 5 beams.

#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::LazyLock;

use blip2::decode::{
    Beam, BeamOptions, BeamSample, EarlyStopping, Ends, Greedy, GreedyOptions, Processors, Random, Sample, SampleOptions, Scores,
    Search, TokenId, Warpers, log_softmax,
};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};

const VOCABULARY: usize = 50_272;
const ROWS: usize = 32;
const BEAMS: usize = 5;
const PROMPT: [TokenId; 40] = [1; 40];

/// Bell-shaped: no token stands out.
fn flat() -> Vec<f32> {
    let mut random = Random::new(7);
    let mut bell = || 4.0 * ((0..4).map(|_| random.uniform()).sum::<f64>() - 2.0);
    (0..ROWS * VOCABULARY).map(|_| bell() as f32).collect()
}

/// As logits of a language model are: some tokens stand out of a bell-shaped rest, each less than the one before.
fn logits(n_rows: usize) -> &'static [f32] {
    static ALL: LazyLock<Vec<f32>> = LazyLock::new(|| {
        let mut values = flat();
        let places = values.iter_mut().step_by(997).enumerate();
        places.for_each(|(index, value)| *value = 20.0 - 0.5 * (index * 7 % 50) as f32);
        values
    });
    &ALL[..n_rows * VOCABULARY]
}

fn ends() -> Ends {
    Ends { max_new_tokens: usize::MAX, end: vec![2], stop: None }
}

/// A step of searches that already run `n_rows` rows each.
fn step<S: Search>(c: &mut Criterion, name: &str, (values, n_rows): (&[f32], usize), search: impl Fn(usize) -> S) {
    let of_search: Vec<&[f32]> = values.chunks(n_rows * VOCABULARY).collect();
    let begun = || {
        let mut all: Vec<S> = (0..of_search.len()).map(&search).collect();
        let mut picks = Vec::new();
        all.iter_mut().zip(&of_search).for_each(|(search, values)| {
            search.advance(Scores::new(&values[..VOCABULARY], VOCABULARY), &mut picks);
            search.advance(Scores::new(values, VOCABULARY), &mut picks);
        });
        all
    };
    let advance = |all: &mut Vec<S>| {
        let mut picks = Vec::new();
        for (search, values) in all.iter_mut().zip(&of_search) {
            search.advance(Scores::new(black_box(values), VOCABULARY), &mut picks);
        }
        picks
    };
    c.bench_function(name, |b| b.iter_batched_ref(begun, advance, BatchSize::LargeInput));
}

fn greedy(c: &mut Criterion) {
    let options = |log_probs| GreedyOptions { ends: ends(), log_probs, ..GreedyOptions::default() };
    step(c, "greedy: 32 rows", (logits(ROWS), 1), |_| Greedy::new(&PROMPT, options(None)));
    step(c, "greedy: 32 rows, log-probabilities with 5 alternatives", (logits(ROWS), 1), |_| {
        Greedy::new(&PROMPT, options(Some(5)))
    });
    let suppressed = Processors { suppressed: vec![1], ..Processors::default() };
    let options = GreedyOptions { processors: suppressed, ..options(None) };
    step(c, "greedy: 32 rows, a token suppressed", (logits(ROWS), 1), |_| Greedy::new(&PROMPT, options.clone()));
    let values = logits(ROWS);
    let largest = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token);
    let all = |values: &[f32]| values.chunks(VOCABULARY).map(largest).collect::<Vec<_>>();
    c.bench_function("greedy: 32 rows, Iterator::max_by", |b| b.iter(|| all(black_box(values))));
}

fn sampling(c: &mut Criterion) {
    let off = Warpers::default();
    let (top_p, typical) = (Warpers { top_p: 0.9, ..off }, Warpers { typical_p: 0.9, ..off });
    let (values, flat) = (logits(ROWS), &flat()[..]);
    for (name, values, warpers) in [
        ("sampling: 32 rows", values, off),
        ("sampling: 32 rows, top-k 50", values, Warpers { top_k: 50, ..off }),
        ("sampling: 32 rows, top-p 0.9", values, top_p),
        ("sampling: 32 flat rows, top-p 0.9", flat, top_p),
        ("sampling: 32 rows, min-p 0.05", values, Warpers { min_p: 0.05, ..off }),
        ("sampling: 32 rows, typical 0.9", values, typical),
        ("sampling: 32 flat rows, typical 0.9", flat, typical),
        ("sampling: 32 rows, temperature 0.7, top-k 50, top-p 0.9", values, Warpers { temperature: 0.7, top_k: 50, ..top_p }),
    ] {
        let options = |seed| SampleOptions { ends: ends(), warpers, seed: seed as u64, ..SampleOptions::default() };
        step(c, name, (values, 1), |seed| Sample::new(&PROMPT, options(seed)));
    }
    c.bench_function("sampling: 32 rows, full sorts", |b| b.iter(|| sorted(black_box(values))));
}

fn beams(c: &mut Criterion) {
    let options = |sample| BeamOptions {
        beams: BEAMS,
        length_penalty: 1.0,
        early_stopping: EarlyStopping::Unlikely,
        ends: ends(),
        processors: Processors::default(),
        sample,
        log_probs: None,
    };
    step(c, "beams: 6 requests of 5", (logits(6 * BEAMS), BEAMS), |_| Beam::new(&PROMPT, options(None)));
    let recorded = BeamOptions { log_probs: Some(5), ..options(None) };
    step(c, "beams: 6 requests of 5, log-probabilities with 5 alternatives", (logits(6 * BEAMS), BEAMS), |_| {
        Beam::new(&PROMPT, recorded.clone())
    });
    let drawn = |warpers, seed| options(Some(BeamSample { warpers, seed: seed as u64 }));
    step(c, "beams: 6 requests of 5, drawn", (logits(6 * BEAMS), BEAMS), |seed| {
        Beam::new(&PROMPT, drawn(Warpers::default(), seed))
    });
    let top_k = Warpers { top_k: 50, ..Warpers::default() };
    step(c, "beams: 6 requests of 5, drawn, top-k 50", (logits(6 * BEAMS), BEAMS), |seed| Beam::new(&PROMPT, drawn(top_k, seed)));
    let values = logits(6 * BEAMS);
    let requests = |values: &[f32]| values.chunks(BEAMS * VOCABULARY).map(sorted).collect::<Vec<_>>();
    c.bench_function("beams: 6 requests of 5, full sorts", |b| b.iter(|| requests(black_box(values))));
}

fn log_probabilities(c: &mut Criterion) {
    let values = logits(ROWS);
    let ours = |values: &[f32]| values.chunks(VOCABULARY).flat_map(log_softmax).sum::<f32>();
    c.bench_function("log-softmax: 32 rows", |b| b.iter(|| ours(black_box(values))));
    let plain = |values: &[f32]| values.chunks(VOCABULARY).flat_map(plain_log_softmax).sum::<f32>();
    c.bench_function("log-softmax: 32 rows, one value after the other", |b| b.iter(|| plain(black_box(values))));
}

fn plain_log_softmax(logits: &[f32]) -> impl Iterator<Item = f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shift = largest + logits.iter().map(|logit| (logit - largest).exp()).sum::<f32>().ln();
    logits.iter().map(move |logit| logit - shift)
}

/// Log-probabilities of rows, all of them in order.
fn sorted(values: &[f32]) -> Vec<(f32, usize)> {
    let mut all: Vec<(f32, usize)> = values.chunks(VOCABULARY).flat_map(plain_log_softmax).zip(0..).collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all.truncate(2 * BEAMS);
    all
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = greedy, sampling, beams, log_probabilities
}
criterion_main!(benches);
