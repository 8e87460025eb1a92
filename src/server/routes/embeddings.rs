//! `POST /v1/embeddings`: OpenAI's form of vectors, with pictures as vLLM takes them.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::{Extension, Json};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::chat::Usage;
use super::embed::{of_texts, vector, vectors};
use super::messages::{Message, Thing};
use crate::bundle::TaskName;
use crate::server::App;
use crate::server::body;
use crate::server::call::{self, Call};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::keys::Caller;
use crate::server::picture;
use crate::service::Want;

/// Texts, or one message with a picture or a text.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "what is not read is named to be allowed")]
pub struct EmbeddingsRequest {
    /// The model; the first that embeds if absent.
    model: Option<String>,
    /// A text, or several.
    input: Option<Input>,
    /// One message of the user with one picture or one text.
    messages: Option<Vec<Message>>,
    /// `float` or `base64` (little-endian float32).
    encoding_format: Option<String>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    user: Option<IgnoredAny>,
}

/// A text, or several.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Input {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

/// Vectors of length 1, of one space.
#[derive(Serialize, ToSchema)]
pub struct EmbeddingsResponse {
    /// `list`.
    object: &'static str,
    /// In the order of what was asked.
    data: Vec<Numbers>,
    /// The model that answered.
    model: String,
    usage: Usage,
}

/// A vector.
#[derive(Serialize, ToSchema)]
pub struct Numbers {
    /// `embedding`.
    object: &'static str,
    index: usize,
    embedding: Encoded,
}

/// A vector in one of two forms.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum Encoded {
    Float(Vec<f32>),
    Base64(String),
}

/// Turns texts, or a picture, into vectors of one space.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "openai",
    request_body = EmbeddingsRequest,
    responses((status = 200, body = EmbeddingsResponse), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn embed(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<EmbeddingsResponse>, ApiError> {
    let said = body::read::<EmbeddingsRequest>(&app, request).await?;
    let EmbeddingsRequest { model, input, messages, encoding_format, .. } = said.value;
    let as_base64 = match encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::invalid("float and base64 are known").about("encoding_format")),
    };
    let call = Call::new(&app, caller, (model.as_deref(), TaskName::Embed, &[]), said.room)?;
    let found = match (input, messages) {
        (Some(Input::One(text)), None) => texts(&call, vec![text]).await?,
        (Some(Input::Several(several)), None) => texts(&call, several).await?,
        (None, Some(messages)) => message(&call, messages).await?,
        _ => return Err(ApiError::invalid("either input or messages is needed").about("input")),
    };
    let usage = usage(&call, &found.1);
    let numbers =
        |(index, vector): (usize, Vec<f32>)| Numbers { object: "embedding", index, embedding: encoded(vector, as_base64) };
    let data = found.0.into_iter().enumerate().map(numbers).collect();
    Ok(Json(EmbeddingsResponse { object: "list", data, model: call.name().to_owned(), usage }))
}

/// Vectors of texts, and the texts.
async fn texts(call: &Call, texts: Vec<String>) -> Result<(Vec<Vec<f32>>, Vec<String>), ApiError> {
    call::check_list(&call.app, &texts, "input")?;
    let asked = vec![Ok(of_texts(call, texts.clone()))];
    Ok((vectors(call.finish(asked).await?.remove(0)?)?, texts))
}

async fn message(call: &Call, messages: Vec<Message>) -> Result<(Vec<Vec<f32>>, Vec<String>), ApiError> {
    let things: Vec<Thing> =
        messages.into_iter().filter_map(|message| message.content).flat_map(super::messages::Content::things).collect();
    let [thing] = <[Thing; 1]>::try_from(things)
        .map_err(|_| ApiError::invalid("one picture or one text becomes a vector at a time").about("messages"))?;
    match thing {
        Thing::Text(text) => texts(call, vec![text]).await,
        Thing::Picture(picture) => {
            let given = picture::one(&call.app, picture).await.map_err(|error| error.about("messages"))?;
            let found = call.finish(vec![call.asked(Ok(given), Want::Embed)]).await?.remove(0)?;
            Ok((vec![vector(found)?.0], Vec::new()))
        }
    }
}

fn usage(call: &Call, texts: &[String]) -> Usage {
    let prompt_tokens = n_read(call, texts, usize::from(texts.is_empty()));
    Usage { prompt_tokens, completion_tokens: 0, total_tokens: prompt_tokens }
}

/// Tokens that the Q-Former read of texts, and its query tokens for pictures.
pub fn n_read(call: &Call, texts: &[String], n_pictures: usize) -> usize {
    let context = call.model.worker.context();
    let read =
        |text: &String| context.as_ref().ok().and_then(|context| context.reading(text).ok()).map_or(0, |read| read.ids.len());
    texts.iter().map(read).sum::<usize>() + call.model.bundle.facts().qformer.n_queries * n_pictures
}

fn encoded(vector: Vec<f32>, as_base64: bool) -> Encoded {
    if as_base64 { Encoded::Base64(base64(&vector)) } else { Encoded::Float(vector) }
}

/// Little-endian float32 in base64.
pub fn base64(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().copied().flat_map(f32::to_le_bytes).collect();
    BASE64_STANDARD.encode(bytes)
}
