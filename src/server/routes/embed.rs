//! `POST /embed`: pictures and texts → vectors of one space.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::results::Item;
use crate::bundle::TaskName;
use crate::server::App;
use crate::server::body;
use crate::server::call::{self, Call};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::keys::Caller;
use crate::server::picture::{self, PictureIn};
use crate::server::worker::Asked;
use crate::service::{Outcome, Source, Want};
use crate::timing::Timings;

/// Pictures and texts to turn into vectors.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbedRequest {
    /// The model; the first that embeds if absent.
    model: Option<String>,
    /// The pictures; files of a form called `image` come before them.
    #[serde(default)]
    images: Vec<PictureIn>,
    /// The texts.
    #[serde(default)]
    texts: Vec<String>,
}

/// Vectors of length 1, of one space.
#[derive(Serialize, ToSchema)]
pub struct Embeddings {
    /// The model that answered.
    model: String,
    /// One for each picture, or why there is none.
    images: Vec<Item<Embedding>>,
    /// One for each text.
    texts: Vec<TextEmbedding>,
}

/// The vector of a text.
#[derive(Serialize, ToSchema)]
pub struct TextEmbedding {
    /// The text.
    text: String,
    /// Of length 1.
    embedding: Vec<f32>,
}

/// The vector of a picture: the mean over its queries.
#[derive(Serialize, ToSchema)]
pub struct Embedding {
    /// Of length 1.
    embedding: Vec<f32>,
    /// Where the time went, in milliseconds by stage.
    #[schema(value_type = std::collections::BTreeMap<String, f64>)]
    timings_ms: Timings,
}

/// Turns pictures and texts into vectors of one space.
#[utoipa::path(
    post, path = "/embed", tag = "native",
    request_body = EmbedRequest,
    responses((status = 200, body = Embeddings), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn embed(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let said = body::read::<EmbedRequest>(&app, request).await?;
    let EmbedRequest { model, images, texts } = said.value;
    let has_pictures = !images.is_empty() || !said.uploads.is_empty();
    if !has_pictures || !texts.is_empty() {
        call::check_list(&app, &texts, "texts")?;
    }
    let call = Call::new(&app, caller, (model.as_deref(), TaskName::Embed, &images), said.room)?;
    let pictures = if has_pictures { picture::given(&app, images, said.uploads).await? } else { Vec::new() };
    let mut asked: Vec<_> = pictures.into_iter().map(|given| call.asked(given, Want::Embed)).collect();
    let n_pictures = asked.len();
    if !texts.is_empty() {
        asked.push(Ok(of_texts(&call, texts.clone())));
    }
    let mut found = call.finish(asked).await?;
    let read = found.drain(n_pictures..).next().map_or(Ok(Vec::new()), |end| vectors(end?))?;
    let texts: Vec<_> = texts.into_iter().zip(read).map(|(text, embedding)| TextEmbedding { text, embedding }).collect();
    if found.len() == 1 && texts.is_empty() && found[0].is_err() {
        found.remove(0)?;
    }
    let images = found.into_iter().map(|end| end.and_then(embedding).map_or_else(|error| Item::Failed(error.body()), Item::Done));
    Ok(Json(Embeddings { model: call.name().to_owned(), images: images.collect(), texts }).into_response())
}

/// What is asked of texts alone.
pub fn of_texts(call: &Call, texts: Vec<String>) -> Asked {
    Asked { source: Source::Texts, want: Want::EmbedTexts(texts), terms: call.terms() }
}

/// The vectors of texts.
pub fn vectors(outcome: Outcome) -> Result<Vec<Vec<f32>>, ApiError> {
    if let Outcome::Texts(vectors, _) = outcome { Ok(vectors) } else { Err(ApiError::internal()) }
}

/// The vector of a picture.
pub fn vector(outcome: Outcome) -> Result<(Vec<f32>, Timings), ApiError> {
    if let Outcome::Embedded(vector, timings) = outcome { Ok((vector, timings)) } else { Err(ApiError::internal()) }
}

fn embedding(outcome: Outcome) -> Result<Embedding, ApiError> {
    let (embedding, timings_ms) = vector(outcome)?;
    Ok(Embedding { embedding, timings_ms })
}
