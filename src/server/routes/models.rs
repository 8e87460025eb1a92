//! `GET /v1/models`: which models there are, and what they do.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use crate::bundle::TaskName;
use crate::server::App;
use crate::server::error::{ApiError, ErrorBody};
use crate::server::fleet::Model;
use crate::server::worker;

/// The models, in the order of the configuration.
#[derive(Serialize, ToSchema)]
pub struct Models {
    /// `list`.
    object: &'static str,
    data: Vec<ModelCard>,
}

/// A model.
#[derive(Serialize, ToSchema)]
pub struct ModelCard {
    /// What requests call it.
    id: String,
    /// `model`.
    object: &'static str,
    /// 0: a bundle does not say when it was made.
    created: u64,
    /// `blip2`.
    owned_by: &'static str,
    /// `caption`, `ask`, `match`, `embed`.
    #[schema(value_type = Vec<String>)]
    tasks: Vec<TaskName>,
    /// `ready`, `loading`, `unloaded` or `failed`.
    state: &'static str,
    /// Whether it was trained by this project on drawings of coloured shapes, and knows nothing else.
    is_demo: bool,
    /// Side of the square that every picture becomes.
    image_size: u32,
    /// Tokens of pictures, prompts and texts together, where it writes.
    max_model_len: Option<usize>,
}

impl ModelCard {
    fn new(model: &Model) -> Self {
        let facts = model.bundle.facts();
        let state = match model.worker.now() {
            worker::State::Ready(_) => "ready",
            worker::State::Loading => "loading",
            worker::State::Unloaded => "unloaded",
            worker::State::Failed => "failed",
        };
        Self {
            id: model.worker.name().to_owned(),
            object: "model",
            created: 0,
            owned_by: "blip2",
            tasks: facts.tasks.clone(),
            state,
            is_demo: facts.name.starts_with("demo-"),
            image_size: facts.image.size,
            max_model_len: facts.language.as_ref().map(|language| language.max_positions),
        }
    }
}

/// Lists the models.
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses((status = 200, body = Models)))]
pub async fn list(State(app): State<Arc<App>>) -> Json<Models> {
    Json(Models { object: "list", data: app.fleet.iter().map(ModelCard::new).collect() })
}

/// Tells of one model.
#[utoipa::path(
    get, path = "/v1/models/{model}", tag = "openai",
    params(("model" = String, Path, description = "What requests call it.")),
    responses((status = 200, body = ModelCard), (status = 404, body = ErrorBody)),
)]
pub async fn one(State(app): State<Arc<App>>, Path(model): Path<String>) -> Result<Json<ModelCard>, ApiError> {
    Ok(Json(ModelCard::new(app.fleet.named(&model)?)))
}
