//! `POST /caption`: pictures → what is on them.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::response::sse::Event;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use super::options::Options;
use super::results::{Results, Written, respond};
use super::stream::{self, Say};
use crate::bundle::TaskName;
use crate::server::App;
use crate::server::body;
use crate::server::call::{self, Call};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::keys::Caller;
use crate::server::picture::{self, Given, PictureIn};
use crate::service::{Outcome, Want};

/// Pictures to describe.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CaptionRequest {
    /// The model; the first that writes captions if absent.
    model: Option<String>,
    /// The pictures; files of a form called `image` come before them.
    #[serde(default)]
    images: Vec<PictureIn>,
    /// How texts are written.
    #[serde(default)]
    options: Options,
    /// Tell the text as it is written, of one picture; see the description.
    #[serde(default)]
    stream: bool,
}

/// Describes pictures.
///
/// With `stream`, the answer is a stream of server-sent events: `{"text": …}` for every piece, then `{"result": …}` as it would be without,
/// or `{"error": …}`, and `[DONE]`.
#[utoipa::path(
    post, path = "/caption", tag = "native",
    request_body = CaptionRequest,
    responses(
        (status = 200, content((Results<Written> = "application/json"), (Value = "text/event-stream"))),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    ),
)]
pub async fn caption(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let said = body::read::<CaptionRequest>(&app, request).await?;
    let CaptionRequest { model, images, options, stream } = said.value;
    let call = Call::new(&app, caller, (model.as_deref(), TaskName::Caption, &images), said.room)?;
    let pictures = picture::given(&app, images, said.uploads).await?;
    let generation = Box::new(call.generation(TaskName::Caption, &options.generation()?)?);
    let task = call::caption(options.prompt)?;
    let wants = pictures.into_iter().map(|given| (given, None, Want::Write(task.clone(), generation.clone()))).collect();
    write(call, wants, stream).await
}

/// A picture, the question about it, and what is wanted.
pub type Wanted = (Result<Given, ApiError>, Option<String>, Want);

/// Writes all texts, or streams the only one.
pub async fn write(call: Call, wanted: Vec<Wanted>, streams: bool) -> Result<Response, ApiError> {
    let (mut questions, mut asked) = (Vec::new(), Vec::new());
    for (given, question, want) in wanted {
        questions.push(question);
        asked.push(call.asked(given, want));
    }
    if streams {
        return tell(call, questions, asked);
    }
    let found = call.finish(asked).await?;
    let written = found.into_iter().zip(questions).map(|(end, question)| written(question, end)).collect();
    respond(call.name(), written, |written| &written.timings_ms)
}

fn tell(
    call: Call,
    mut questions: Vec<Option<String>>,
    asked: Vec<Result<crate::server::worker::Asked, ApiError>>,
) -> Result<Response, ApiError> {
    if asked.len() != 1 {
        return Err(ApiError::invalid("one text alone can be streamed").about("stream"));
    }
    let ticket = call.submit(asked)?.remove(0)?;
    Ok(stream::stream(call, ticket, Pieces { question: questions.remove(0) }))
}

fn written(question: Option<String>, end: Result<Outcome, ApiError>) -> Result<Written, ApiError> {
    match end? {
        Outcome::Written(answer) => Ok(Written::new(question, *answer)),
        other => {
            tracing::error!(?other, "a text was asked for");
            Err(ApiError::internal())
        }
    }
}

/// The events of native routes.
struct Pieces {
    question: Option<String>,
}

#[derive(Serialize)]
struct End {
    result: Written,
}

impl Say for Pieces {
    fn first(&mut self) -> Vec<Event> {
        Vec::new()
    }

    fn piece(&mut self, text: String, _: usize) -> Option<Event> {
        (!text.is_empty()).then(|| stream::json(&json!({"text": text})))
    }

    fn last(&mut self, end: Result<Outcome, ApiError>) -> Vec<Event> {
        let said = match written(self.question.take(), end) {
            Ok(result) => stream::json(&End { result }),
            Err(error) => stream::json(&error.body()),
        };
        vec![said, stream::done()]
    }
}
