//! What clients are told when something goes wrong: one status, one sentence, nothing of the inside.

use axum::Json;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::bundle::BundleError;
use crate::error::Error;
use crate::pixels::PixelsError;
use crate::prompt::PromptError;
use crate::runtime::RuntimeError;

/// An answer that is none.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}{message}", param.as_ref().map(|param| format!("{param}: ")).unwrap_or_default())]
pub struct ApiError {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
    message: String,
    /// The part of the request that is at fault.
    param: Option<String>,
    pub(super) retry_after_s: Option<u64>,
}

/// As OpenAI's servers say it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// One sentence.
    pub message: String,
    /// What kind of thing it is.
    #[schema(example = "invalid_request_error")]
    pub r#type: &'static str,
    /// The part of the request that is at fault.
    #[schema(example = "images[0]")]
    pub param: Option<String>,
    /// What it is, for programs.
    #[schema(example = "picture_unusable")]
    pub code: &'static str,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), param: None, retry_after_s: None }
    }

    /// The request makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", message)
    }

    /// A part of the request is not known or not offered.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "unsupported_parameter", message).about(param)
    }

    /// There is nothing of this name.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// The route has other methods.
    pub fn method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this route has other methods; Allow names them")
    }

    /// No key, or one that is not known.
    pub fn unauthorized() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", "a key is needed: Authorization: Bearer KEY")
    }

    /// Without keys, only this machine itself may ask.
    pub fn forbidden() -> Self {
        let message = "without keys only this machine may ask, under its own name, and no page from elsewhere";
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    /// More than may be sent.
    pub fn too_large(limit: usize) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", format!("the body has more than the {limit} bytes allowed"))
    }

    /// It came too slowly.
    pub fn slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", "the body did not come in time")
    }

    /// Its caller does not wait any longer.
    pub fn given_up() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "deadline", "the time that the caller gave is over")
    }

    /// A body that cannot be read as what it says it is.
    pub fn media_type(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
    }

    /// A picture that cannot be had.
    pub fn picture(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "picture_unusable", message)
    }

    /// As much is in hand as may be.
    pub fn overloaded(retry_after_s: u64) -> Self {
        let message = "as many requests are in hand as may be; Retry-After says when to come again";
        Self { retry_after_s: Some(retry_after_s.max(1)), ..Self::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message) }
    }

    /// This key has asked more often than it may.
    pub fn too_often(retry_after_s: u64) -> Self {
        let message = "this key has asked more often than it may; Retry-After says when to come again";
        Self { retry_after_s: Some(retry_after_s.max(1)), ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", message) }
    }

    /// Nothing can be answered now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { retry_after_s: Some(1), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message) }
    }

    /// Something failed that the request is not to blame for.
    pub fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the request failed here; the server's log says why")
    }

    /// Names the part that is at fault.
    pub fn about(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The body.
    pub fn body(&self) -> ErrorBody {
        let (message, param) = (self.message.clone(), self.param.clone());
        ErrorBody { error: ErrorDetail { message, r#type: self.kind(), param, code: self.code } }
    }

    fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 | 403 => "authentication_error",
            404 => "not_found_error",
            429 if self.code == "rate_limited" => "rate_limit_error",
            429 | 503 => "overloaded_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let invalid = |code, message: String| Self::new(StatusCode::BAD_REQUEST, code, message);
        match &error {
            Error::Picture(PixelsError::TooManyBytes { .. } | PixelsError::TooManyPixels { .. } | PixelsError::TooLong { .. }) => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "picture_too_large", format!("the picture {error}"))
            }
            Error::Picture(_) => Self::picture(format!("the picture {error}")),
            Error::NoPicture => invalid("picture_missing", error.to_string()),
            Error::Prompt(PromptError::OtherBundle) => invalid("other_model", error.to_string()),
            Error::Prompt(_) => invalid("text_unusable", error.to_string()),
            Error::Strategy(_) => invalid("options_unusable", error.to_string()),
            Error::Bundle(BundleError::Task { asked, can, .. }) => {
                invalid("task_not_offered", format!("this model does not do {asked}; it does {can}"))
            }
            Error::NoSuchRequest(_) => Self::not_found(error.to_string()),
            Error::Overloaded => Self::overloaded(1),
            Error::Late => Self::unavailable("the request waited in line for longer than it may"),
            Error::Runtime(RuntimeError::NoRoom { .. }) => {
                Self::unavailable("there is not enough memory for this beside what runs")
            }
            Error::Busy | Error::Gone | Error::Lost | Error::Runtime(_) | Error::Bundle(_) | Error::Unavailable(_) => {
                tracing::error!(error = %chain(&error), "a request failed");
                Self::internal()
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert("www-authenticate", HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(Refused(self));
        response
    }
}

/// Why a request was not answered, for whoever counts.
#[derive(Clone, Debug)]
pub struct Refused(pub ApiError);

/// An error with its causes, for the log.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut whole = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        whole = format!("{whole}: {error}");
        cause = error.source();
    }
    whole
}
