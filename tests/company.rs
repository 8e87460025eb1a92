//! The same texts alone and in company: requests of every kind join and leave at random, on real graphs of every family.
//!
//! `COMPANY_SCHEDULES` says how many schedules each bundle gets, `COMPANY_BUNDLES` names more bundles for the ignored test, which
//! `COMPANY_PROVIDER` runs.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use blip2::bundle::TaskName;
use blip2::decode::{EarlyStopping, Processors, Random, Room, Strategy, Warpers};
use blip2::engine::{Order, Work};
use blip2::language::Prefix;
use blip2::pixels::{Limits, Picture};
use blip2::runtime::{ProviderChoice, RuntimeOptions};
use blip2::{Answer, Engine, Error, Generation, RequestId, Sight, Task};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

fn sample(index: usize) -> Picture {
    Picture::open(&root().join(format!("models/samples/{index}.png")), &Limits::default()).unwrap()
}

fn below(random: &mut Random, n: usize) -> usize {
    (random.uniform() * n as f64) as usize
}

fn strategy(random: &mut Random) -> Strategy {
    let seed = random.bits();
    let warpers = Warpers { temperature: 1.3, top_k: 20, ..Warpers::default() };
    match below(random, 5) {
        0 | 1 => Strategy::Greedy,
        2 => Strategy::Sample { warpers, seed, n_return: 1 + below(random, 3) },
        kind => Strategy::Beam {
            beams: 2 + below(random, 4),
            length_penalty: [0.0, 1.0, -1.0][below(random, 3)],
            early_stopping: [EarlyStopping::Enough, EarlyStopping::Unlikely, EarlyStopping::Impossible][below(random, 3)],
            n_return: 1 + below(random, 2),
            sample: (kind == 4).then_some((warpers, seed)),
        },
    }
}

/// Orders of every kind, made with one bundle: tasks of different lengths, every search, and texts that are read.
fn orders(engine: &mut Engine, random: &mut Random) -> Vec<Order> {
    let pictures: Vec<Picture> = (0..3).map(sample).collect();
    let sights = engine.see(&pictures.iter().collect::<Vec<_>>()).unwrap();
    (0..24).map(|index| order(engine, random, &sights[index % 3], index)).collect()
}

fn order(engine: &mut Engine, random: &mut Random, sight: &Sight, index: usize) -> Order {
    let asks = engine.bundle().require(TaskName::Ask).is_ok();
    let task = match below(random, 3) {
        0 if asks => Task::Ask("how many?".into()),
        1 if asks => Task::Ask("is there a large red star left of the small green ring?".into()),
        _ => Task::Caption,
    };
    let prompt = engine.context().prompt(&task).unwrap();
    let seen = engine.seer().seen(&[(sight, &prompt)]).unwrap().remove(0);
    let room = engine.bundle().room_behind(prompt.ids.len());
    let max_new_tokens = (1 + below(random, 14)).min(room);
    let work = if asks && index % 8 == 7 {
        let answers = ["red", "a red star", "two", "a red ring", "yes"];
        Work::Read(answers.iter().map(|answer| engine.context().candidate(&prompt, answer).unwrap().ids).collect())
    } else {
        // Nothing ends the text before its time, or the model's own end tokens do.
        let min_new_tokens = if index.is_multiple_of(2) { max_new_tokens } else { 0 };
        let processors = Processors { min_new_tokens, ..Processors::default() };
        let log_probs = index.is_multiple_of(3).then_some(2);
        Work::Write(Box::new(Generation { processors, strategy: strategy(random), log_probs, ..Generation::default() }))
    };
    let max_new_tokens = if matches!(work, Work::Read(_)) { room.min(16) } else { max_new_tokens };
    Order { prefix: Prefix { seen, prompt: prompt.ids, max_new_tokens }, work, warnings: Vec::new(), timings: Default::default() }
}

/// What is to be equal: every text with its tokens, and scores within rounding.
fn assert_same(found: &Answer, wanted: &Answer, what: &str) {
    let near = |a: Option<f32>, b: Option<f32>| a.zip(b).map_or(a == b, |(a, b)| (a - b).abs() < 1e-3);
    assert_eq!((&found.tokens, &found.text, found.finish), (&wanted.tokens, &wanted.text, wanted.finish), "{what}");
    assert!(near(found.score, wanted.score), "{what}: {:?} {:?}", found.score, wanted.score);
    assert_eq!(found.candidates.len(), wanted.candidates.len(), "{what}");
    for (found, wanted) in found.candidates.iter().zip(&wanted.candidates) {
        assert_eq!(found.tokens, wanted.tokens, "{what}");
        assert!(near(found.score, wanted.score), "{what}: {:?} {:?}", found.score, wanted.score);
    }
    assert_eq!(found.log_probs.len(), wanted.log_probs.len(), "{what}");
    for (found, wanted) in found.log_probs.iter().zip(&wanted.log_probs) {
        assert!(found.token == wanted.token && (found.log_prob - wanted.log_prob).abs() < 1e-3, "{what}: {found:?} {wanted:?}");
    }
}

/// One request of a schedule.
struct Guest {
    order: usize,
    joins_at: usize,
    leaves_at: usize,
    said: String,
}

fn guests(random: &mut Random, n_orders: usize) -> Vec<Guest> {
    let guest = |random: &mut Random| {
        let joins_at = below(random, 12);
        let leaves_at = if below(random, 5) == 0 { joins_at + below(random, 8) } else { usize::MAX };
        Guest { order: below(random, n_orders), joins_at, leaves_at, said: String::new() }
    };
    (0..2 + below(random, 9)).map(|_| guest(random)).collect()
}

/// Runs a schedule and compares everybody with what they wrote alone.
fn run(engine: &mut Engine, orders: &[Order], alone: &[Answer], random: &mut Random, what: &str) -> usize {
    let mut guests = guests(random, orders.len());
    let mut ids: HashMap<RequestId, usize> = HashMap::new();
    let (mut n_done, mut most) = (0, 0);
    for step in 0.. {
        for (index, guest) in guests.iter().enumerate().filter(|(_, guest)| guest.joins_at == step) {
            ids.insert(engine.writer().unwrap().join(orders[guest.order].clone()).unwrap(), index);
        }
        let leaving: Vec<RequestId> =
            ids.iter().filter(|(_, index)| guests[**index].leaves_at == step).map(|(id, _)| *id).collect();
        for id in leaving {
            let guest = &guests[ids.remove(&id).unwrap()];
            let so_far = engine.leave(id).unwrap();
            assert!(alone[guest.order].text.starts_with(&guest.said), "{what}: `{}`", guest.said);
            assert!(alone[guest.order].tokens.starts_with(&so_far.tokens), "{what}: {:?}", so_far.tokens);
            assert!(matches!(engine.leave(id), Err(Error::NoSuchRequest(_))));
        }
        for event in engine.step() {
            let guest = &mut guests[ids[&event.id]];
            guest.said.push_str(&event.text);
            if let Some(end) = event.end {
                let (found, wanted) = (end.unwrap(), &alone[guest.order]);
                assert_same(&found, wanted, what);
                assert!(found.text == guest.said || matches!(orders[guest.order].work, Work::Read(_)), "{what}: {}", guest.said);
                ids.remove(&event.id);
                n_done += 1;
            }
        }
        most = most.max(engine.writer().unwrap().n_live());
        if step > 12 && engine.is_idle() {
            break;
        }
    }
    assert!(ids.is_empty(), "{what}: somebody was forgotten");
    assert!(most > 0 && n_done > 0 || guests.iter().all(|guest| guest.leaves_at < usize::MAX));
    most
}

fn alone(engine: &mut Engine, order: &Order) -> Answer {
    let id = engine.writer().unwrap().join(order.clone()).unwrap();
    loop {
        let ended = engine.step().into_iter().find_map(|event| (event.id == id).then_some(event.end?));
        if let Some(end) = ended {
            return end.unwrap();
        }
    }
}

fn same_alone_and_in_company(bundle: &str) {
    same_on(bundle, &RuntimeOptions::default());
}

fn same_on(bundle: &str, options: &RuntimeOptions) {
    let n_schedules: u64 = std::env::var("COMPANY_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(120);
    let mut engine = Engine::open(&root().join(bundle), options).unwrap();
    let mut random = Random::new(7);
    let orders = orders(&mut engine, &mut random);
    let wanted: Vec<Answer> = orders.iter().map(|order| alone(&mut engine, order)).collect();
    let texts: std::collections::HashSet<_> = wanted.iter().map(|answer| &answer.tokens).collect();
    assert!(texts.len() > orders.len() / 3, "the texts differ too little to tell");
    // Room for six rows: some wait.
    let six = engine.writer().unwrap().bytes(Room { rows: 6, positions: 128, read: 64 });
    let narrow = RuntimeOptions { max_cache_bytes: Some(six), ..options.clone() };
    let mut narrow = Engine::open(&root().join(bundle), &narrow).unwrap();
    let mut most = [0, 0];
    for seed in 0..n_schedules {
        let mut random = Random::new(1000 + seed);
        let is_narrow = seed % 4 == 3;
        let engine = if is_narrow { &mut narrow } else { &mut engine };
        let found = run(engine, &orders, &wanted, &mut random, &format!("{bundle}, schedule {seed}"));
        most[usize::from(is_narrow)] = most[usize::from(is_narrow)].max(found);
    }
    assert!(most[0] > most[1] && most[1] > 0, "{most:?} were live together");
}

#[test]
fn opt() {
    same_alone_and_in_company("models/demo-opt");
}

#[test]
fn flan_t5() {
    same_alone_and_in_company("models/demo-t5");
    same_alone_and_in_company("tests/bundles/t5");
}

#[test]
fn llama() {
    same_alone_and_in_company("tests/bundles/instruct-llama");
}

#[test]
fn opt_behind_a_q_former_that_reads_questions() {
    same_alone_and_in_company("tests/bundles/vqa-opt");
}

#[test]
fn the_q_former_itself() {
    same_alone_and_in_company("tests/bundles/stage1");
}

#[test]
fn in_8_and_4_bits() {
    let names = ["int8-t5", "int8-vqa-opt", "int8-stage1", "int4-t5-in-blocks"];
    names.iter().for_each(|name| same_alone_and_in_company(&format!("tests/bundles/{name}")));
}

#[test]
#[ignore = "for bundles that are not in git: COMPANY_BUNDLES=DIR,DIR"]
fn in_any_bundle() {
    let named = std::env::var("COMPANY_BUNDLES").expect("COMPANY_BUNDLES names bundles");
    let provider = std::env::var("COMPANY_PROVIDER").map_or_else(|_| ProviderChoice::Auto, |name| name.parse().unwrap());
    let options = RuntimeOptions { provider, ..RuntimeOptions::default() };
    named.split(',').for_each(|bundle| same_on(bundle, &options));
}
