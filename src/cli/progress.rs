//! How far long work has come: a line on standard error, where that is a terminal and results go elsewhere.

use std::io::{IsTerminal, Write as _, stderr, stdout};
use std::time::{Duration, Instant};

/// Between two lines.
const PAUSE: Duration = Duration::from_millis(200);

pub(super) struct Progress {
    shows: bool,
    start: Instant,
    last: Option<Instant>,
    n_done: usize,
    count: Option<usize>,
}

impl Progress {
    /// Of `count` pictures, where that is known.
    pub fn new(count: Option<usize>) -> Self {
        let shows = count != Some(1) && stderr().is_terminal() && !stdout().is_terminal();
        Self { shows, start: Instant::now(), last: None, n_done: 0, count }
    }

    /// Makes room for other lines.
    pub fn clear(&mut self) {
        if self.last.is_some() {
            let _ = stderr().write_all(b"\r\x1b[K");
        }
    }

    /// One more is done.
    pub fn advance(&mut self) {
        self.n_done += 1;
        if !self.shows || self.last.is_some_and(|last| last.elapsed() < PAUSE) {
            return;
        }
        self.last = Some(Instant::now());
        let _ = write!(stderr(), "\r{}\x1b[K", said(self.n_done, self.count, self.start.elapsed()));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

fn said(n_done: usize, count: Option<usize>, time: Duration) -> String {
    let of = count.map_or(String::new(), |count| format!(" of {count}"));
    format!("{n_done}{of} pictures, {:.1} a second", n_done as f64 / time.as_secs_f64().max(1e-3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_how_many_and_how_fast() {
        assert_eq!(said(30, Some(100), Duration::from_secs(4)), "30 of 100 pictures, 7.5 a second");
        assert_eq!(said(3, None, Duration::from_secs(2)), "3 pictures, 1.5 a second");
    }
}
