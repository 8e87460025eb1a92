//! Whether the server is there, and what it has in hand: `/health/…`, `/version`, `/load`, `/metrics`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::server::App;
use crate::server::metrics;
use crate::server::worker::State as Now;

/// Whether requests should come here.
#[derive(Serialize, ToSchema)]
pub struct Ready {
    /// Every model that is wanted has answered a first request, and the server is not stopping.
    ready: bool,
    /// How far each model is.
    models: BTreeMap<String, &'static str>,
}

/// The program.
#[derive(Serialize, ToSchema)]
pub struct Version {
    /// Its version.
    version: &'static str,
}

/// What is in hand.
#[derive(Serialize, ToSchema)]
pub struct Load {
    /// Texts and pictures in hand, of all models.
    server_load: usize,
    /// The same by model, with those that nobody works on yet.
    models: BTreeMap<String, ModelLoad>,
}

/// What a model has in hand.
#[derive(Serialize, ToSchema)]
pub struct ModelLoad {
    in_hand: usize,
    waiting: usize,
}

/// The process is there.
#[utoipa::path(get, path = "/health/live", tag = "server", responses((status = 200)))]
pub async fn live() -> StatusCode {
    StatusCode::OK
}

/// Requests should come here.
#[utoipa::path(get, path = "/health/ready", tag = "server", responses((status = 200, body = Ready), (status = 503, body = Ready)))]
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    let far = |now: &Now| match now {
        Now::Ready(_) => "ready",
        Now::Loading => "loading",
        Now::Unloaded => "unloaded",
        Now::Failed => "failed",
    };
    let models = app.fleet.iter().map(|model| (model.worker.name().to_owned(), far(&model.worker.now()))).collect();
    let ready = app.is_ready();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Ready { ready, models })).into_response()
}

/// The program's version.
#[utoipa::path(get, path = "/version", tag = "server", responses((status = 200, body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// What is in hand.
#[utoipa::path(get, path = "/load", tag = "server", responses((status = 200, body = Load)))]
pub async fn load(State(app): State<Arc<App>>) -> Json<Load> {
    let of = |worker: &crate::server::worker::Worker| ModelLoad { in_hand: worker.n_in_hand(), waiting: worker.n_waiting() };
    let models = app.fleet.iter().map(|model| (model.worker.name().to_owned(), of(&model.worker))).collect();
    Json(Load { server_load: app.fleet.n_in_hand(), models })
}

/// Everything that is counted, in the text form of OpenMetrics 1.0 for who accepts it, else in that of Prometheus.
#[utoipa::path(
    get, path = "/metrics", tag = "server",
    responses((status = 200, content((String = "text/plain"), (String = "application/openmetrics-text")))),
)]
pub async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let text = app.metrics.text(app.fleet.iter().map(|model| &*model.worker));
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|accepted| accepted.to_str().ok());
    if accepted.into_iter().any(|accepted| accepted.contains("application/openmetrics-text")) {
        return ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response();
    }
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics::plain(&text)).into_response()
}
