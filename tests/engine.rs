//! The library on the demo bundle: rows that come, go, fork and change places must not disturb each other.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use blip2::bundle::{Bundle, TaskName};
use blip2::decode::{Ends, Finish, Greedy, GreedyOptions, Pick, RequestId, Scores, Search, StepLoop, TokenId};
use blip2::language::{LanguageModel, Prefix};
use blip2::pixels::{Limits, Picture};
use blip2::runtime::{Runtime, RuntimeOptions};
use blip2::{Engine, Generation, Request, Task};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

fn demo() -> PathBuf {
    root().join("models/demo-opt")
}

fn sample(index: usize) -> Picture {
    Picture::open(&root().join(format!("models/samples/{index}.png")), &Limits::default()).unwrap()
}

/// Prefixes of several pictures with prompts of different lengths.
fn prefixes() -> Vec<Prefix> {
    let mut engine = Engine::open(&demo(), &RuntimeOptions::default()).unwrap();
    let pictures: Vec<Picture> = (0..3).map(sample).collect();
    let sights = engine.see(&pictures.iter().collect::<Vec<_>>()).unwrap();
    let tasks = [
        Task::Caption,
        Task::Ask("how many objects are there?".into()),
        Task::Raw(TaskName::Caption, "a picture of a".into()),
        Task::Ask("is there a large red star left of the small green ring?".into()),
    ];
    let mut found = Vec::new();
    for (index, task) in tasks.iter().enumerate() {
        for sight in &sights {
            let prompt = engine.prompt(task).unwrap().ids;
            found.push(Prefix { seen: sight.seen().unwrap(), prompt, max_new_tokens: 10 + 3 * index });
        }
    }
    found
}

fn decoding() -> StepLoop<LanguageModel> {
    let bundle = Bundle::open(&demo()).unwrap();
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    StepLoop::new(LanguageModel::open(&runtime, &bundle).unwrap())
}

fn limit(prefix: &Prefix) -> Ends {
    Ends { max_new_tokens: prefix.max_new_tokens, ..Ends::default() }
}

fn greedy(prefix: &Prefix) -> Box<dyn Search + Send> {
    // No end token: every row runs to its own limit, so that many are live together.
    Box::new(Greedy::new(&prefix.prompt, GreedyOptions { ends: limit(prefix), ..GreedyOptions::default() }))
}

fn alone(prefixes: &[Prefix]) -> Vec<Vec<TokenId>> {
    let mut decoding = decoding();
    let mut written = Vec::new();
    for prefix in prefixes {
        decoding.join(prefix.clone(), greedy(prefix));
        let mut tokens = Vec::new();
        while !decoding.is_idle() {
            decoding.admit().unwrap();
            tokens.extend(decoding.step().unwrap().into_iter().flat_map(|event| event.tokens));
        }
        written.push(tokens);
    }
    written
}

#[test]
fn rows_that_join_and_leave_between_steps_write_what_they_write_alone() {
    let prefixes = prefixes();
    let wanted = alone(&prefixes);
    assert!(wanted.iter().collect::<std::collections::HashSet<_>>().len() > 6, "the texts differ too little to tell");
    let mut decoding = decoding();
    let mut found: HashMap<RequestId, Vec<TokenId>> = HashMap::new();
    let mut ids = Vec::new();
    let mut waiting = prefixes.iter();
    let mut dropped = None;
    // Two come, then one every second step; one leaves in the middle.
    for step in 0.. {
        let n_joining = if step == 0 { 2 } else { usize::from(step % 2 == 1) };
        for prefix in waiting.by_ref().take(n_joining) {
            ids.push(decoding.join(prefix.clone(), greedy(prefix)));
        }
        decoding.admit().unwrap();
        for event in decoding.step().unwrap() {
            found.entry(event.id).or_default().extend(event.tokens);
        }
        if step == 6 {
            dropped = Some(ids[3]);
            decoding.leave(ids[3]);
        }
        if decoding.is_idle() && waiting.len() == 0 {
            break;
        }
    }
    for (id, wanted) in ids.iter().zip(&wanted) {
        let found = &found[id];
        if Some(*id) == dropped {
            assert!(found.len() < wanted.len() && wanted.starts_with(found));
        } else {
            assert_eq!(found, wanted);
        }
    }
}

/// Greedy search on rows that fork, change places and go: all of them carry the same text, so all must score alike.
struct Shuffled {
    greedy: Greedy,
    step: usize,
}

impl Search for Shuffled {
    fn advance(&mut self, scores: Scores<'_>, picks: &mut Vec<Pick>) {
        for row in 1..scores.n_rows() {
            let largest = scores.row(0).iter().zip(scores.row(row)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(largest < 1e-3, "row {row} differs by {largest} in step {}", self.step);
        }
        let mut own = Vec::new();
        self.greedy.advance(scores, &mut own);
        let parents: &[usize] = [&[0, 0, 0][..], &[2, 0, 1], &[1, 1, 2], &[0, 2], &[1, 0, 1, 0, 1], &[4, 4, 0, 3]][self.step % 6];
        let n_rows = scores.n_rows();
        picks.extend(own.first().iter().flat_map(|pick| parents.iter().map(|p| Pick { parent: p % n_rows, token: pick.token })));
        self.step += 1;
    }

    fn settled(&self) -> &[TokenId] {
        self.greedy.settled()
    }

    fn finish(&self) -> Option<Finish> {
        self.greedy.finish()
    }
}

#[test]
fn forked_and_reordered_rows_keep_their_own_past() {
    let prefixes = prefixes();
    let wanted = alone(&prefixes);
    let mut decoding = decoding();
    let mut ids = Vec::new();
    for prefix in &prefixes {
        let options = GreedyOptions { ends: limit(prefix), ..GreedyOptions::default() };
        ids.push(
            decoding.join(prefix.clone(), Box::new(Shuffled { greedy: Greedy::new(&prefix.prompt, options), step: ids.len() })),
        );
    }
    let mut found: HashMap<RequestId, Vec<TokenId>> = HashMap::new();
    decoding.admit().unwrap();
    while !decoding.is_idle() {
        for event in decoding.step().unwrap() {
            found.entry(event.id).or_default().extend(event.tokens);
        }
    }
    for (id, wanted) in ids.iter().zip(&wanted) {
        assert_eq!(&found[id], wanted);
    }
}

#[test]
fn streamed_pieces_make_the_text_and_pictures_cost_one_pass() {
    let mut engine = Engine::open(&demo(), &RuntimeOptions::default()).unwrap();
    let pictures: Vec<Picture> = (0..4).map(sample).collect();
    let sights = engine.see(&pictures.iter().collect::<Vec<_>>()).unwrap();
    let request = |sight| Request { sight, task: Task::Caption, generation: Generation::default() };
    let mut pieces = vec![String::new(); sights.len()];
    let requests: Vec<Request<'_>> = sights.iter().map(request).collect();
    let together = engine.ask(&requests, |index, piece| pieces[index].push_str(piece)).unwrap();
    for ((picture, answer), pieces) in pictures.iter().zip(&together).zip(&pieces) {
        let alone = engine.answer(picture, Task::Caption, Generation::default()).unwrap();
        assert_eq!((&alone.text, &alone.tokens), (&answer.text, &answer.tokens));
        assert_eq!(pieces, &answer.text);
    }
}

#[test]
fn an_engine_works_on_after_a_request_it_refuses() {
    let mut engine = Engine::open(&demo(), &RuntimeOptions::default()).unwrap();
    let before = engine.answer(&sample(0), Task::Caption, Generation::default()).unwrap();
    assert!(engine.answer(&sample(0), Task::Ask(" ".into()), Generation::default()).is_err());
    assert!(engine.see(&[]).unwrap().is_empty());
    let empty = Picture::from_rgb(1, 1, vec![0; 3]);
    engine.answer(&empty, Task::Caption, Generation::default()).unwrap();
    let after = engine.answer(&sample(0), Task::Caption, Generation::default()).unwrap();
    assert_eq!(before.tokens, after.tokens);
}
