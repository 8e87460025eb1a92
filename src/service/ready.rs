//! Encoded pictures → pixels, on threads of their own.

use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::job::Waiting;
use crate::engine::Context;
use crate::error::Error;
use crate::pixels::{Picture, Pixels};
use crate::timing::Stage;

/// Threads that take jobs in turn, each until there are no more.
pub(super) fn start(
    context: Arc<Context>,
    jobs: Receiver<Waiting>,
    to_look: Sender<(Waiting, Pixels)>,
    n_threads: usize,
) -> Vec<JoinHandle<()>> {
    let jobs = Arc::new(Mutex::new(jobs));
    let worker = || {
        let (context, jobs, to_look) = (context.clone(), jobs.clone(), to_look.clone());
        move || {
            while let Some(mut waiting) = take(&jobs) {
                waiting.begin(Stage::Queue);
                match pixels(&context, &mut waiting) {
                    Ok(pixels) => {
                        waiting.wait();
                        // The thread that looks ends after this one.
                        let _ = to_look.send((waiting, pixels));
                    }
                    Err(error) => waiting.job.end(Err(error)),
                }
            }
        }
    };
    (0..n_threads).map(|_| std::thread::spawn(worker())).collect()
}

fn take(jobs: &Mutex<Receiver<Waiting>>) -> Option<Waiting> {
    jobs.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

fn pixels(context: &Context, waiting: &mut Waiting) -> Result<Pixels, Error> {
    let picture = waiting.time(Stage::DecodeImage, |job| Picture::decode(&job.picture, &job.limits))?;
    Ok(waiting.time(Stage::Preprocess, |_| Pixels::from_pictures(&[&picture], &context.bundle().facts().image))?)
}
