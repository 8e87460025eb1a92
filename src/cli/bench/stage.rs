//! `blip2 bench stage`: parts of a request alone, and how far each is from what the machine can do.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::inputs::Encoded;
use super::plan::Plan;
use super::{Measure, Opened, seconds};
use crate::bench::cost::Cost;
use crate::bench::figures::Figures;
use crate::bench::limits::{Limits, Peaks};
use crate::bench::stages::{Stages, Steps};
use crate::bundle::Precision;
use crate::cli::Failure;
use crate::cli::plain::plain;
use crate::error::Error;
use crate::runtime::{Processor, Provider, Runtime};

#[derive(Debug, clap::Args)]
pub(super) struct Stage {
    /// Rows of a decode step [default: one, the beams, 16]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    rows: Vec<NonZeroUsize>,
    /// Positions before a decode step [default: 48 and 256, or as far as the model's go]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    past: Vec<NonZeroUsize>,
    /// Seconds to find out what the machine can do at most, half of them before the rounds and half behind; 0 leaves it out
    #[arg(long, value_name = "S", default_value = "4", value_parser = seconds, allow_negative_numbers = true)]
    limits: Duration,
    #[command(flatten)]
    pub measure: Measure,
}

/// What the machine can do, as far as it is known before the rounds.
pub(super) struct Limiting {
    runtime: Runtime,
    precisions: Vec<Precision>,
    costs: Vec<(String, Cost)>,
    before: Peaks,
    time: Duration,
}

impl Stage {
    pub fn plan() -> Plan {
        Plan { arrivals: "every stage in turn".into(), ..Plan::closed("stage", 1, 1) }
    }

    /// An engine in this process, taken apart.
    pub fn open(&self) -> Result<Opened, Failure> {
        let Measure { inputs, model, server, seed, .. } = &self.measure;
        if server.url.is_some() {
            return Err(Failure::Usage("--url names a server, which shows no stages".into()));
        }
        let bundle = model.bundle()?;
        let (task, text) = inputs.asked_of_stages(&bundle)?;
        let steps = self.steps(Steps::of(&bundle, inputs.beams()));
        let is_asked = !(self.rows.is_empty() && self.past.is_empty());
        if let Some(why) = steps.objection(&bundle).filter(|_| is_asked) {
            return Err(Failure::Usage(why));
        }
        let pictures = inputs.pictures(*seed)?.into_iter().map(|Encoded { name, bytes }| (name, bytes));
        let (names, pictures): (Vec<String>, Vec<Arc<[u8]>>) = pictures.unzip();
        let loading = Instant::now();
        let engine = model.load(bundle)?;
        let subject = self.measure.subject(&engine, loading.elapsed());
        let of_first = |error| match error {
            Error::Picture(source) => Failure::Picture { path: names[0].clone().into(), source },
            other => other.into(),
        };
        let stages = Stages::new(engine, pictures, (task, &text), &steps).map_err(of_first)?;
        let limits = self.limiting(&stages);
        Ok(Opened { target: Box::new(stages), names, subject, folder: None, limits })
    }

    fn steps(&self, usual: Steps) -> Steps {
        let or = |typed: &[NonZeroUsize], usual| if typed.is_empty() { usual } else { typed.iter().map(|n| n.get()).collect() };
        Steps { rows: or(&self.rows, usual.rows), past: or(&self.past, usual.past) }.in_order()
    }

    /// Nothing where nobody wants to know, or what stages cost is not known, which standard error says.
    fn limiting(&self, stages: &Stages) -> Option<Limiting> {
        if self.limits.is_zero() {
            return None;
        }
        let costs = stages.costs();
        let costs =
            costs.inspect_err(|why| eprintln!("blip2: warning: no distance to the limit: {}", plain(&why.to_string()))).ok()?;
        let mut precisions: Vec<Precision> = costs.iter().flat_map(|(_, cost)| cost.operations.keys().copied()).collect();
        precisions.sort_unstable();
        precisions.dedup();
        let (runtime, time) = (stages.engine().runtime().clone(), self.limits / 2);
        let before = Peaks::measure(&runtime, &precisions, time);
        Some(Limiting { runtime, precisions, costs, before, time })
    }
}

impl Limiting {
    /// What the machine comes to behind the rounds counts too, so that what else it did then is no limit.
    pub fn end(self, figures: &Figures, is_complete: bool) -> Limits {
        let Self { runtime, precisions, costs, before, time } = self;
        let peaks = if is_complete { before.or(&Peaks::measure(&runtime, &precisions, time)) } else { before };
        let instruction_set = match runtime.provider() {
            Provider::Cpu => Processor::detect().to_string(),
            elsewhere => elsewhere.to_string(),
        };
        Limits::new(instruction_set, peaks, &costs, figures)
    }
}
