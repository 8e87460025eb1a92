//! `/admin/models/…`: models are loaded and unloaded while the server runs.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use crate::server::App;
use crate::server::error::{ApiError, ErrorBody};

/// What was begun.
#[derive(Serialize, ToSchema)]
pub struct Begun {
    /// The model.
    model: String,
    /// `load` or `unload`.
    doing: &'static str,
}

/// Begins to load a model; `/v1/models` tells when it is ready.
#[utoipa::path(
    post, path = "/admin/models/{model}/load", tag = "admin",
    params(("model" = String, Path, description = "What requests call it.")),
    responses((status = 202, body = Begun), (status = 404, body = ErrorBody)),
)]
pub async fn load(State(app): State<Arc<App>>, Path(model): Path<String>) -> Result<(StatusCode, Json<Begun>), ApiError> {
    app.fleet.named(&model)?.worker.load();
    Ok((StatusCode::ACCEPTED, Json(Begun { model, doing: "load" })))
}

/// Unloads a model: what it has in hand ends, and its memory is free.
#[utoipa::path(
    post, path = "/admin/models/{model}/unload", tag = "admin",
    params(("model" = String, Path, description = "What requests call it.")),
    responses((status = 202, body = Begun), (status = 404, body = ErrorBody)),
)]
pub async fn unload(State(app): State<Arc<App>>, Path(model): Path<String>) -> Result<(StatusCode, Json<Begun>), ApiError> {
    app.fleet.named(&model)?.worker.unload();
    Ok((StatusCode::ACCEPTED, Json(Begun { model, doing: "unload" })))
}
