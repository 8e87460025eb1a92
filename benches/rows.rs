//! Where rows of beams lie and what is copied when they fork, beside copies of everything. One layer's keys of 8 requests of 4 beams.

#![allow(missing_docs)]

use std::hint::black_box;

use blip2::decode::Random;
use blip2::language::rows::{Moves, Row, Rows};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};

const REQUESTS: usize = 8;
const BEAMS: usize = 4;
const PREFIX: usize = 64;
const STEPS: usize = 16;
const POSITIONS: usize = PREFIX + STEPS;
const WIDTH: usize = 1024;

/// One row a request, and each of them has been read.
fn read() -> Rows {
    let mut rows = Rows::new(REQUESTS * BEAMS);
    for _ in 0..REQUESTS {
        rows.open(Row { slot: 0, length: PREFIX, offset: 0, n_encoded: 1 });
    }
    rows
}

/// The parents of each step: first all beams of a request have one, then the better ones have more children.
fn parents() -> Vec<Vec<usize>> {
    let mut random = Random::new(3);
    let mut of_row = |row: usize, step: usize| match step {
        0 => row / BEAMS,
        _ => row / BEAMS * BEAMS + (BEAMS as f64 * random.uniform().powi(2)) as usize,
    };
    (0..STEPS).map(|step| (0..REQUESTS * BEAMS).map(|row| of_row(row, step)).collect()).collect()
}

/// Plans all steps; `copy` gets what each of them moves.
fn plan(rows: &mut Rows, steps: &[Vec<usize>], mut copy: impl FnMut(&Moves)) {
    for parents in steps {
        copy(&rows.fork(black_box(parents)));
        rows.advance();
    }
}

fn rows(c: &mut Criterion) {
    let steps = parents();
    c.bench_function("rows: 16 steps planned", |b| {
        b.iter_batched_ref(read, |rows| plan(rows, &steps, |_| ()), BatchSize::SmallInput)
    });
    let mut keys = vec![1.0f32; REQUESTS * BEAMS * POSITIONS * WIDTH];
    let at = |slot: usize, position: usize| (slot * POSITIONS + position) * WIDTH;
    c.bench_function("rows: 16 steps planned, and what differs copied", |b| {
        let mut copy = |moves: &Moves| {
            for step in &moves.past {
                keys.copy_within(at(step.from, step.start)..at(step.from, step.end), at(step.to, step.start));
            }
        };
        b.iter_batched_ref(read, |rows| plan(rows, &steps, &mut copy), BatchSize::SmallInput);
    });
    let mut others = keys.clone();
    let mut copy_all = || {
        for (parents, length) in steps.iter().zip(PREFIX..) {
            for (row, parent) in parents.iter().enumerate() {
                others[at(row, 0)..at(row, length)].copy_from_slice(&keys[at(*parent, 0)..at(*parent, length)]);
            }
            std::mem::swap(&mut keys, &mut others);
        }
    };
    c.bench_function("rows: 16 steps, all copied", |b| b.iter(&mut copy_all));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = rows
}
criterion_main!(benches);
