//! A stop from outside, for runs that have begun and for those to come.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ort::logging::LogLevel;
use ort::session::RunOptions;

use super::recording::{Number, Recording};

/// Stops the runs of the graphs that it is given to, from any thread, within the node that they are in. It stays cancelled.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    cancelled: bool,
    /// Of each kind of run, made by the first: before, ONNX Runtime need not be loaded.
    options: BTreeMap<Option<Number>, Arc<RunOptions>>,
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
        state.options.values().for_each(|options| terminate(options));
    }

    /// Whether it was used.
    pub fn is_cancelled(&self) -> bool {
        self.state().cancelled
    }

    /// What a run takes.
    pub(super) fn options(&self) -> Result<Arc<RunOptions>, ort::Error> {
        self.options_of(None)
    }

    /// What a run takes that is recorded, or repeated.
    pub(super) fn options_of(&self, recording: Option<Number>) -> Result<Arc<RunOptions>, ort::Error> {
        let mut state = self.state();
        if let Some(options) = state.options.get(&recording) {
            return Ok(options.clone());
        }
        let mut options = RunOptions::new()?;
        // A session whose placement was read logs everything; its runs need not.
        options.set_log_level(LogLevel::Fatal)?;
        Recording::set(recording, &mut options)?;
        let options = Arc::new(options);
        if state.cancelled {
            terminate(&options);
        }
        Ok(state.options.entry(recording).insert_entry(options).get().clone())
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
