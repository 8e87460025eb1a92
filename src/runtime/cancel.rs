//! A stop from outside, for runs that have begun and for those to come.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ort::logging::LogLevel;
use ort::session::RunOptions;

/// Stops the runs of the graphs that it is given to, from any thread, within the node that they are in. It stays cancelled.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    cancelled: bool,
    /// Made by the first run: before, ONNX Runtime need not be loaded.
    options: Option<Arc<RunOptions>>,
}

impl Cancel {
    /// One that stops nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops what runs with it now or later.
    pub fn cancel(&self) {
        let mut state = self.state();
        state.cancelled = true;
        if let Some(options) = &state.options {
            terminate(options);
        }
    }

    /// Whether it was used.
    pub fn is_cancelled(&self) -> bool {
        self.state().cancelled
    }

    /// What a run takes.
    pub(super) fn options(&self) -> Result<Arc<RunOptions>, ort::Error> {
        let mut state = self.state();
        if let Some(options) = &state.options {
            return Ok(options.clone());
        }
        let mut options = RunOptions::new()?;
        // A session whose placement was read logs everything; its runs need not.
        options.set_log_level(LogLevel::Fatal)?;
        let options = Arc::new(options);
        if state.cancelled {
            terminate(&options);
        }
        Ok(state.options.insert(options).clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn terminate(options: &RunOptions) {
    options.terminate().expect("setting a flag cannot fail");
}

impl std::fmt::Debug for Cancel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cancel").field("cancelled", &self.is_cancelled()).finish()
    }
}
