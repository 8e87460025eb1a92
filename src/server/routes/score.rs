//! `POST /v1/score` and `/v1/rerank`: matching probabilities in the forms that retrieval tools speak (vLLM's, Jina's and Cohere's).

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::{Extension, Json};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::chat::{Usage, now};
use super::cohere::Meta;
use super::messages::{Part, Thing};
use crate::bundle::TaskName;
use crate::server::App;
use crate::server::body;
use crate::server::call::{self, Call};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::keys::Caller;
use crate::server::picture::{self, Given, PictureIn};
use crate::service::{Outcome, Want};

/// Two lists of texts and pictures: of each pair one is a text and one a picture.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "what is not read is named to be allowed")]
pub struct ScoreRequest {
    /// The model; the first that matches if absent.
    model: Option<String>,
    /// One, which is paired with all of the others, or as many as those.
    #[serde(alias = "queries", alias = "data_1")]
    text_1: Things,
    /// What it is paired with.
    #[serde(alias = "documents", alias = "data_2")]
    text_2: Things,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    user: Option<IgnoredAny>,
}

/// A query and what it is compared with: of both one is texts and one pictures.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "what is not read is named to be allowed")]
pub struct RerankRequest {
    /// The model; the first that matches if absent.
    model: Option<String>,
    /// A text, or `{"content": [picture]}`, or a picture's data URL.
    query: Things,
    /// Pictures, or texts.
    documents: Things,
    /// How many of the best are told; all if absent.
    top_n: Option<usize>,
    /// Whether texts among the documents are told again.
    #[serde(default)]
    return_documents: bool,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    user: Option<IgnoredAny>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    max_tokens_per_doc: Option<IgnoredAny>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    priority: Option<IgnoredAny>,
}

/// Texts and pictures in the forms that clients have for them. A text that is the data URL of a picture is the picture.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
#[schema(no_recursion)]
pub enum Things {
    /// A text.
    Text(String),
    /// Parts, each of which is one of them.
    Content {
        /// The parts.
        content: Vec<Part>,
    },
    /// `{"text": …}`, as rerankers have it.
    Named {
        /// The text.
        text: String,
    },
    /// Several.
    Several(Vec<OneThing>),
}

/// A text or a picture.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub enum OneThing {
    /// A text.
    Text(String),
    /// A picture, or a text, as parts.
    Content {
        /// One part.
        content: Vec<Part>,
    },
    /// `{"text": …}`, as rerankers have it.
    Named {
        /// The text.
        text: String,
    },
    /// A part alone.
    Part(Part),
}

/// Matching probabilities in the order of the pairs.
#[derive(Serialize, ToSchema)]
pub struct ScoreResponse {
    id: String,
    /// `list`.
    object: &'static str,
    created: u64,
    model: String,
    data: Vec<Score>,
    usage: Usage,
}

/// A matching probability.
#[derive(Serialize, ToSchema)]
pub struct Score {
    index: usize,
    /// `score`.
    object: &'static str,
    score: f32,
}

/// Documents, the best first.
#[derive(Serialize, ToSchema)]
pub struct RerankResponse {
    id: String,
    model: String,
    results: Vec<Placed>,
    usage: Usage,
    meta: Meta,
}

/// A document and its matching probability.
#[derive(Serialize, ToSchema)]
pub struct Placed {
    /// Its place among those that were given.
    index: usize,
    relevance_score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<Document>,
}

/// A text that was given.
#[derive(Serialize, ToSchema)]
pub struct Document {
    text: String,
}

/// Tells how well texts fit pictures: the matching probability (ITM) of each pair.
#[utoipa::path(
    post, path = "/v1/score", tag = "retrieval",
    request_body = ScoreRequest,
    responses((status = 200, body = ScoreResponse), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn score(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<ScoreResponse>, ApiError> {
    let said = body::read::<ScoreRequest>(&app, request).await?;
    let ScoreRequest { model, text_1, text_2, .. } = said.value;
    let call = Call::new(&app, caller, (model.as_deref(), TaskName::Match, &[]), said.room)?;
    let scores = pairs(&call, text_1.all()?, text_2.all()?).await?;
    let data = scores.into_iter().enumerate().map(|(index, score)| Score { index, object: "score", score }).collect();
    let id = format!("score-{:032x}", rand::random::<u128>());
    Ok(Json(ScoreResponse { id, object: "list", created: now(), model: call.name().to_owned(), data, usage: Usage::default() }))
}

/// Orders documents by how well they fit a query, by the matching probability (ITM).
#[utoipa::path(
    post, path = "/v1/rerank", tag = "retrieval",
    request_body = RerankRequest,
    responses((status = 200, body = RerankResponse), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn rerank(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<RerankResponse>, ApiError> {
    let said = body::read::<RerankRequest>(&app, request).await?;
    let RerankRequest { model, query, documents, top_n, return_documents, .. } = said.value;
    let call = Call::new(&app, caller, (model.as_deref(), TaskName::Match, &[]), said.room)?;
    let (query, documents) = (query.all()?, documents.all()?);
    if query.len() != 1 {
        return Err(ApiError::invalid("one query is compared with documents").about("query"));
    }
    let texts: Vec<Option<String>> = documents.iter().map(|thing| thing.text().filter(|_| return_documents)).collect();
    let scores = pairs(&call, query, documents).await?;
    let placed = scores.into_iter().zip(texts).enumerate().map(|(index, (relevance_score, text))| Placed {
        index,
        relevance_score,
        document: text.map(|text| Document { text }),
    });
    let mut results: Vec<Placed> = placed.collect();
    results.sort_by(|a, b| b.relevance_score.total_cmp(&a.relevance_score));
    results.truncate(top_n.unwrap_or(usize::MAX));
    let id = format!("rerank-{:032x}", rand::random::<u128>());
    Ok(Json(RerankResponse { id, model: call.name().to_owned(), results, usage: Usage::default(), meta: Meta::new(None) }))
}

impl Things {
    /// All of them in order.
    pub fn all(self) -> Result<Vec<Thing>, ApiError> {
        match self {
            Self::Text(text) | Self::Named { text } => Ok(vec![Thing::of(text)]),
            Self::Content { content } => Ok(content.into_iter().map(Part::thing).collect()),
            Self::Several(several) => several.into_iter().map(OneThing::one).collect(),
        }
    }
}

impl OneThing {
    fn one(self) -> Result<Thing, ApiError> {
        match self {
            Self::Text(text) | Self::Named { text } => Ok(Thing::of(text)),
            Self::Part(part) => Ok(part.thing()),
            Self::Content { content } => {
                let [part] = <[Part; 1]>::try_from(content).map_err(|_| ApiError::invalid("a document has one part"))?;
                Ok(part.thing())
            }
        }
    }
}

impl Thing {
    /// Some clients have texts alone; a picture among them is its data URL.
    fn of(text: String) -> Self {
        if text.starts_with("data:image/") {
            return Self::Picture(PictureIn { url: Some(text), ..PictureIn::default() });
        }
        Self::Text(text)
    }

    fn text(&self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text.clone()),
            Self::Picture(_) => None,
        }
    }
}

/// The matching probability of every pair. A picture that stands in several is looked at once.
async fn pairs(call: &Call, first: Vec<Thing>, second: Vec<Thing>) -> Result<Vec<f32>, ApiError> {
    let (n_first, n_second) = (first.len(), second.len());
    let most = call.app.config.limits.max_texts;
    if n_first == 0 || n_second == 0 || n_first > most || n_second > most {
        return Err(ApiError::invalid(format!("each side has from 1 to {most} texts or pictures")));
    }
    if n_first != 1 && n_second != 1 && n_first != n_second {
        return Err(ApiError::invalid(format!("{n_first} cannot be paired with {n_second}: one side has one, or both as many")));
    }
    let n = n_first.max(n_second);
    let (first, second) = (read(call, first).await?, read(call, second).await?);
    let at = |side: &[Side], index: usize| if side.len() == 1 { side[0].clone() } else { side[index].clone() };
    if let ([Side::Picture(picture)], true) = (&*first, second.iter().all(Side::is_text)) {
        return one_picture(call, picture.clone(), second).await;
    }
    let asked = (0..n).map(|index| match (at(&first, index), at(&second, index)) {
        (Side::Text(text), Side::Picture(given)) | (Side::Picture(given), Side::Text(text)) => {
            Ok(call.asked(Ok(given), Want::Match(vec![text])))
        }
        _ => Err(ApiError::invalid("of every pair one is a text and one a picture")),
    });
    let asked = asked.collect::<Result<Vec<_>, _>>()?;
    let ends = call.finish(asked).await?;
    ends.into_iter().map(|end| Ok(probabilities(end?)?[0])).collect()
}

async fn one_picture(call: &Call, picture: Given, texts: Vec<Side>) -> Result<Vec<f32>, ApiError> {
    let texts = texts.into_iter().filter_map(Side::text).collect();
    let asked = vec![call.asked(Ok(picture), Want::Match(texts))];
    probabilities(call.finish(asked).await?.remove(0)?)
}

fn probabilities(outcome: Outcome) -> Result<Vec<f32>, ApiError> {
    let Outcome::Matched(found, _) = outcome else { return Err(ApiError::internal()) };
    Ok(found.iter().map(|found| found.itm_probability).collect())
}

/// A text, or a picture that is here.
#[derive(Clone)]
enum Side {
    Text(String),
    Picture(Given),
}

impl Side {
    fn is_text(&self) -> bool {
        matches!(self, Self::Text(_))
    }

    fn text(self) -> Option<String> {
        match self {
            Self::Text(text) => Some(text),
            Self::Picture(_) => None,
        }
    }
}

async fn read(call: &Call, things: Vec<Thing>) -> Result<Vec<Side>, ApiError> {
    let mut found = Vec::with_capacity(things.len());
    for thing in things {
        found.push(match thing {
            Thing::Text(text) => {
                call::check_text(&text, "text")?;
                Side::Text(text)
            }
            Thing::Picture(picture) => Side::Picture(picture::one(&call.app, picture).await?),
        });
    }
    Ok(found)
}
