//! A request's body: read within its limits, JSON or a form.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Multipart, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::sync::OwnedSemaphorePermit;

use super::App;
use super::error::ApiError;
use super::picture::Uploads;

/// Larger ones are parsed on a thread that may take its time.
const LARGE: usize = 64 << 10;
/// Of the room for bodies, one permit.
pub const ROOM_STEP: usize = 1 << 10;

/// Held as long as something of a body is in memory.
pub type Room = Arc<OwnedSemaphorePermit>;

/// What a request says.
pub struct Said<T> {
    /// Its JSON, or the fields of its form.
    pub value: T,
    /// The files of its form.
    pub uploads: Uploads,
    /// Held until nothing of the body is in memory any more.
    pub room: Room,
}

/// Reads JSON, or a form with files named `image` whose other fields are JSON or else text.
pub async fn read<T: DeserializeOwned + Send + 'static>(app: &App, request: Request) -> Result<Said<T>, ApiError> {
    let (room, timeout) = (Arc::new(taken(app, &request)?), Duration::from_secs_f64(app.config.limits.body_timeout_s));
    let kind = request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default().to_owned();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let limit = app.config.limits.max_body_bytes;
    let reading = async {
        match kind.as_str() {
            "multipart/form-data" => form(request, limit).await,
            kind if kind == "application/json" || kind.ends_with("+json") => {
                let bytes = whole(request.into_body(), limit).await?;
                Ok((parsed(bytes).await?, Uploads::default()))
            }
            _ => Err(ApiError::media_type("a body is application/json or multipart/form-data; Content-Type says which")),
        }
    };
    let (value, uploads) = tokio::time::timeout(timeout, reading).await.map_err(|_| ApiError::slow())??;
    Ok(Said { value, uploads, room })
}

/// All bytes of a body, whatever they are, and the room that they take.
pub async fn bytes(app: &App, request: Request) -> Result<(Bytes, Room), ApiError> {
    let (mut room, timeout) = (taken(app, &request)?, Duration::from_secs_f64(app.config.limits.body_timeout_s));
    let reading = whole(request.into_body(), app.config.limits.max_body_bytes);
    let bytes = tokio::time::timeout(timeout, reading).await.map_err(|_| ApiError::slow())??;
    // A body that did not say how long it is has taken room for the longest.
    drop(room.split(room.num_permits().saturating_sub(bytes.len().div_ceil(ROOM_STEP))));
    Ok((bytes, Arc::new(room)))
}

/// Room for as many bytes as the body says that it has, or may have.
fn taken(app: &App, request: &Request) -> Result<OwnedSemaphorePermit, ApiError> {
    let limit = app.config.limits.max_body_bytes;
    let length = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let is_plain = !request.headers().contains_key(axum::http::header::CONTENT_ENCODING);
    let bytes = length.filter(|_| is_plain).unwrap_or(limit);
    if length.is_some_and(|length: usize| length > limit) {
        return Err(ApiError::too_large(limit));
    }
    let steps = u32::try_from(bytes.div_ceil(ROOM_STEP)).unwrap_or(u32::MAX);
    app.bodies.clone().try_acquire_many_owned(steps).map_err(|_| ApiError::overloaded(1))
}

/// All bytes of a body.
async fn whole(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.downcast_ref::<http_body_util::LengthLimitError>().is_some() => Err(ApiError::too_large(limit)),
        Err(_) => Err(ApiError::invalid("the body broke off, or is not compressed as it says")),
    }
}

/// JSON.
pub async fn parsed<T: DeserializeOwned + Send + 'static>(bytes: Bytes) -> Result<T, ApiError> {
    let is_large = bytes.len() > LARGE;
    let parse = move || serde_json::from_slice(&bytes).map_err(unreadable);
    if is_large { tokio::task::spawn_blocking(parse).await.map_err(|_| ApiError::internal())? } else { parse() }
}

fn unreadable(error: serde_json::Error) -> ApiError {
    ApiError::invalid(format!("the JSON cannot be read: {error}"))
}

async fn form<T: DeserializeOwned>(request: Request, limit: usize) -> Result<(T, Uploads), ApiError> {
    let broken = |_| ApiError::invalid("the form cannot be read");
    let (parts, body) = request.into_parts();
    let limited = Body::new(Limited::new(body, limit));
    let mut form = Multipart::from_request(Request::from_parts(parts, limited), &()).await.map_err(broken)?;
    let (mut fields, mut uploads) = (Map::new(), Uploads::default());
    while let Some(field) = form.next_field().await.map_err(|_| ApiError::invalid("the form broke off, or is too large"))? {
        let name = field.name().unwrap_or_default().to_owned();
        let is_file = field.file_name().is_some() || name == "image";
        let bytes = field.bytes().await.map_err(|_| ApiError::invalid("the form broke off, or is too large"))?;
        if is_file {
            uploads.push(name, bytes)?;
        } else {
            add(&mut fields, name, &bytes)?;
        }
    }
    let value = serde_json::from_value(Value::Object(fields)).map_err(unreadable)?;
    Ok((value, uploads))
}

/// A field is JSON if it can be, else text. One that comes several times is a list.
fn add(fields: &mut Map<String, Value>, name: String, bytes: &[u8]) -> Result<(), ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|_| ApiError::invalid("a field of the form is not in UTF-8").about(&name))?;
    let value = match name.as_str() {
        "options" | "stream" | "texts" | "questions" | "answers" if text.starts_with(['{', '[', 't', 'f']) => {
            serde_json::from_str(text).unwrap_or_else(|_| Value::from(text))
        }
        _ => Value::from(text),
    };
    match fields.remove(&name) {
        None if LISTS.contains(&name.as_str()) && !value.is_array() => fields.insert(name, Value::Array(vec![value])),
        None => fields.insert(name, value),
        Some(Value::Array(mut all)) => {
            all.push(value);
            fields.insert(name, Value::Array(all))
        }
        Some(_) => return Err(ApiError::invalid("this field of the form comes twice").about(name)),
    };
    Ok(())
}

/// Fields of which there may be several.
const LISTS: [&str; 3] = ["texts", "questions", "answers"];
