//! `POST /rank`: pictures, a question and answers → how probable the language model finds each.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::results::{Results, respond};
use crate::bundle::TaskName;
use crate::engine::{RANKED_AT_ONCE, Ranked};
use crate::server::App;
use crate::server::body;
use crate::server::call::{self, Call};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::keys::Caller;
use crate::server::picture::{self, Given, PictureIn};
use crate::service::{Outcome, Want};
use crate::timing::Timings;

/// Candidate answers to a question.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RankRequest {
    /// The model; the first that answers questions if absent.
    model: Option<String>,
    /// The pictures; files of a form called `image` come before them.
    #[serde(default)]
    images: Vec<PictureIn>,
    /// The question.
    question: String,
    /// The candidates.
    answers: Vec<String>,
    /// Another text around the question, whose `{}` takes it.
    prompt: Option<String>,
}

/// Candidates, the most probable first.
#[derive(Serialize, ToSchema)]
pub struct Ranking {
    /// The candidates.
    #[schema(value_type = Vec<Object>)]
    ranking: Vec<Ranked>,
    /// Where the time went, in milliseconds by stage.
    #[schema(value_type = std::collections::BTreeMap<String, f64>)]
    timings_ms: Timings,
}

/// Orders candidate answers by their likelihood: the sum of the log-probabilities of their tokens, the end token included.
#[utoipa::path(
    post, path = "/rank", tag = "native",
    request_body = RankRequest,
    responses((status = 200, body = Results<Ranking>), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn rank(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let said = body::read::<RankRequest>(&app, request).await?;
    let RankRequest { model, images, question, answers, prompt } = said.value;
    call::check_list(&app, &answers, "answers")?;
    let task = call::ask(question, prompt)?;
    let call = Call::new(&app, caller, (model.as_deref(), TaskName::Ask, &images), said.room)?;
    let pictures = picture::given(&app, images, said.uploads).await?;
    let n_chunks = answers.len().div_ceil(RANKED_AT_ONCE);
    let pictures = if n_chunks > 1 { call.looked(pictures).await? } else { pictures };
    let wants = |given: Result<Given, ApiError>| {
        let (call, task) = (&call, &task);
        let chunks: Vec<_> = answers.chunks(RANKED_AT_ONCE).map(|answers| Want::Rank(task.clone(), answers.to_vec())).collect();
        chunks.into_iter().map(move |want| call.asked(given.clone(), want)).collect::<Vec<_>>()
    };
    let mut ends = call.finish(pictures.into_iter().flat_map(wants).collect()).await?.into_iter();
    let mut found = Vec::new();
    while let Some(first) = ends.next() {
        let rest: Vec<_> = ends.by_ref().take(n_chunks - 1).collect();
        found.push(ranking(std::iter::once(first).chain(rest)));
    }
    respond(call.name(), found, |ranking| &ranking.timings_ms)
}

/// What all parts of the list came to.
fn ranking(parts: impl Iterator<Item = Result<Outcome, ApiError>>) -> Result<Ranking, ApiError> {
    let mut all = Ranking { ranking: Vec::new(), timings_ms: Timings::default() };
    for part in parts {
        let Outcome::Ranked(ranked, timings) = part? else { return Err(ApiError::internal()) };
        let first = all.ranking.len();
        all.ranking.extend(ranked.into_iter().map(|one| Ranked { index: first + one.index, ..one }));
        all.timings_ms.merge(&timings);
    }
    all.ranking.sort_by(|a, b| b.log_likelihood.total_cmp(&a.log_likelihood));
    Ok(all)
}
