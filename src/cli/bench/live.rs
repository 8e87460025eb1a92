//! What a terminal shows while a benchmark runs. Elsewhere it is silent.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::bench::record::Record;
use crate::bench::statistics::Sample;

/// Of the last queries, so many make the median that is shown.
const SHOWN: usize = 20;

pub(super) struct Live {
    bar: ProgressBar,
    latencies: Vec<f64>,
}

impl Live {
    /// `n_queries`: those that will be measured at least.
    pub fn new(n_queries: usize) -> Self {
        let bar = ProgressBar::new(n_queries as u64);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {per_sec}, {eta} left {msg}");
        bar.set_style(style.expect("the template is written here"));
        bar.set_message("warming up");
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, latencies: Vec::new() }
    }

    pub fn note(&mut self, record: &Record) {
        if record.warm_up {
            return;
        }
        if self.latencies.is_empty() {
            self.bar.reset_eta();
            self.bar.reset_elapsed();
        }
        self.latencies.push(record.latency_ms());
        let last = &self.latencies[self.latencies.len().saturating_sub(SHOWN)..];
        self.bar.set_message(format!("p50 of the last {}: {:.1} ms", last.len(), Sample::new(last.iter().copied()).median()));
        // A run that goes on for a time may take more than it has to.
        self.bar.set_length(self.bar.length().unwrap_or(0).max(self.latencies.len() as u64));
        self.bar.set_position(self.latencies.len() as u64);
    }

    pub fn end(self) {
        self.bar.finish_and_clear();
    }
}
