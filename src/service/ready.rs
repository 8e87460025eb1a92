//! Encoded pictures → pixels, on threads of their own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::thread::JoinHandle;

use super::Shared;
use super::job::{Source, Waiting};
use super::kept::Key;
use crate::engine::Sight;
use crate::error::Error;
use crate::pixels::{Limits, Picture, Pixels};
use crate::timing::Stage;

/// What the thread that looks gets of a job.
pub(super) enum Ready {
    /// A picture, and where what is made of it is kept.
    Pixels(Pixels, Option<Key>),
    /// A picture that was looked at before.
    Seen(Sight),
    /// Nothing but texts.
    Texts,
}

/// Threads that take jobs in turn, each until there are no more.
pub(super) fn start(shared: &Arc<Shared>, to_look: &SyncSender<(Waiting, Ready)>, n_threads: usize) -> Vec<JoinHandle<()>> {
    let worker = || {
        let (shared, to_look) = (shared.clone(), to_look.clone());
        move || {
            while let Some((waiting, source)) = shared.line.next() {
                // A job that is lost on the way is told so when it is dropped; this thread takes the next one.
                let _ = catch_unwind(AssertUnwindSafe(|| take(&shared, waiting, source, &to_look)));
            }
        }
    };
    (0..n_threads).map(|_| std::thread::spawn(worker())).collect()
}

fn take(shared: &Shared, mut waiting: Waiting, source: Source, to_look: &SyncSender<(Waiting, Ready)>) {
    waiting.begin(Stage::Queue);
    let Some(mut waiting) = waiting.if_wanted() else { return };
    let on_its_way = shared.on_its_way();
    match ready(shared, &mut waiting, source) {
        Ok(ready) => {
            waiting.wait();
            drop(on_its_way);
            // The thread that looks ends after this one.
            let _ = to_look.send((waiting, ready));
        }
        Err(error) => waiting.job.end(Err(error)),
    }
}

fn ready(shared: &Shared, waiting: &mut Waiting, source: Source) -> Result<Ready, Error> {
    match source {
        Source::Texts => Ok(Ready::Texts),
        Source::Seen(sight) => Ok(Ready::Seen(sight.without_timings())),
        Source::Encoded(bytes, limits) => pixels(shared, waiting, &bytes, &limits),
    }
}

fn pixels(shared: &Shared, waiting: &mut Waiting, bytes: &[u8], limits: &Limits) -> Result<Ready, Error> {
    let (terms, timings) = (&waiting.job.terms, &mut waiting.timings);
    let picture = timings.time(Stage::DecodeImage, || Picture::decode(bytes, limits))?;
    let key = terms.keeps.then(|| timings.time(Stage::Preprocess, || shared.kept.key(terms.owner, &picture))).flatten();
    if let Some(sight) = key.and_then(|key| shared.kept.get(&key)) {
        return Ok(Ready::Seen(sight));
    }
    let image = &shared.context.bundle().facts().image;
    let pixels = timings.time(Stage::Preprocess, || Pixels::from_pictures(&[&picture], image))?;
    Ok(Ready::Pixels(pixels, key))
}
