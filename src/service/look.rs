//! Pixels → orders for the language model, vectors or matches. Pictures that wait are looked at in one run.

use std::sync::mpsc::{Receiver, Sender};

use super::job::{Outcome, Waiting, Want};
use super::write::Ordered;
use crate::engine::{Request, Seer, Sight};
use crate::error::Error;
use crate::pixels::Pixels;
use crate::timing::Stage;

/// Looks until no thread makes pictures ready any more.
pub(super) fn run(mut seer: Seer, pictures: &Receiver<(Waiting, Pixels)>, to_write: &Sender<Ordered>) {
    while let Ok(first) = pictures.recv() {
        let more = pictures.try_iter().take(seer.at_once().saturating_sub(1));
        let (mut jobs, pixels): (Vec<_>, Vec<_>) = std::iter::once(first).chain(more).unzip();
        jobs.iter_mut().for_each(|waiting| waiting.begin(Stage::Queue));
        let sights = seer.see_each(&pixels.iter().collect::<Vec<_>>());
        let mut seen = Vec::with_capacity(jobs.len());
        for (waiting, sight) in jobs.into_iter().zip(sights) {
            match sight {
                Ok(mut sight) => {
                    sight.add_timings(&waiting.timings);
                    seen.push((waiting, sight));
                }
                Err(error) => waiting.job.end(Err(error)),
            }
        }
        let (writes, others): (Vec<_>, Vec<_>) =
            seen.into_iter().partition(|(waiting, _)| matches!(waiting.job.want, Want::Write(..)));
        order(&mut seer, writes, to_write);
        others.into_iter().for_each(|(waiting, sight)| compare(&mut seer, waiting, &sight));
    }
}

fn order(seer: &mut Seer, seen: Vec<(Waiting, Sight)>, to_write: &Sender<Ordered>) {
    let requests: Vec<_> = seen.iter().filter_map(|(waiting, sight)| request(waiting, sight)).collect();
    let orders = seer.orders(&requests);
    drop(requests);
    for ((mut waiting, _), order) in seen.into_iter().zip(orders) {
        match order {
            Ok(order) => {
                waiting.wait();
                // The thread that writes ends after this one.
                let _ = to_write.send((waiting, order));
            }
            Err(error) => waiting.job.end(Err(error)),
        }
    }
}

fn request<'a>(waiting: &Waiting, sight: &'a Sight) -> Option<Request<'a>> {
    let Want::Write(task, generation) = &waiting.job.want else { return None };
    Some(Request { sight, task: task.clone(), generation: (**generation).clone() })
}

fn compare(seer: &mut Seer, waiting: Waiting, sight: &Sight) {
    let mut timings = sight.timings().clone();
    let found = match &waiting.job.want {
        Want::Match(texts) => timings
            .time(Stage::Match, || seer.match_texts(&texts.iter().map(|text| (sight, text.as_str())).collect::<Vec<_>>()))
            .map(|found| Outcome::Matched(found, timings)),
        Want::Embed | Want::Write(..) => embedded(sight).map(|vector| Outcome::Embedded(vector, timings)),
    };
    waiting.job.end(found);
}

fn embedded(sight: &Sight) -> Result<Vec<f32>, Error> {
    let embedding = sight.embedding().expect("jobs that the bundle cannot do are refused when they come");
    Ok(embedding.pooled())
}
