//! Work that is done on other threads before anybody asks for it, a bounded number of items ahead.

use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

/// Results in the order of their items, whichever is done first.
pub(super) struct Ahead<R> {
    line: Receiver<Receiver<R>>,
    /// The first in line, while it is in work.
    next: Option<Receiver<R>>,
}

/// How far ahead.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    pub n_threads: usize,
    /// Results that may lie there, those in work included; each thread holds one more at most.
    pub depth: usize,
}

struct Source<I, R> {
    items: I,
    line: SyncSender<Receiver<R>>,
}

impl<R: Send + 'static> Ahead<R> {
    /// Starts the threads. They end with the items, or when this is dropped; none is waited for, since one may hang in a pipe.
    pub fn new<I>(items: I, reach: Reach, work: impl Fn(I::Item) -> R + Send + Sync + 'static) -> Self
    where
        I: Iterator + Send + 'static,
    {
        let (sender, line) = sync_channel(reach.depth);
        let source = Arc::new(Mutex::new(Source { items: items.fuse(), line: sender }));
        let work = Arc::new(work);
        for _ in 0..reach.n_threads {
            let (source, work) = (source.clone(), work.clone());
            std::thread::spawn(move || {
                while let Some((item, done)) = take(&source) {
                    // Nobody may wait for it any more.
                    let _ = done.send(work(item));
                }
            });
        }
        Self { line, next: None }
    }

    /// The next result, once it is there; nothing behind the last.
    pub fn wait(&mut self) -> Option<R> {
        let next = self.next.take().or_else(|| self.line.recv().ok())?;
        Some(next.recv().expect("work does not panic"))
    }

    /// The next result, if it is there.
    pub fn ready(&mut self) -> Option<R> {
        let next = self.next.take().or_else(|| self.line.try_recv().ok())?;
        match next.try_recv() {
            Ok(result) => Some(result),
            Err(TryRecvError::Empty) => {
                self.next = Some(next);
                None
            }
            Err(TryRecvError::Disconnected) => panic!("work does not panic"),
        }
    }
}

/// The next item, with its place in line: that is taken under one lock, so that the order is that of the items.
fn take<I: Iterator, R>(source: &Mutex<Source<I, R>>) -> Option<(I::Item, SyncSender<R>)> {
    let mut source = source.lock().unwrap_or_else(PoisonError::into_inner);
    let item = source.items.next()?;
    let (done, result) = sync_channel(1);
    source.line.send(result).ok()?;
    Some((item, done))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn results_come_in_order_and_no_more_are_made_than_may_lie_there() {
        static N_BEGUN: AtomicUsize = AtomicUsize::new(0);
        let work = |item: u64| {
            N_BEGUN.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(item * 7 % 5));
            item
        };
        let mut ahead = Ahead::new(0..40, Reach { n_threads: 3, depth: 4 }, work);
        for wanted in 0..40 {
            std::thread::sleep(Duration::from_millis(2));
            let n_begun = N_BEGUN.load(Ordering::SeqCst);
            assert!(n_begun <= wanted as usize + 4 + 1, "{n_begun} are begun where {wanted} were taken");
            let found = if wanted % 2 == 0 { ahead.wait() } else { ahead.ready().or_else(|| ahead.wait()) };
            assert_eq!(found, Some(wanted));
        }
        assert_eq!((ahead.wait(), ahead.ready()), (None, None));
    }
}
