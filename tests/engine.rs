//! The library on the demo bundle: rows that come, go, fork and change places must not disturb each other.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::TryRecvError;

use blip2::bundle::{Bundle, TaskName};
use blip2::decode::{
    EarlyStopping, Ends, Finish, Greedy, GreedyOptions, Pick, Processors, Random, RequestId, Room, Scores, Search, StepLoop,
    Strategy, TokenId, Warpers,
};
use blip2::engine::{Flow, Order, Work};
use blip2::language::{LanguageModel, Prefix};
use blip2::pixels::{Limits, Picture};
use blip2::runtime::{Cancel, Runtime, RuntimeError, RuntimeOptions};
use blip2::text::Warning;
use blip2::timing::Stage;
use blip2::{Answer, Engine, Error, Generation, Request, Task};

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
            let prompt = engine.context().prompt(task).unwrap().ids;
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
        decoding.join(prefix.clone(), greedy(prefix), 1);
        let mut tokens = Vec::new();
        while !decoding.is_idle() {
            tokens.extend(decoding.step().into_iter().flat_map(|event| event.tokens));
        }
        written.push(tokens);
    }
    written
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
        let search = Shuffled { greedy: Greedy::new(&prefix.prompt, options), step: ids.len() };
        ids.push(decoding.join(prefix.clone(), Box::new(search), 5));
    }
    let mut found: HashMap<RequestId, Vec<TokenId>> = HashMap::new();
    while !decoding.is_idle() {
        for event in decoding.step() {
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
    let together = engine.ask(&requests, |index, piece| {
        pieces[index].push_str(piece);
        Flow::Continue(())
    });
    let together: Vec<Answer> = together.into_iter().map(Result::unwrap).collect();
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

fn random_bundle(name: &str) -> Engine {
    Engine::open(&root().join("tests/bundles").join(name), &RuntimeOptions::default()).unwrap()
}

fn go_on(_: usize, _: &str) -> Flow {
    Flow::Continue(())
}

#[track_caller]
fn says<T>(found: Result<T, Error>, said: &str) {
    let Err(error) = found else { panic!("`{said}` was to be said") };
    assert!(error.to_string().contains(said), "`{said}` is not in: {error}");
}

#[test]
fn each_text_of_a_batch_can_be_asked_for_its_fault_before_all_fail_with_it() {
    let mut engine = random_bundle("stage1");
    let sight = engine.see(&[&sample(0)]).unwrap().remove(0);
    let texts = ["a red star", "", "what is [SEP]?", "🎉\0"];
    let faults: Vec<bool> = texts.iter().map(|text| engine.context().reading(text).is_err()).collect();
    assert_eq!(faults, [false, true, true, false]);
    let pairs: Vec<_> = texts.iter().map(|text| (&sight, *text)).collect();
    says(engine.seer().match_texts(&pairs), "the text is empty");
    says(engine.seer().embed_texts(&texts[2..]), "special token");
    assert_eq!(engine.seer().match_texts(&[pairs[0], pairs[3]]).unwrap().len(), 2);
    let warnings = engine.context().reading(texts[3]).unwrap().warnings;
    let [Warning::NotInVocabulary { pieces, .. }] = &warnings[..] else { panic!("{warnings:?}") };
    assert_eq!(pieces, &["🎉", "\0"]);
    assert!(Warning::refuse_unknown(&warnings).is_err());

    let mut engine = random_bundle("t5");
    let (task, plain) = (Task::Ask("what?".into()), Generation::default());
    let prompt = engine.context().check(&task, &plain).unwrap();
    says(engine.context().candidate(&prompt, " "), "the text is empty");
    says(engine.context().candidate(&prompt, &"red ".repeat(4000)), "behind this prompt there is room for");
    assert!(!engine.context().candidate(&prompt, "漢").unwrap().warnings.is_empty());
    let sight = engine.see(&[&sample(0)]).unwrap().remove(0);
    says(engine.rank(&sight, &task, &["red", ""]), "the text is empty");
    says(engine.rank(&sight, &task, &[]), "no candidates");
    let answer = engine.answer(&sample(0), Task::Ask("漢?".into()), plain).unwrap();
    assert!(matches!(&answer.warnings[..], [Warning::NotInVocabulary { .. }]), "{:?}", answer.warnings);
}

#[test]
fn what_is_asked_of_the_wrong_bundle_is_an_error() {
    let (mut t5, mut stage1, mut demo) =
        (random_bundle("t5"), random_bundle("stage1"), Engine::open(&demo(), &RuntimeOptions::default()).unwrap());
    let other = "looked at through another bundle";
    let seen = |engine: &mut Engine| engine.see(&[&sample(0)]).unwrap().remove(0);
    let (by_t5, by_demo, by_stage1) = (seen(&mut t5), seen(&mut demo), seen(&mut stage1));
    let request = |sight| Request { sight, task: Task::Caption, generation: Generation::default() };
    let mut both = t5.ask(&[request(&by_t5), request(&by_demo)], go_on);
    says(both.remove(1), other);
    let alone = both.remove(0).unwrap().tokens;
    says(stage1.ask(&[request(&by_t5)], go_on).remove(0), other);
    says(demo.rank(&by_stage1, &Task::Ask("what?".into()), &["red"]), other);
    says(stage1.seer().match_texts(&[(&by_demo, "a star")]), other);
    let mut again = random_bundle("t5");
    assert_eq!(t5.ask(&[request(&by_t5)], go_on).remove(0).unwrap().tokens, alone, "beside one that failed");
    assert_eq!(again.ask(&[request(&by_t5)], go_on).remove(0).unwrap().tokens, alone, "the same bundle, opened twice");

    says(t5.context().reading("a star"), "cannot embed");
    says(t5.seer().match_texts(&[(&by_t5, "a star")]), "cannot match");
    says(stage1.context().check(&Task::Ask("what?".into()), &Generation::default()), "cannot ask");
    says(
        stage1.context().check(&Task::Raw(TaskName::Match, "a".into()), &Generation::default()),
        "no text is written for the task match",
    );
    says(t5.context().check(&Task::Raw(TaskName::Embed, "a".into()), &Generation::default()), "cannot embed");
    says(stage1.context().check(&Task::Raw(TaskName::Caption, "a".into()), &Generation::default()), "take no prompt");
    assert!(t5.seer().match_texts(&[]).is_err() && stage1.seer().match_texts(&[]).unwrap().is_empty());
    assert!(stage1.seer().embed_texts(&[]).unwrap().is_empty() && stage1.seer().embed_pairs(&[]).unwrap().is_empty());
    assert!(t5.ask(&[], go_on).is_empty());
}

#[test]
fn options_are_checked_whoever_asks() {
    let mut engine = Engine::open(&demo(), &RuntimeOptions::default()).unwrap();
    let processors = Processors::default;
    let beam =
        |beams| Strategy::Beam { beams, length_penalty: 1.0, early_stopping: EarlyStopping::default(), n_return: 1, sample: None };
    let cases = [
        (Generation { max_new_tokens: Some(0), ..Generation::default() }, "must be at least 1"),
        (Generation { stop: vec!["a".into(), String::new()], ..Generation::default() }, "a stop string is empty"),
        (
            Generation {
                max_new_tokens: Some(3),
                processors: Processors { min_new_tokens: 4, ..processors() },
                ..Generation::default()
            },
            "at least 4 new tokens are wanted, and 3 at most",
        ),
        (
            Generation { processors: Processors { forced_last: vec![456], ..processors() }, ..Generation::default() },
            "token 456 is not in the vocabulary",
        ),
        (
            Generation { processors: Processors { bad_words: vec![vec![9, 456]], ..processors() }, ..Generation::default() },
            "bad-word: token 456",
        ),
        (
            Generation { processors: Processors { suppressed: (0..456).collect(), ..processors() }, ..Generation::default() },
            "every token of the vocabulary is suppressed",
        ),
        (Generation { strategy: beam(usize::MAX), ..Generation::default() }, "of memory"),
    ];
    for (generation, said) in cases {
        says(engine.answer(&sample(0), Task::Caption, generation), said);
    }
    says(engine.context().check(&Task::AskAs("what?".into(), "{} {}".into()), &Generation::default()), "this one has 2");
    // More beams than there are tokens: rows come as there are continuations.
    let wide = Generation { max_new_tokens: Some(2), strategy: beam(1000), log_probs: Some(usize::MAX), ..Generation::default() };
    let answer = engine.answer(&sample(0), Task::Caption, wide).unwrap();
    assert_eq!((answer.tokens.len(), answer.log_probs[0].alternatives.len()), (2, 456));
}

#[test]
fn a_callback_gives_up_its_text_and_no_other() {
    let mut engine = Engine::open(&demo(), &RuntimeOptions::default()).unwrap();
    let sights = engine.see(&[&sample(0), &sample(1)]).unwrap();
    let request = |sight| Request { sight, task: Task::Caption, generation: Generation::default() };
    let requests: Vec<Request<'_>> = sights.iter().map(request).collect();
    let whole: Vec<Answer> = engine.ask(&requests, go_on).into_iter().map(Result::unwrap).collect();
    let mut said = [String::new(), String::new()];
    let found = engine.ask(&requests, |index, piece| {
        said[index].push_str(piece);
        if index == 0 && said[0].len() > 4 { Flow::Break(()) } else { Flow::Continue(()) }
    });
    let found: Vec<Answer> = found.into_iter().map(Result::unwrap).collect();
    assert_eq!(found[0].finish, Finish::Cancelled);
    assert!(
        found[0].tokens.len() < whole[0].tokens.len() && whole[0].tokens.starts_with(&found[0].tokens),
        "{:?}",
        found[0].tokens
    );
    assert_eq!((&found[1].tokens, &found[1].text), (&whole[1].tokens, &whole[1].text));
    assert!(engine.is_idle());
}

#[test]
fn a_stop_from_another_thread_ends_what_runs_and_the_engine_goes_on_with_a_fresh_one() {
    let mut engine = random_bundle("t5");
    let whole = engine.answer(&sample(0), Task::Caption, Generation::default()).unwrap();
    let cancel = Cancel::new();
    engine.set_cancel(cancel.clone());
    let sight = engine.see(&[&sample(0)]).unwrap().remove(0);
    let request = Request { sight: &sight, task: Task::Caption, generation: Generation::default() };
    let (first, second) = (engine.join(&request).unwrap(), engine.join(&request).unwrap());
    assert!(engine.step().iter().all(|event| event.end.is_none()));
    std::thread::scope(|threads| threads.spawn(|| cancel.cancel()).join()).unwrap();
    let ended = engine.step();
    assert_eq!(ended.iter().map(|event| event.id).collect::<Vec<_>>(), [first, second]);
    for event in ended {
        assert!(matches!(event.end, Some(Err(Error::Runtime(RuntimeError::Cancelled { .. })))));
    }
    assert!(engine.is_idle());
    assert!(matches!(engine.see(&[&sample(0)]), Err(Error::Runtime(RuntimeError::Cancelled { .. }))));
    engine.set_cancel(Cancel::new());
    assert_eq!(engine.answer(&sample(0), Task::Caption, Generation::default()).unwrap().tokens, whole.tokens);
}

#[test]
fn halves_work_on_threads_of_their_own() {
    let engine = Engine::open(&demo(), &RuntimeOptions::default()).unwrap();
    let context = engine.context().clone();
    let (mut seer, writer) = engine.split();
    let mut writer = writer.unwrap();
    let (orders, taken) = std::sync::mpsc::sync_channel(2);
    std::thread::scope(|threads| {
        threads.spawn(move || {
            for index in 0..5 {
                let sight = seer.see(&[&sample(index)]).unwrap().remove(0);
                let prompt = context.check(&Task::Caption, &Generation::default()).unwrap();
                let seen = seer.seen(&[(&sight, &prompt)]).unwrap().remove(0);
                let prefix = Prefix { seen, prompt: prompt.ids, max_new_tokens: 12 };
                let work = Work::Write(Box::default());
                orders.send(Order { prefix, work, warnings: prompt.warnings, timings: sight.timings().clone() }).unwrap();
            }
        });
        let (mut n_texts, mut is_over) = (0, false);
        while !is_over || !writer.is_idle() {
            match taken.try_recv() {
                Ok(order) => drop(writer.join(order).unwrap()),
                Err(TryRecvError::Disconnected) => is_over = true,
                Err(TryRecvError::Empty) => {}
            }
            for answer in writer.step().into_iter().filter_map(|event| event.end) {
                assert!(!answer.unwrap().text.is_empty());
                n_texts += 1;
            }
        }
        assert_eq!(n_texts, 5);
    });
}

#[test]
fn every_request_has_its_own_times() {
    let mut engine = Engine::open(&demo(), &RuntimeOptions::default()).unwrap();
    let sight = engine.see(&[&sample(0)]).unwrap().remove(0);
    let request = Request { sight: &sight, task: Task::Caption, generation: Generation::default() };
    let (early, mut ids) = (std::time::Instant::now(), vec![engine.join(&request).unwrap()]);
    let mut answers = HashMap::new();
    for step in 0.. {
        if step == 3 {
            ids.push(engine.join(&request).unwrap());
        }
        for event in engine.step() {
            if let Some(end) = event.end {
                answers.insert(event.id, (end.unwrap(), early.elapsed()));
            }
        }
        if engine.is_idle() && step > 3 {
            break;
        }
    }
    for id in ids {
        let (answer, ended) = &answers[&id];
        let of = |wanted| answer.timings.iter().find(|(stage, _)| *stage == wanted).unwrap().1;
        assert_eq!(answer.gaps.len() + 1, answer.tokens.len(), "a token a step");
        let decode: std::time::Duration = answer.gaps.iter().sum();
        // It ends with the text, a little behind the last token.
        assert!((decode..decode + std::time::Duration::from_millis(20)).contains(&of(Stage::Decode)), "{:?}", of(Stage::Decode));
        assert!(answer.first_token.unwrap() >= of(Stage::Waiting) + of(Stage::Prefill));
        assert!(of(Stage::Vision) > std::time::Duration::ZERO && answer.first_token.unwrap() + decode <= *ended);
    }
}

#[test]
fn requests_in_hand_are_left_alone() {
    let mut engine = random_bundle("t5");
    let sight = engine.see(&[&sample(0)]).unwrap().remove(0);
    let request = Request { sight: &sight, task: Task::Caption, generation: Generation::default() };
    let alone = engine.ask(std::slice::from_ref(&request), go_on).remove(0).unwrap().tokens;
    let ids = [engine.join(&request).unwrap(), engine.join(&request).unwrap()];
    engine.step();
    says(blip2::verify::run(&mut engine, |_| ()), "requests are in hand");
    // What has rows keeps them.
    engine.writer().unwrap().reserve(Room { rows: 1, positions: 1, read: 1 }).unwrap();
    let mut written = Vec::new();
    while !engine.is_idle() {
        written.extend(engine.step().into_iter().filter_map(|event| Some((event.id, event.end?.unwrap().tokens))));
    }
    assert_eq!(written, ids.map(|id| (id, alone.clone())));
    let id = engine.join(&request).unwrap();
    engine.step();
    engine.leave(id).unwrap();
    blip2::verify::run(&mut engine, |check| assert!(check.holds, "{} {}", check.what, check.found)).unwrap();
}

#[test]
fn what_an_engine_cannot_know_is_one_clear_answer() {
    let mut engine = Engine::open(&demo(), &RuntimeOptions::default()).unwrap();
    let sight = engine.see(&[&sample(0)]).unwrap().remove(0);
    let request = Request { sight: &sight, task: Task::Caption, generation: Generation::default() };
    assert!(engine.step().is_empty(), "without requests there is nothing to do");
    let id = engine.join(&request).unwrap();
    while !engine.is_idle() {
        engine.step();
    }
    says(engine.leave(id), "there is no request 0 here, or it has ended");
    let beams = |beams| {
        let strategy =
            Strategy::Beam { beams, length_penalty: 1.0, early_stopping: EarlyStopping::default(), n_return: 1, sample: None };
        Request { sight: &sight, task: Task::Caption, generation: Generation { strategy, ..Generation::default() } }
    };
    says(engine.join(&beams(1 << 40)), "of memory");
    let both = engine.ask(&[beams(1 << 40), request.clone()], go_on);
    assert!(both[0].is_err() && both[1].is_ok(), "{both:?}");
    let mut matching = random_bundle("stage1");
    says(matching.context().check(&Task::Ask("what?".into()), &Generation::default()), "cannot ask");
    says(matching.join(&request), "looked at through another bundle");
    let too_many = Room { rows: 1 << 40, positions: 64, read: 40 };
    says(engine.writer().unwrap().reserve(too_many), "of memory");
    engine.writer().unwrap().reserve(Room { rows: 8, positions: 64, read: 40 }).unwrap();
    assert_eq!(engine.ask(&[request], go_on).remove(0).unwrap().finish, Finish::Stop);
}

#[test]
fn ten_thousand_requests_that_come_and_go_leave_memory_as_it_was() {
    let mut engine = random_bundle("t5");
    let pictures: Vec<Picture> = (0..3).map(sample).collect();
    let sights = engine.see(&pictures.iter().collect::<Vec<_>>()).unwrap();
    let mut random = Random::new(11);
    let mut below = |n: usize| (random.uniform() * n as f64) as usize;
    let (mut live, mut n_joined, mut resident) = (Vec::new(), 0, Vec::new());
    while n_joined < 10_000 {
        while live.len() < 12 {
            let strategy = match below(3) {
                0 => Strategy::Greedy,
                _ => Strategy::Sample { warpers: Warpers::default(), seed: n_joined, n_return: 1 + below(2) },
            };
            let generation = Generation { max_new_tokens: Some(1 + below(4)), strategy, ..Generation::default() };
            let request = Request { sight: &sights[below(3)], task: Task::Caption, generation };
            live.push(engine.join(&request).unwrap());
            n_joined += 1;
        }
        if below(3) == 0 {
            engine.leave(live.swap_remove(below(live.len()))).unwrap();
        }
        let ended: Vec<RequestId> = engine.step().into_iter().filter(|event| event.end.is_some()).map(|event| event.id).collect();
        live.retain(|id| !ended.contains(id));
        if n_joined % 500 < 12 {
            resident.push(resident_bytes());
        }
    }
    let (early, late) = (resident[resident.len() / 4], *resident.last().unwrap());
    assert!(late < early + (8 << 20), "{early} bytes after a quarter, {late} at the end");
}

/// Memory that the process holds, as Linux counts it.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
