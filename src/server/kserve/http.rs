//! The protocol over HTTP: JSON, and tensors in binary form behind it, as Triton's binary tensor data extension has them.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tower_http::decompression::RequestDecompressionLayer;
use utoipa::ToSchema;

use super::infer::{Inference, Inferred, Inputs, infer as infer_tensors};
use super::metadata::{self, ModelMetadata, ServerMetadata, VERSION};
use super::tensor::{Data, Elements, Head, Output};
use crate::server::App;
use crate::server::body;
use crate::server::config::Limits;
use crate::server::error::{ApiError, Refused};
use crate::server::guard::{self, Spent};
use crate::server::keys::Caller;

/// How many bytes of a body are JSON, if not all.
const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");
/// Of an input or output: how many bytes of the binary form are its own.
const SIZE: &str = "binary_data_size";
/// Of a wanted output: whether it comes in binary form.
const BINARY: &str = "binary_data";
/// Of a request: whether outputs come in binary form that say nothing of it themselves.
const ALL_BINARY: &str = "binary_data_output";

/// What went wrong, as the protocol says it.
#[derive(Serialize, ToSchema)]
pub struct ErrorText {
    /// One sentence, behind the name of what is at fault.
    error: String,
}

/// Whether the process is there.
#[derive(Serialize, ToSchema)]
pub struct Live {
    live: bool,
}

/// Whether requests should come here.
#[derive(Serialize, ToSchema)]
pub struct ServerReady {
    ready: bool,
}

/// Whether a model answers.
#[derive(Serialize, ToSchema)]
pub struct ModelReady {
    /// What requests call it.
    name: String,
    ready: bool,
}

/// Tensors for a model.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InferRequest {
    /// Comes back with the answer.
    id: Option<String>,
    /// The model once more, which some clients name here too.
    model_name: Option<String>,
    /// How texts are written, as under `options` of `/caption`; and `binary_data_output`.
    #[serde(default)]
    #[schema(value_type = Object)]
    parameters: Map<String, Value>,
    /// `image`, and if wanted `text` and `task`.
    inputs: Vec<RequestInput>,
    /// The outputs that are wanted; without them, all.
    #[serde(default)]
    outputs: Vec<RequestOutput>,
}

/// An input tensor.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RequestInput {
    /// `image`: pictures, in base64 or as data URLs where they are JSON, as they are in binary form. `text`: questions, or texts to match.
    /// `task`: `caption`, `ask`, `match` or `embed`.
    name: String,
    /// `[n]`.
    shape: Vec<i64>,
    /// `BYTES`.
    #[schema(example = "BYTES")]
    datatype: String,
    /// `binary_data_size` alone.
    #[serde(default)]
    #[schema(value_type = Object)]
    parameters: Map<String, Value>,
    /// Texts; absent where they are in binary form.
    #[schema(value_type = Vec<String>)]
    data: Option<Value>,
}

/// An output tensor that is wanted.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RequestOutput {
    name: String,
    /// `binary_data` alone.
    #[serde(default)]
    #[schema(value_type = Object)]
    parameters: Map<String, Value>,
}

/// Tensors of a model.
#[derive(Serialize, ToSchema)]
pub struct InferResponse {
    model_name: String,
    /// `1`.
    model_version: &'static str,
    /// Of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// `text` [n] of captions and answers, picture by picture; `itm_probability` and `itc_similarity` [pictures, texts] of matching;
    /// `embedding` [pictures, width].
    outputs: Vec<ResponseOutput>,
}

/// An output tensor.
#[derive(Serialize, ToSchema)]
struct ResponseOutput {
    name: &'static str,
    shape: Vec<usize>,
    /// `BYTES` or `FP32`.
    datatype: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<Binary>,
    /// Texts or numbers in row-major order; absent where they are in binary form.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Value>>)]
    data: Option<Data>,
}

/// Where an output in binary form is.
#[derive(Serialize, ToSchema)]
struct Binary {
    binary_data_size: usize,
}

/// Which model, and of which version.
#[derive(Deserialize)]
pub struct Which {
    model: String,
    #[serde(default)]
    version: String,
}

/// What of a request its answer needs.
struct Form {
    id: Option<String>,
    all_binary: bool,
    /// Of outputs that say it themselves.
    binary: Vec<(String, bool)>,
}

/// Every route of the protocol. Health is for everybody, as elsewhere.
pub fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    let asks = both("/infer", post(infer))
        .layer(RequestDecompressionLayer::new())
        .layer(from_fn_with_state(app.clone(), guard::make_room));
    let known = asks.merge(both("", get(model))).route("/v2", get(server));
    let open = both("/ready", get(model_ready)).route("/v2/health/live", get(live)).route("/v2/health/ready", get(ready));
    known
        .layer(from_fn_with_state(app.clone(), guard::admit))
        .merge(open)
        .method_not_allowed_fallback(guard::otherwise)
        .layer(axum::middleware::map_response(in_its_form))
}

/// A route of a model, with and without its version.
fn both(rest: &str, method: axum::routing::MethodRouter<Arc<App>>) -> Router<Arc<App>> {
    let model = "/v2/models/{model}";
    Router::new().route(&format!("{model}{rest}"), method.clone()).route(&format!("{model}/versions/{{version}}{rest}"), method)
}

/// Says of a refusal what the protocol says: a text.
async fn in_its_form(response: Response) -> Response {
    let Some(Refused(error)) = response.extensions().get() else { return response };
    let said = Json(ErrorText { error: error.to_string() }).into_response();
    let (mut head, _) = response.into_parts();
    head.headers.remove(CONTENT_LENGTH);
    Response::from_parts(head, said.into_body())
}

/// The process is there.
#[utoipa::path(get, path = "/v2/health/live", tag = "kserve", responses((status = 200, body = Live)))]
pub async fn live() -> Json<Live> {
    Json(Live { live: true })
}

/// Requests should come here.
#[utoipa::path(get, path = "/v2/health/ready", tag = "kserve", responses((status = 200, body = ServerReady), (status = 503, body = ServerReady)))]
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    let ready = app.is_ready();
    (status(ready), Json(ServerReady { ready })).into_response()
}

/// The server, and which extensions of the protocol it has.
#[utoipa::path(get, path = "/v2", tag = "kserve", responses((status = 200, body = ServerMetadata)))]
pub async fn server() -> Json<ServerMetadata> {
    Json(ServerMetadata::new())
}

/// The tensors of a model; with `/versions/1` behind its name too, as all routes of models.
#[utoipa::path(
    get, path = "/v2/models/{model}", tag = "kserve",
    params(("model" = String, Path, description = "What requests call it.")),
    responses((status = 200, body = ModelMetadata), (status = "4XX", body = ErrorText)),
)]
pub async fn model(State(app): State<Arc<App>>, Path(which): Path<Which>) -> Result<Json<ModelMetadata>, ApiError> {
    let model = metadata::model(&app, &which.model, &which.version)?;
    Ok(Json(ModelMetadata::new(model)))
}

/// The model answers.
#[utoipa::path(
    get, path = "/v2/models/{model}/ready", tag = "kserve",
    params(("model" = String, Path, description = "What requests call it.")),
    responses((status = 200, body = ModelReady), (status = 503, body = ModelReady), (status = 404, body = ErrorText)),
)]
pub async fn model_ready(State(app): State<Arc<App>>, Path(which): Path<Which>) -> Result<Response, ApiError> {
    let ready = metadata::is_ready(&app, metadata::model(&app, &which.model, &which.version)?);
    Ok((status(ready), Json(ModelReady { name: which.model, ready })).into_response())
}

fn status(ready: bool) -> StatusCode {
    if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// Answers with tensors.
///
/// Without the input `task`, a model asks what stands in `text`, or else matches it; without `text` it writes captions, or else embeds. Several
/// questions are about each picture. Tensors in binary form stand behind the JSON, whose length `Inference-Header-Content-Length` tells then.
#[utoipa::path(
    post, path = "/v2/models/{model}/infer", tag = "kserve",
    params(("model" = String, Path, description = "What requests call it.")),
    request_body = InferRequest,
    responses((status = 200, body = InferResponse), (status = "4XX", body = ErrorText), (status = "5XX", body = ErrorText)),
)]
pub async fn infer(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(which): Path<Which>,
    request: Request,
) -> Result<Response, ApiError> {
    metadata::model(&app, &which.model, &which.version)?;
    let json_length = json_length(request.headers())?;
    let (whole, room) = body::bytes(&app, request).await?;
    let (json, binary) = halves(whole, json_length)?;
    let said: InferRequest = body::parsed(json).await?;
    if said.model_name.as_ref().is_some_and(|name| *name != which.model) {
        return Err(ApiError::invalid("the address names another model").about("model_name"));
    }
    let (wanted, form) = read(said, binary, &which.model, &app.config.limits)?;
    let found = infer_tensors(&app, caller, wanted, room).await?;
    answer(which.model, form, found)
}

fn json_length(headers: &HeaderMap) -> Result<Option<usize>, ApiError> {
    let length = headers.get(JSON_LENGTH).map(|length| length.to_str().ok().and_then(|length| length.parse().ok()));
    length.map(|length| length.ok_or_else(|| ApiError::invalid("it is no number of bytes").about(JSON_LENGTH.as_str()))).transpose()
}

/// The JSON and what stands behind it.
fn halves(mut whole: Bytes, json_length: Option<usize>) -> Result<(Bytes, Bytes), ApiError> {
    let length = json_length.unwrap_or(whole.len());
    if length > whole.len() {
        return Err(ApiError::invalid("the body has fewer bytes than this").about(JSON_LENGTH.as_str()));
    }
    let json = whole.split_to(length);
    Ok((json, whole))
}

/// What a request says, with its tensors from both halves.
fn read(said: InferRequest, mut binary: Bytes, model: &str, limits: &Limits) -> Result<(Inference, Form), ApiError> {
    let mut inputs = Inputs::default();
    for input in said.inputs {
        let (head, elements) = input.read(&mut binary, limits)?;
        inputs.add(&head, elements)?;
    }
    if !binary.is_empty() {
        return Err(ApiError::invalid("the body has more bytes than its inputs say that they have").about("inputs"));
    }
    let mut parameters = said.parameters;
    let all_binary = flag(&mut parameters, ALL_BINARY)?.unwrap_or(false);
    let mut form = Form { id: said.id, all_binary, binary: Vec::new() };
    let mut outputs = Vec::with_capacity(said.outputs.len());
    for RequestOutput { name, mut parameters } in said.outputs {
        let is_binary = flag(&mut parameters, BINARY)?.unwrap_or(all_binary);
        nothing_else(&parameters, &name)?;
        form.binary.push((name.clone(), is_binary));
        outputs.push(name);
    }
    Ok((Inference { model: model.to_owned(), parameters, inputs, outputs }, form))
}

impl RequestInput {
    /// The tensor; its part of the binary half is taken from there.
    fn read(self, binary: &mut Bytes, limits: &Limits) -> Result<(Head, Elements), ApiError> {
        let Self { name, shape, datatype, mut parameters, data } = self;
        let head = Head { name, datatype, shape };
        let n = head.n_elements(limits)?;
        let size = parameters.remove(SIZE);
        nothing_else(&parameters, &head.name)?;
        let elements = match (size, data) {
            (None, Some(data)) => Elements::Texts(head.counted(texts(&head, data, n)?, n)?),
            (Some(size), None) => {
                let size = size.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| *size <= binary.len());
                let size = size.ok_or_else(|| head.wrong("binary_data_size is no number of bytes that the body has"))?;
                head.split(&binary.split_to(size), n)?
            }
            _ => return Err(head.wrong("an input has either data or a binary_data_size")),
        };
        Ok((head, elements))
    }
}

/// The texts of JSON.
fn texts(head: &Head, data: Value, n: usize) -> Result<Vec<String>, ApiError> {
    let Value::Array(all) = data else { return Err(head.wrong("the data is a list")) };
    let all = head.counted(all, n)?.into_iter().map(|one| if let Value::String(text) = one { Some(text) } else { None });
    all.collect::<Option<_>>().ok_or_else(|| head.wrong("the data is a list of texts"))
}

/// Takes a truth value from the parameters.
fn flag(parameters: &mut Map<String, Value>, name: &str) -> Result<Option<bool>, ApiError> {
    let value = parameters.remove(name);
    value.map(|value| value.as_bool().ok_or_else(|| ApiError::invalid("it is true or false").about(name))).transpose()
}

fn nothing_else(parameters: &Map<String, Value>, tensor: &str) -> Result<(), ApiError> {
    match parameters.keys().next() {
        Some(name) => Err(ApiError::unsupported(tensor, format!("there is no such parameter of a tensor: {name}"))),
        None => Ok(()),
    }
}

/// JSON, and behind it what is wanted in binary form.
fn answer(model_name: String, form: Form, found: Inferred) -> Result<Response, ApiError> {
    let mut binary = Vec::new();
    let outputs = found.outputs.into_iter().map(|output| form.output(output, &mut binary)).collect();
    let said = InferResponse { model_name, model_version: VERSION, id: form.id, outputs };
    let mut whole = serde_json::to_vec(&said).map_err(|_| ApiError::internal())?;
    let json_length = whole.len();
    let mut response = if binary.is_empty() {
        ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], whole).into_response()
    } else {
        whole.append(&mut binary);
        let kind = HeaderValue::from_static("application/octet-stream");
        ([(CONTENT_TYPE, kind), (JSON_LENGTH, HeaderValue::from(json_length))], whole).into_response()
    };
    if let Some(timings) = found.spent {
        response.extensions_mut().insert(Spent(timings));
    }
    Ok(response)
}

impl Form {
    /// An output as JSON has it; in binary form, its elements go behind the others.
    fn output(&self, output: Output, binary: &mut Vec<u8>) -> ResponseOutput {
        let said = self.binary.iter().find(|(name, _)| *name == output.name);
        let is_binary = said.map_or(self.all_binary, |(_, is_binary)| *is_binary);
        let datatype = output.datatype();
        let before = binary.len();
        if is_binary {
            binary.extend(output.binary());
        }
        let parameters = is_binary.then(|| Binary { binary_data_size: binary.len() - before });
        let Output { name, shape, data } = output;
        ResponseOutput { name, shape, datatype, parameters, data: (!is_binary).then_some(data) }
    }
}
