//! Every bundle of a server, and which of them a request is for.

use std::sync::Arc;

use super::ServeError;
use super::config::{Config, ModelConfig};
use super::error::ApiError;
use super::metrics::Metrics;
use super::worker::{Plan, State, Worker};
use crate::bundle::{Bundle, TaskName};
use crate::error::Error;
use crate::runtime::RuntimeOptions;

/// The models, in the order of the configuration.
pub struct Fleet(Vec<Model>);

/// A bundle and the worker that has it.
#[derive(Clone)]
pub struct Model {
    /// Its facts, whether it is loaded or not.
    pub bundle: Arc<Bundle>,
    /// What runs it.
    pub worker: Arc<Worker>,
}

impl Fleet {
    /// Reads the facts of all bundles, then begins to load those that are wanted.
    pub fn start(config: &Config, runtime: &RuntimeOptions, metrics: &Metrics) -> Result<Self, ServeError> {
        let opened: Result<Vec<_>, _> = config.models.iter().map(|model| Bundle::open(&model.path)).collect();
        let models = opened.map_err(Error::from)?.into_iter().zip(&config.models).map(|(bundle, model)| {
            let worker = Worker::start(plan(config, model, runtime), !model.unloaded, Arc::new(metrics.model(&model.name())));
            Model { bundle: Arc::new(bundle), worker }
        });
        Ok(Self(models.collect()))
    }

    /// Every model.
    pub fn iter(&self) -> impl Iterator<Item = &Model> {
        self.0.iter()
    }

    /// The model of this name.
    pub fn named(&self, name: &str) -> Result<&Model, ApiError> {
        let found = self.0.iter().find(|model| model.worker.name() == name);
        found.ok_or_else(|| ApiError::not_found("there is no model of this name; /v1/models lists them").about("model"))
    }

    /// The named model if it does this; without a name the first that does, of those that are loaded if one of them does.
    pub fn pick(&self, name: Option<&str>, task: TaskName) -> Result<&Model, ApiError> {
        if let Some(name) = name {
            let model = self.named(name)?;
            model.bundle.require(task).map_err(|error| ApiError::from(Error::from(error)).about("model"))?;
            return Ok(model);
        }
        let able = || self.0.iter().filter(|model| model.bundle.facts().tasks.contains(&task));
        let is_loaded = |model: &&Model| !matches!(model.worker.now(), State::Unloaded);
        let found = able().find(is_loaded).or_else(|| able().next());
        found.ok_or_else(|| ApiError::invalid(format!("no model here does {task}; /v1/models lists what they do")).about("model"))
    }

    /// Whether every model that is wanted answers.
    pub fn is_ready(&self) -> bool {
        self.0.iter().all(|model| matches!(model.worker.now(), State::Ready(_) | State::Unloaded))
    }

    /// Where nothing more may come in hand anywhere: in how many seconds there will be room.
    pub fn is_full(&self) -> Option<u64> {
        let waits: Option<Vec<u64>> = self.0.iter().map(|model| model.worker.is_full()).collect();
        waits?.into_iter().min()
    }

    /// Texts and pictures in hand, of all models.
    pub fn n_in_hand(&self) -> usize {
        self.0.iter().map(|model| model.worker.n_in_hand()).sum()
    }
}

fn plan(config: &Config, model: &ModelConfig, runtime: &RuntimeOptions) -> Plan {
    let runtime = RuntimeOptions {
        provider: model.provider.unwrap_or(runtime.provider),
        device: model.device.unwrap_or(runtime.device),
        threads: model.threads.or(runtime.threads),
        ..runtime.clone()
    };
    let (max_in_hand, kept_bytes) = (config.limits.max_in_hand, config.cache.bytes);
    Plan { name: model.name(), folder: model.path.clone(), runtime, max_in_hand, kept_bytes }
}
