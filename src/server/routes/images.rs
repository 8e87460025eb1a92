//! `POST /images`: a picture is looked at once, and may be asked about many times.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::bundle::TaskName;
use crate::server::App;
use crate::server::body;
use crate::server::call::Call;
use crate::server::error::{ApiError, ErrorBody};
use crate::server::images::Image;
use crate::server::keys::Caller;
use crate::server::picture::{self, PictureIn};
use crate::service::{Outcome, Want};
use crate::timing::Timings;

/// A picture to look at.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageRequest {
    /// The model; the first if absent.
    model: Option<String>,
    /// The picture, unless the form has a file called `image`.
    image: Option<PictureIn>,
}

/// A picture that was looked at.
#[derive(Serialize, ToSchema)]
pub struct Looked {
    /// What to ask about it with.
    #[schema(example = "img-00112233445566778899aabbccddeeff")]
    image_id: String,
    /// The model that looked; it alone can be asked.
    model: String,
    /// How long the name is good for after it was used last.
    expires_in_s: f64,
    /// Where the time went, in milliseconds by stage.
    #[schema(value_type = std::collections::BTreeMap<String, f64>)]
    timings_ms: Timings,
}

/// Looks at a picture, to be asked about by its `image_id`.
#[utoipa::path(
    post, path = "/images", tag = "native",
    request_body = ImageRequest,
    responses((status = 200, body = Looked), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn look(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let said = body::read::<ImageRequest>(&app, request).await?;
    let ImageRequest { model, image } = said.value;
    let (owner, task) = (caller.owner, any_task(&app, model.as_deref())?);
    let call = Call::new(&app, caller, (model.as_deref(), task, &[]), said.room)?;
    let mut pictures = picture::given(&app, image.into_iter().collect(), said.uploads).await?;
    if pictures.len() > 1 {
        return Err(ApiError::invalid("one picture at a time gets a name").about("image"));
    }
    let asked = call.asked(pictures.remove(0), Want::See);
    let Outcome::Seen(sight) = call.finish(vec![asked]).await?.remove(0)? else { return Err(ApiError::internal()) };
    let (model, timings_ms) = (call.name().to_owned(), sight.timings().clone());
    let image_id = app.images.keep(Image { owner, model: model.clone(), sight: *sight });
    Ok(Json(Looked { image_id, model, expires_in_s: app.images.lives_s, timings_ms }).into_response())
}

/// Forgets a picture.
#[utoipa::path(
    delete, path = "/images/{image_id}", tag = "native",
    params(("image_id" = String, Path, description = "What `/images` gave.")),
    responses((status = 204), (status = "4XX", body = ErrorBody)),
)]
pub async fn forget(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(image_id): Path<String>,
) -> Result<Response, ApiError> {
    if app.images.forget(caller.owner, &image_id) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    Err(ApiError::not_found("there is no such image_id, or no more"))
}

/// Something that the model does, for every model looks at pictures.
fn any_task(app: &App, model: Option<&str>) -> Result<TaskName, ApiError> {
    let first = || app.fleet.iter().next().ok_or_else(|| ApiError::unavailable("there is no model"));
    let model = model.map_or_else(first, |name| app.fleet.named(name))?;
    Ok(model.bundle.facts().tasks.first().copied().unwrap_or(TaskName::Caption))
}
