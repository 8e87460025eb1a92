//! `POST /match`: pictures and texts → how well they fit.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::results::{Results, respond};
use crate::bundle::TaskName;
use crate::server::App;
use crate::server::body;
use crate::server::call::{self, Call};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::keys::Caller;
use crate::server::picture::{self, PictureIn};
use crate::service::{Outcome, Want};
use crate::timing::Timings;

/// Texts to compare with pictures.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MatchRequest {
    /// The model; the first that matches if absent.
    model: Option<String>,
    /// The pictures; files of a form called `image` come before them.
    #[serde(default)]
    images: Vec<PictureIn>,
    /// The texts, each compared with each picture.
    texts: Vec<String>,
}

/// How texts fit a picture.
#[derive(Serialize, ToSchema)]
pub struct Matches {
    /// In the order of the texts.
    matches: Vec<TextMatch>,
    /// Where the time went, in milliseconds by stage.
    #[schema(value_type = std::collections::BTreeMap<String, f64>)]
    timings_ms: Timings,
}

/// How a text fits a picture.
#[derive(Serialize, ToSchema)]
pub struct TextMatch {
    /// The text.
    text: String,
    /// Image–text matching: the probability that the text is about the picture.
    itm_probability: f32,
    /// The logit of the class "fits".
    itm_logit: f32,
    /// Image–text contrastive similarity: a cosine, the largest over the queries.
    itc_similarity: f32,
}

/// Tells how well texts fit pictures.
#[utoipa::path(
    post, path = "/match", tag = "native",
    request_body = MatchRequest,
    responses((status = 200, body = Results<Matches>), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn match_texts(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let said = body::read::<MatchRequest>(&app, request).await?;
    let MatchRequest { model, images, texts } = said.value;
    call::check_list(&app, &texts, "texts")?;
    let call = Call::new(&app, caller, (model.as_deref(), TaskName::Match, &images), said.room)?;
    let pictures = picture::given(&app, images, said.uploads).await?;
    let asked = pictures.into_iter().map(|given| call.asked(given, Want::Match(texts.clone()))).collect();
    let found = call.finish(asked).await?.into_iter().map(|end| matches(&texts, end?)).collect();
    respond(call.name(), found, |matches| &matches.timings_ms)
}

fn matches(texts: &[String], outcome: Outcome) -> Result<Matches, ApiError> {
    let Outcome::Matched(found, timings_ms) = outcome else { return Err(ApiError::internal()) };
    let matches = texts.iter().zip(found).map(|(text, found)| TextMatch {
        text: text.clone(),
        itm_probability: found.itm_probability,
        itm_logit: found.itm_logit,
        itc_similarity: found.itc_similarity,
    });
    Ok(Matches { matches: matches.collect(), timings_ms })
}
