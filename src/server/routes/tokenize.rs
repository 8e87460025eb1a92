//! `POST /tokenize` and `/detokenize`: texts ↔ tokens of the model that writes.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::bundle::TaskName;
use crate::prompt::Task;
use crate::server::App;
use crate::server::body;
use crate::server::call::{self, Call};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::keys::Caller;

/// A text.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizeRequest {
    /// The model; the first that writes captions if absent.
    model: Option<String>,
    /// The text, as the language model would read it behind the picture.
    prompt: String,
}

/// Its tokens.
#[derive(Serialize, ToSchema)]
pub struct Tokens {
    count: usize,
    /// Of picture, prompt and text together.
    max_model_len: usize,
    /// Special tokens included.
    tokens: Vec<u32>,
}

/// Tokens.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DetokenizeRequest {
    /// The model; the first that writes captions if absent.
    model: Option<String>,
    tokens: Vec<u32>,
}

/// Their text.
#[derive(Serialize, ToSchema)]
pub struct Detokenized {
    prompt: String,
}

/// Tells the tokens of a text.
#[utoipa::path(
    post, path = "/tokenize", tag = "openai",
    request_body = TokenizeRequest,
    responses((status = 200, body = Tokens), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn tokenize(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Tokens>, ApiError> {
    let said = body::read::<TokenizeRequest>(&app, request).await?;
    let TokenizeRequest { model, prompt } = said.value;
    call::check_text(&prompt, "prompt")?;
    let call = Call::new(&app, caller, (model.as_deref(), TaskName::Caption, &[]), said.room)?;
    let context = call.model.worker.context()?;
    let tokens = context.prompt(&Task::Raw(TaskName::Caption, prompt))?.ids;
    Ok(Json(Tokens { count: tokens.len(), max_model_len: call.model.bundle.language().max_positions, tokens }))
}

/// Tells the text of tokens.
#[utoipa::path(
    post, path = "/detokenize", tag = "openai",
    request_body = DetokenizeRequest,
    responses((status = 200, body = Detokenized), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn detokenize(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Detokenized>, ApiError> {
    let said = body::read::<DetokenizeRequest>(&app, request).await?;
    let DetokenizeRequest { model, tokens } = said.value;
    let call = Call::new(&app, caller, (model.as_deref(), TaskName::Caption, &[]), said.room)?;
    let (vocabulary, most) = (call.model.bundle.language().vocab_size, call.model.bundle.language().max_positions);
    if tokens.len() > most || tokens.iter().any(|token| *token as usize >= vocabulary) {
        let message = format!("{most} tokens at most have a text here, each below {vocabulary}");
        return Err(ApiError::invalid(message).about("tokens"));
    }
    let context = call.model.worker.context()?;
    Ok(Json(Detokenized { prompt: context.decode(&tokens) }))
}
