//! One token more for every row: what a step reads and writes, at places that stay while the number of rows does.

use super::cache::Caches;
use super::inputs::{Inputs, Size, no_queries};
use super::rows::Row;
use crate::bundle::{Dtype, LanguageFacts};
use crate::decode::Pick;
use crate::runtime::{Binding, Graph, Mover, Place, Recording, RuntimeError, Tensor};

/// Runs of a size before it is recorded, which takes as long as some of them.
const BEFORE_RECORDING: usize = 2;

/// Buffers for a number of rows, tied to the graph with the caches of their lanes.
#[derive(Debug)]
pub struct Step {
    size: Size,
    inputs: Inputs,
    logits: Tensor,
    binding: Binding,
    repeated: Option<Repeated>,
}

/// What a step that is recorded reads and writes on the device, and its recording once there is one. A step that cannot be recorded goes on
/// without.
#[derive(Debug)]
struct Repeated {
    inputs: Vec<Tensor>,
    logits: Tensor,
    n_runs: usize,
    recording: Option<Recording>,
}

impl Step {
    /// Sizes of a step of so many rows. Recordings serve several numbers of rows, filled up.
    pub fn size(graph: &Graph, n_rows: usize, n_slots: usize) -> Size {
        let n_rows = if graph.records() { n_rows.next_power_of_two().min(n_slots.max(n_rows)) } else { n_rows };
        Size::of(graph, n_rows, n_slots, 0, 1)
    }

    /// Buffers of this size over these caches.
    pub fn new(
        graph: &Graph,
        mover: &mut Mover,
        facts: &LanguageFacts,
        size: Size,
        caches: &mut Caches,
    ) -> Result<Self, RuntimeError> {
        let mut binding = graph.binding()?;
        caches.bind(&mut binding)?;
        let mut inputs = Inputs::new(graph, facts, size, no_queries(graph, facts, size.rows)?)?;
        let mut logits = graph.allocate(Dtype::Float32, &[size.rows, size.logits, facts.vocab_size], Place::Host)?;
        let mut repeated = None;
        if graph.records() {
            inputs.reach(caches.past.capacity()).map_err(|source| graph.failed("writing inputs", source))?;
            repeated = Some(Repeated::new(mover, &inputs, &logits, &mut binding)?);
        } else {
            binding.output("logits", &mut logits)?;
        }
        Ok(Self { size, inputs, logits, binding, repeated })
    }

    /// Whether it is of this size.
    pub fn is(&self, size: Size) -> bool {
        self.size == size
    }

    /// One run; the logits are those of [`logits`](Self::logits).
    pub fn run(
        &mut self,
        graph: &mut Graph,
        mover: &mut Mover,
        (rows, picks): (&[Row], &[Pick]),
        caches: &mut Caches,
    ) -> Result<(), RuntimeError> {
        let written = self.inputs.write_step(rows, picks.iter().map(|pick| pick.token));
        written.map_err(|source| graph.failed("writing inputs", source))?;
        if let Some(repeated) = &mut self.repeated {
            return repeated.run(graph, mover, (&self.inputs, &self.binding), &mut self.logits);
        }
        self.inputs.bind(&mut self.binding)?;
        if graph.copies_when_bound() {
            caches.bind(&mut self.binding)?;
        }
        graph.run_bound(&self.binding)
    }

    /// `[rows, 1, vocabulary]`, and perhaps what filled it up.
    pub fn logits(&self) -> &Tensor {
        &self.logits
    }
}

impl Repeated {
    fn new(mover: &mut Mover, host: &Inputs, logits: &Tensor, binding: &mut Binding) -> Result<Self, RuntimeError> {
        host.lasting().try_for_each(|(name, tensor)| binding.input(name, tensor))?;
        let inputs = mover.all_to_device(&host.changing().map(|(_, tensor)| tensor).collect::<Vec<_>>())?;
        host.changing().zip(&inputs).try_for_each(|((name, _), tensor)| binding.input(name, tensor))?;
        let mut logits = mover.to_device(logits)?;
        binding.output("logits", &mut logits)?;
        Ok(Self { inputs, logits, n_runs: 0, recording: None })
    }

    fn run(
        &mut self,
        graph: &mut Graph,
        mover: &mut Mover,
        (host, binding): (&Inputs, &Binding),
        logits: &mut Tensor,
    ) -> Result<(), RuntimeError> {
        let changing: Vec<&Tensor> = host.changing().map(|(_, tensor)| tensor).collect();
        mover.carry(&changing, &mut self.inputs.iter_mut().collect::<Vec<_>>())?;
        if self.n_runs == BEFORE_RECORDING {
            self.recording = graph.new_recording();
        }
        self.n_runs += 1;
        if let Some(recording) = &mut self.recording
            && let Err(error) = graph.run_recorded(binding, recording)
        {
            if recording.is_made() {
                return Err(error);
            }
            self.recording = None;
        }
        if self.recording.is_none() {
            graph.run_bound(binding)?;
        }
        mover.carry(&[&self.logits], &mut [logits])
    }
}
