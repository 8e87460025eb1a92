//! What is told of the server and of a model: its tensors, by what it does.

use serde::Serialize;
use utoipa::ToSchema;

use super::tensor::{BYTES, FP32};
use crate::bundle::TaskName;
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::fleet::Model;
use crate::server::worker::State;

/// A bundle has no versions; clients that need one ask for this.
pub const VERSION: &str = "1";
/// A dimension that a request chooses.
const ANY: i64 = -1;

/// The program.
#[derive(Serialize, ToSchema)]
pub struct ServerMetadata {
    /// `blip2`.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// `binary_tensor_data`.
    pub extensions: Vec<&'static str>,
}

/// A model as a function of tensors.
#[derive(Serialize, ToSchema)]
pub struct ModelMetadata {
    /// What requests call it.
    pub name: String,
    /// `1` alone.
    pub versions: Vec<&'static str>,
    /// `onnxruntime_onnx`.
    pub platform: &'static str,
    /// What it takes: pictures, and what some tasks need.
    pub inputs: Vec<TensorMetadata>,
    /// What it gives: the outputs of every task that it does.
    pub outputs: Vec<TensorMetadata>,
}

/// A tensor.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
pub struct TensorMetadata {
    /// Its name.
    pub name: &'static str,
    /// The type of its elements.
    pub datatype: &'static str,
    /// -1 where a request chooses.
    pub shape: Vec<i64>,
}

impl ServerMetadata {
    /// Of this program.
    pub fn new() -> Self {
        Self { name: "blip2", version: env!("CARGO_PKG_VERSION"), extensions: vec!["binary_tensor_data"] }
    }
}

impl ModelMetadata {
    /// Of a model, whether it is loaded or not.
    pub fn new(model: &Model) -> Self {
        let facts = model.bundle.facts();
        let width = facts.qformer.joint.and_then(|width| i64::try_from(width).ok()).unwrap_or(ANY);
        Self {
            name: model.worker.name().to_owned(),
            versions: vec![VERSION],
            platform: "onnxruntime_onnx",
            inputs: inputs(&facts.tasks),
            outputs: outputs(&facts.tasks, width),
        }
    }
}

/// The names of what a task gives.
pub fn names(task: TaskName) -> &'static [&'static str] {
    match task {
        TaskName::Caption | TaskName::Ask => &["text"],
        TaskName::Match => &["itm_probability", "itc_similarity"],
        TaskName::Embed => &["embedding"],
    }
}

/// The model of this name and version; no version is any.
pub fn model<'a>(app: &'a App, name: &str, version: &str) -> Result<&'a Model, ApiError> {
    let model = app.fleet.named(name)?;
    if version.is_empty() || version == VERSION {
        return Ok(model);
    }
    Err(ApiError::not_found("models have one version, which is 1").about("version"))
}

/// Whether a model answers requests that come now.
pub fn is_ready(app: &App, model: &Model) -> bool {
    !app.is_leaving() && matches!(model.worker.now(), State::Ready(_))
}

fn inputs(tasks: &[TaskName]) -> Vec<TensorMetadata> {
    let reads = tasks.iter().any(|task| matches!(task, TaskName::Ask | TaskName::Match));
    let names = ["image"].into_iter().chain(reads.then_some("text")).chain(["task"]);
    let n = |name| if name == "task" { 1 } else { ANY };
    names.map(|name| TensorMetadata { name, datatype: BYTES, shape: vec![n(name)] }).collect()
}

fn outputs(tasks: &[TaskName], width: i64) -> Vec<TensorMetadata> {
    let mut found: Vec<TensorMetadata> = Vec::new();
    for name in tasks.iter().flat_map(|task| names(*task)).copied() {
        let (datatype, shape) = match name {
            "text" => (BYTES, vec![ANY]),
            "embedding" => (FP32, vec![ANY, width]),
            _ => (FP32, vec![ANY, ANY]),
        };
        let tensor = TensorMetadata { name, datatype, shape };
        if !found.contains(&tensor) {
            found.push(tensor);
        }
    }
    found
}
