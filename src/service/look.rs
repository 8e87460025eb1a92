//! Pixels → orders for the language model, vectors or matches. Pictures that wait are looked at in one run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Instant;

use super::Shared;
use super::job::{Outcome, Waiting, Want};
use super::kept::Key;
use super::ready::Ready;
use super::write::Ordered;
use crate::engine::{Order, Request, Seer, Sight};
use crate::error::Error;
use crate::pixels::Pixels;
use crate::timing::{Stage, Timings};

/// A job with its picture, if it has one.
type Seen = (Waiting, Option<Sight>);

/// Looks until no thread makes pictures ready any more.
pub(super) fn run(mut seer: Seer, shared: &Shared, pictures: &Receiver<(Waiting, Ready)>, to_write: &SyncSender<Ordered>) {
    while let Ok(first) = pictures.recv() {
        let together = gather(first, &seer, shared, pictures);
        // Jobs that are lost on the way are told so when they are dropped; the next come through as before.
        let _ = catch_unwind(AssertUnwindSafe(|| look(&mut seer, shared, together, to_write)));
    }
}

/// Those that wait already, and for a short while those that are nearly here: a run for several takes less time than several runs.
fn gather(first: (Waiting, Ready), seer: &Seer, shared: &Shared, pictures: &Receiver<(Waiting, Ready)>) -> Vec<(Waiting, Ready)> {
    let until = Instant::now() + shared.delay;
    let mut together = vec![first];
    while together.len() < seer.at_once() {
        let next = match pictures.try_recv() {
            Ok(next) => Some(next),
            Err(_) if shared.n_on_their_way() == 0 => None,
            Err(_) => pictures.recv_timeout(until.saturating_duration_since(Instant::now())).ok(),
        };
        let Some(next) = next else { break };
        together.push(next);
    }
    together
}

fn look(seer: &mut Seer, shared: &Shared, together: Vec<(Waiting, Ready)>, to_write: &SyncSender<Ordered>) {
    let (mut seen, mut pictures) = (Vec::<Seen>::new(), Vec::new());
    for (mut waiting, ready) in together {
        waiting.begin(Stage::Queue);
        let Some(waiting) = waiting.if_wanted() else { continue };
        match ready {
            Ready::Pixels(pixels, key) => pictures.push((waiting, pixels, key)),
            Ready::Seen(sight) => seen.push((waiting, Some(sight))),
            Ready::Texts => seen.push((waiting, None)),
        }
    }
    seen.extend(see(seer, shared, pictures));
    for (waiting, sight) in &mut seen {
        if let Some(sight) = sight {
            sight.add_timings(&waiting.timings);
        }
    }
    let (writes, others): (Vec<_>, Vec<_>) = seen.into_iter().partition(|(waiting, _)| waiting.job.want.is_for_writer());
    order(seer, writes, to_write);
    others.into_iter().for_each(|seen| compare(seer, seen));
}

fn see(seer: &mut Seer, shared: &Shared, pictures: Vec<(Waiting, Pixels, Option<Key>)>) -> Vec<Seen> {
    if pictures.is_empty() {
        return Vec::new();
    }
    let start = Instant::now();
    let sights = seer.see_each(&pictures.iter().map(|(_, pixels, _)| pixels).collect::<Vec<_>>());
    shared.watch.looked(pictures.len(), start.elapsed());
    let mut seen = Vec::with_capacity(pictures.len());
    for ((waiting, _, key), sight) in pictures.into_iter().zip(sights) {
        match sight {
            Ok(sight) => {
                if let Some(key) = key {
                    shared.kept.keep(key, &sight);
                }
                seen.push((waiting, Some(sight)));
            }
            Err(error) => waiting.job.end(Err(error)),
        }
    }
    seen
}

fn order(seer: &mut Seer, seen: Vec<Seen>, to_write: &SyncSender<Ordered>) {
    let (ranks, writes): (Vec<_>, Vec<_>) = seen.into_iter().partition(|(waiting, _)| matches!(waiting.job.want, Want::Rank(..)));
    let requests: Vec<_> = writes.iter().filter_map(|(waiting, sight)| request(waiting, sight.as_ref()?)).collect();
    let orders = seer.orders(&requests);
    drop(requests);
    for ((waiting, _), order) in writes.into_iter().zip(orders) {
        pass_on(waiting, order, to_write);
    }
    for (waiting, sight) in ranks {
        let order = ranking(seer, &waiting, sight.as_ref());
        pass_on(waiting, order, to_write);
    }
}

fn pass_on(mut waiting: Waiting, order: Result<Order, Error>, to_write: &SyncSender<Ordered>) {
    match order {
        Ok(order) => {
            waiting.wait();
            // The thread that writes ends after this one.
            let _ = to_write.send((waiting, order));
        }
        Err(error) => waiting.job.end(Err(error)),
    }
}

fn request<'a>(waiting: &Waiting, sight: &'a Sight) -> Option<Request<'a>> {
    let Want::Write(task, generation) = &waiting.job.want else { return None };
    Some(Request { sight, task: task.clone(), generation: (**generation).clone() })
}

fn ranking(seer: &mut Seer, waiting: &Waiting, sight: Option<&Sight>) -> Result<Order, Error> {
    let (Want::Rank(task, answers), Some(sight)) = (&waiting.job.want, sight) else { return Err(Error::NoPicture) };
    seer.ranking(sight, task, &answers.iter().map(String::as_str).collect::<Vec<_>>())
}

fn compare(seer: &mut Seer, (waiting, sight): Seen) {
    let Waiting { job, timings, .. } = waiting;
    let mut timings = sight.as_ref().map_or(timings, |sight| sight.timings().clone());
    let found = match (&job.want, sight) {
        (Want::Match(texts), Some(sight)) => timings
            .time(Stage::Match, || seer.match_texts(&texts.iter().map(|text| (&sight, text.as_str())).collect::<Vec<_>>()))
            .map(|found| Outcome::Matched(found, timings)),
        (Want::EmbedTexts(texts), _) => timings
            .time(Stage::Match, || seer.embed_texts(&texts.iter().map(String::as_str).collect::<Vec<_>>()))
            .map(|found| Outcome::Texts(found.into_iter().map(|text| text.pooled).collect(), timings)),
        (Want::See, Some(sight)) => Ok(Outcome::Seen(Box::new(sight))),
        (_, Some(sight)) => Ok(embedded(&sight, timings)),
        (_, None) => Err(Error::NoPicture),
    };
    job.end(found);
}

fn embedded(sight: &Sight, timings: Timings) -> Outcome {
    let embedding = sight.embedding().expect("jobs that the bundle cannot do are refused when they come");
    Outcome::Embedded(embedding.pooled(), timings)
}
