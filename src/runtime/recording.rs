//! Decode steps that a GPU records once and repeats whole: one launch instead of one a kernel.
//!
//! ONNX Runtime records a run under a number and reads nothing of a later run of that number: not where its tensors lie, and nothing of
//! those in the processor's memory.

use std::thread::ThreadId;

use ort::session::RunOptions;

/// A run that is repeated, always over the same tensors.
#[derive(Debug)]
pub struct Recording {
    pub(super) number: Number,
    /// ONNX Runtime keeps recordings by the thread that they were made on.
    made_on: Option<ThreadId>,
}

pub(super) type Number = u8;

/// Recordings of one graph: each holds some megabytes of the device for as long as the graph is open.
const MOST: Number = 64;

const OPTION: &str = "gpu_graph_id";

/// What a run is told that shall be recorded nowhere.
const NONE: &str = "-1";

impl Recording {
    /// One more where there are `n`; none where those are as many as may be.
    pub(super) fn new(n: Number) -> Option<Self> {
        (n < MOST).then_some(Self { number: n, made_on: None })
    }

    /// Whether its next run repeats what was recorded.
    pub fn is_made(&self) -> bool {
        self.made_on == Some(std::thread::current().id())
    }

    /// Its next runs are repetitions.
    pub(super) fn made(&mut self) {
        self.made_on = Some(std::thread::current().id());
    }

    /// Tells a run which one it is.
    pub(super) fn set(number: Option<Number>, options: &mut RunOptions) -> Result<(), ort::Error> {
        // 0 is for graphs of which there is one recording in all.
        options.set(OPTION, number.map_or_else(|| NONE.into(), |number| (number + 1).to_string()))
    }
}
