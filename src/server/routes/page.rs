//! The page at `/`, and the samples that it offers where a demo runs.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::server::App;
use crate::server::error::{ApiError, ErrorBody};

/// Nothing from elsewhere, nothing inline.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; \
form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

/// Drawings of the kind that demos know.
const SAMPLES: [(&str, &[u8]); 4] = [
    ("0.png", include_bytes!("../../../models/samples/0.png")),
    ("1.png", include_bytes!("../../../models/samples/1.png")),
    ("2.png", include_bytes!("../../../models/samples/2.png")),
    ("3.png", include_bytes!("../../../models/samples/3.png")),
];

/// Pictures to try a demo with.
#[derive(Serialize, ToSchema)]
pub struct Samples {
    /// None where no demo runs.
    samples: Vec<Sample>,
}

/// A picture to try a demo with.
#[derive(Serialize, ToSchema)]
pub struct Sample {
    name: &'static str,
    url: String,
}

/// The page.
pub async fn index() -> Response {
    file("text/html; charset=utf-8", include_str!("../page/index.html"))
}

/// Its script.
pub async fn script() -> Response {
    file("text/javascript; charset=utf-8", include_str!("../page/app.js"))
}

/// Its looks.
pub async fn style() -> Response {
    file("text/css; charset=utf-8", include_str!("../page/style.css"))
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, POLICY),
        (CACHE_CONTROL, "no-cache"),
        (axum::http::header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, text).into_response()
}

/// Lists pictures to try a demo with.
#[utoipa::path(get, path = "/samples", tag = "native", responses((status = 200, body = Samples)))]
pub async fn samples(State(app): State<Arc<App>>) -> Json<Samples> {
    let has_demo = app.fleet.iter().any(|model| model.bundle.facts().name.starts_with("demo-"));
    let samples = SAMPLES.iter().filter(|_| has_demo).map(|(name, _)| Sample { name, url: format!("/samples/{name}") });
    Json(Samples { samples: samples.collect() })
}

/// A picture to try a demo with.
#[utoipa::path(
    get, path = "/samples/{name}", tag = "native",
    params(("name" = String, Path, description = "As `/samples` names it.")),
    responses((status = 200, content_type = "image/png"), (status = 404, body = ErrorBody)),
)]
pub async fn sample(Path(name): Path<String>) -> Result<Response, ApiError> {
    let found = SAMPLES.iter().find(|(known, _)| *known == name);
    let (_, bytes) = found.ok_or_else(|| ApiError::not_found("there is no such sample; /samples lists them"))?;
    Ok(([(CONTENT_TYPE, "image/png")], *bytes).into_response())
}
