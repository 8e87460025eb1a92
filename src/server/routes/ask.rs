//! `POST /ask`: pictures and questions → answers.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use serde::Deserialize;
use utoipa::ToSchema;

use super::caption::{Wanted, write};
use super::options::Options;
use super::results::{Results, Written};
use crate::bundle::TaskName;
use crate::server::App;
use crate::server::body;
use crate::server::call::{self, Call};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::keys::Caller;
use crate::server::picture::{self, PictureIn};
use crate::service::Want;

/// Questions about pictures.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AskRequest {
    /// The model; the first that answers questions if absent.
    model: Option<String>,
    /// The pictures; files of a form called `image` come before them.
    #[serde(default)]
    images: Vec<PictureIn>,
    /// The question.
    question: Option<String>,
    /// Or several, each about each picture.
    #[serde(default)]
    questions: Vec<String>,
    /// How answers are written.
    #[serde(default)]
    options: Options,
    /// Tell the answer as it is written, of one picture and question, as `/caption` does.
    #[serde(default)]
    stream: bool,
}

/// Answers questions about pictures.
///
/// Results come picture by picture, each with the questions in their order. With several questions every picture is looked at once, before
/// the times of the results begin; for later ones `/images` gives it a name.
#[utoipa::path(
    post, path = "/ask", tag = "native",
    request_body = AskRequest,
    responses(
        (status = 200, content((Results<Written> = "application/json"), (Value = "text/event-stream"))),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    ),
)]
pub async fn ask(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let said = body::read::<AskRequest>(&app, request).await?;
    let AskRequest { model, images, question, questions, options, stream } = said.value;
    let questions: Vec<String> = question.into_iter().chain(questions).collect();
    call::check_list(&app, &questions, "questions")?;
    let call = Call::new(&app, caller, (model.as_deref(), TaskName::Ask, &images), said.room)?;
    let pictures = picture::given(&app, images, said.uploads).await?;
    let generation = Box::new(call.generation(TaskName::Ask, &options.generation()?)?);
    let pictures = if questions.len() > 1 { call.looked(pictures).await? } else { pictures };
    let mut wanted: Vec<Wanted> = Vec::with_capacity(pictures.len() * questions.len());
    for given in pictures {
        for question in &questions {
            let task = call::ask(question.clone(), options.prompt.clone())?;
            wanted.push((given.clone(), Some(question.clone()), Want::Write(task, generation.clone())));
        }
    }
    write(call, wanted, stream).await
}
