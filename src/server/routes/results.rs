//! What native routes answer: a result for each picture, or why there is none.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::{Answer, Candidate, TokenLogProb};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::guard::Spent;
use crate::text::Warning;
use crate::timing::{Timings, milliseconds};

/// Results in the order of what was asked.
#[derive(Serialize, ToSchema)]
pub struct Results<T> {
    /// The model that answered.
    pub model: String,
    /// One for each picture, or for each picture and question.
    pub results: Vec<Item<T>>,
}

/// A result, or why there is none.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Item<T> {
    /// The result.
    Done(T),
    /// What went wrong with this one; the others are done.
    Failed(ErrorBody),
}

/// A text that was written.
#[derive(Serialize, ToSchema)]
pub struct Written {
    /// The question, where there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub question: Option<String>,
    /// The text.
    pub text: String,
    /// Its tokens, the end token included.
    pub tokens: Vec<u32>,
    /// `stop`, or `length` where the limit was reached.
    pub finish_reason: String,
    /// Of beam search: the sum of log-probabilities, divided by the length to the power of the penalty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
    /// Where several texts were wanted, all of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Object>)]
    pub candidates: Vec<Candidate>,
    /// Of each token, where they were wanted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<Object>)]
    pub log_probs: Vec<TokenLogProb>,
    /// What was not read or written as it was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub warnings: Vec<Warning>,
    /// Where the time went, in milliseconds by stage.
    #[schema(value_type = std::collections::BTreeMap<String, f64>)]
    pub timings_ms: Timings,
    /// From joining the language model to the first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<f64>,
}

impl Written {
    /// What is told of an answer.
    pub fn new(question: Option<String>, answer: Answer) -> Self {
        let Answer { text, tokens, finish, score, candidates, log_probs, warnings, timings, first_token, .. } = answer;
        let (finish_reason, first_token_ms) = (finish.to_string(), first_token.map(milliseconds));
        Self { question, text, tokens, finish_reason, score, candidates, log_probs, warnings, timings_ms: timings, first_token_ms }
    }
}

/// Answers with results. Where one alone was wanted, its failure is the request's; its times go into the header.
pub fn respond<T: Serialize>(
    model: &str,
    mut found: Vec<Result<T, ApiError>>,
    timings: impl Fn(&T) -> &Timings,
) -> Result<Response, ApiError> {
    if found.len() == 1 && found[0].is_err() {
        found.remove(0)?;
    }
    let spent = match found.as_slice() {
        [Ok(one)] => Some(Spent(timings(one).clone())),
        _ => None,
    };
    let item = |one: Result<T, ApiError>| one.map_or_else(|error| Item::Failed(error.body()), Item::Done);
    let results = Results { model: model.to_owned(), results: found.into_iter().map(item).collect() };
    let mut response = Json(results).into_response();
    if let Some(spent) = spent {
        response.extensions_mut().insert(spent);
    }
    Ok(response)
}
