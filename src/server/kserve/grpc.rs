//! The protocol over gRPC, behind the same doors: its routes are those of HTTP/2, so that callers, room, sizes and times are looked after
//! where they are for HTTP. Tensors of answers are in binary form.

use std::collections::HashMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn, from_fn_with_state, map_response};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Map, Value};
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use tower_http::catch_panic::CatchPanicLayer;

use super::infer::{Inference, Inferred, Inputs, infer};
use super::metadata::{self, ModelMetadata, ServerMetadata, TensorMetadata, VERSION};
use super::tensor::{Elements, Head, Output};
use super::wire::grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer};
use super::wire::infer_parameter::ParameterChoice;
use super::wire::model_infer_request::InferInputTensor;
use super::wire::model_infer_response::InferOutputTensor;
use super::wire::{self, InferParameter, ModelInferRequest, ModelInferResponse};
use crate::server::App;
use crate::server::body::{self, Room};
use crate::server::config::Limits;
use crate::server::error::{ApiError, Refused};
use crate::server::guard::{self, Spent};
use crate::server::keys::Caller;

/// In front of a method's name.
const SERVICE: &str = "/inference.GRPCInferenceService/";
/// How long a caller waits, as gRPC over HTTP/2 has it.
const TIMEOUT: &str = "grpc-timeout";
/// A longer sentence has no place in a header.
const LONGEST_MESSAGE: usize = 1024;

type Reply<T> = Result<tonic::Response<T>, Status>;

/// The methods.
#[derive(Clone)]
struct Methods(Arc<App>);

/// Every method. Health is for everybody, as elsewhere.
pub fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    let asks = methods(app, &["ModelInfer"]).layer(from_fn_with_state(app.clone(), guard::make_room));
    let known = asks.merge(methods(app, &["ServerMetadata", "ModelMetadata"])).fallback(nowhere);
    let open = methods(app, &["ServerLive", "ServerReady", "ModelReady"]);
    known
        .layer(from_fn_with_state(app.clone(), guard::admit))
        .merge(open)
        .layer(from_fn(in_time))
        .layer(CatchPanicLayer::custom(guard::panicked))
        .layer(map_response(in_its_form))
}

fn methods(app: &Arc<App>, names: &[&str]) -> Router<Arc<App>> {
    // `whole` has the limit.
    let service = GrpcInferenceServiceServer::new(Methods(app.clone())).max_decoding_message_size(usize::MAX);
    let add = |router: Router<_>, name: &&str| router.route_service(&format!("{SERVICE}{name}"), service.clone());
    names.iter().fold(Router::new(), add).layer(from_fn_with_state(app.clone(), whole))
}

/// Reads a message whole, within the limits of bodies, before anything is made of it.
async fn whole(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let (bytes, room) = match body::bytes(&app, Request::from_parts(head.clone(), body)).await {
        Ok(read) => read,
        Err(error) => return error.into_response(),
    };
    if !wire::is_plausible(&bytes, &app.config.limits) {
        return ApiError::invalid("this is not one message, or it has more fields than a request may need").into_response();
    }
    let mut request = Request::from_parts(head, Body::from(bytes));
    request.extensions_mut().insert(room);
    next.run(request).await
}

/// Gives up when the caller has: what is dropped here takes its jobs with it.
async fn in_time(request: Request, next: Next) -> Response {
    let Some(time) = timeout(request.headers()) else { return next.run(request).await };
    tokio::time::timeout(time, next.run(request)).await.unwrap_or_else(|_| ApiError::given_up().into_response())
}

/// At most eight digits and a unit.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let n: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(n * 3600)),
        "M" => Some(Duration::from_secs(n * 60)),
        "S" => Some(Duration::from_secs(n)),
        "m" => Some(Duration::from_millis(n)),
        "u" => Some(Duration::from_micros(n)),
        "n" => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

/// Where no method is.
async fn nowhere() -> Response {
    Status::unimplemented("there is no such method").into_http()
}

/// Says of a refusal what gRPC says, whoever refused.
async fn in_its_form(mut response: Response) -> Response {
    if let Some(Refused(error)) = response.extensions().get() {
        response = Status::from(error.clone()).into_http();
    }
    let of_method = response.extensions().get::<Status>().and_then(Error::source).and_then(|source| source.downcast_ref());
    if let Some(error) = of_method.cloned() {
        response.extensions_mut().insert(Refused(error));
    }
    response
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let code = match error.status {
            StatusCode::BAD_REQUEST => Code::InvalidArgument,
            StatusCode::UNAUTHORIZED => Code::Unauthenticated,
            StatusCode::FORBIDDEN => Code::PermissionDenied,
            StatusCode::NOT_FOUND => Code::NotFound,
            StatusCode::REQUEST_TIMEOUT => Code::DeadlineExceeded,
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::TOO_MANY_REQUESTS => Code::ResourceExhausted,
            StatusCode::SERVICE_UNAVAILABLE => Code::Unavailable,
            _ => Code::Internal,
        };
        let message: String = error.to_string().chars().take(LONGEST_MESSAGE).collect();
        let mut status = Self::new(code, message);
        if let Some(seconds) = error.retry_after_s {
            status.metadata_mut().insert("retry-after", MetadataValue::from(seconds));
            // What clients wait for that try again by themselves.
            status.metadata_mut().insert("grpc-retry-pushback-ms", MetadataValue::from(seconds.saturating_mul(1000)));
        }
        status.set_source(Arc::new(error));
        status
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Methods {
    async fn server_live(&self, _: tonic::Request<wire::ServerLiveRequest>) -> Reply<wire::ServerLiveResponse> {
        Ok(tonic::Response::new(wire::ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: tonic::Request<wire::ServerReadyRequest>) -> Reply<wire::ServerReadyResponse> {
        Ok(tonic::Response::new(wire::ServerReadyResponse { ready: self.0.is_ready() }))
    }

    async fn model_ready(&self, request: tonic::Request<wire::ModelReadyRequest>) -> Reply<wire::ModelReadyResponse> {
        let wire::ModelReadyRequest { name, version } = request.into_inner();
        let ready = metadata::is_ready(&self.0, metadata::model(&self.0, &name, &version)?);
        Ok(tonic::Response::new(wire::ModelReadyResponse { ready }))
    }

    async fn server_metadata(&self, _: tonic::Request<wire::ServerMetadataRequest>) -> Reply<wire::ServerMetadataResponse> {
        let ServerMetadata { name, version, extensions } = ServerMetadata::new();
        let extensions = extensions.into_iter().map(str::to_owned).collect();
        Ok(tonic::Response::new(wire::ServerMetadataResponse { name: name.into(), version: version.into(), extensions }))
    }

    async fn model_metadata(&self, request: tonic::Request<wire::ModelMetadataRequest>) -> Reply<wire::ModelMetadataResponse> {
        let wire::ModelMetadataRequest { name, version } = request.into_inner();
        let ModelMetadata { name, versions, platform, inputs, outputs } =
            ModelMetadata::new(metadata::model(&self.0, &name, &version)?);
        let versions = versions.into_iter().map(str::to_owned).collect();
        let told = |tensors: Vec<TensorMetadata>| tensors.into_iter().map(Into::into).collect();
        let (inputs, outputs) = (told(inputs), told(outputs));
        Ok(tonic::Response::new(wire::ModelMetadataResponse { name, versions, platform: platform.into(), inputs, outputs }))
    }

    async fn model_infer(&self, mut request: tonic::Request<ModelInferRequest>) -> Reply<ModelInferResponse> {
        let caller = request.extensions_mut().remove::<Caller>().ok_or_else(ApiError::internal)?;
        let room = request.extensions_mut().remove::<Room>().ok_or_else(ApiError::internal)?;
        let said = request.into_inner();
        let (name, id) = (said.model_name.clone(), said.id.clone());
        metadata::model(&self.0, &name, &said.model_version)?;
        let found = infer(&self.0, caller, read(said, &self.0.config.limits)?, room).await?;
        Ok(answer(name, id, found))
    }
}

impl From<TensorMetadata> for wire::model_metadata_response::TensorMetadata {
    fn from(TensorMetadata { name, datatype, shape }: TensorMetadata) -> Self {
        Self { name: name.into(), datatype: datatype.into(), shape }
    }
}

/// What a request says.
fn read(said: ModelInferRequest, limits: &Limits) -> Result<Inference, ApiError> {
    let ModelInferRequest { model_name: model, parameters, inputs: tensors, outputs: wanted, raw_input_contents: raw, .. } = said;
    if !raw.is_empty() && raw.len() != tensors.len() {
        return Err(ApiError::invalid("there are not as many as there are inputs").about("raw_input_contents"));
    }
    let mut raw = raw.into_iter();
    let mut inputs = Inputs::default();
    for tensor in tensors {
        let (head, elements) = tensor.read(raw.next(), limits)?;
        inputs.add(&head, elements)?;
    }
    let mut outputs = Vec::with_capacity(wanted.len());
    for output in wanted {
        nothing(&output.parameters, &output.name)?;
        outputs.push(output.name);
    }
    let parameters: Result<Map<_, _>, _> = parameters.into_iter().map(parameter).collect();
    Ok(Inference { model, parameters: parameters?, inputs, outputs })
}

impl InferInputTensor {
    /// The tensor, whose elements are its contents or these raw ones.
    fn read(self, raw: Option<Bytes>, limits: &Limits) -> Result<(Head, Elements), ApiError> {
        let Self { name, datatype, shape, parameters, contents } = self;
        let head = Head { name, datatype, shape };
        let n = head.n_elements(limits)?;
        nothing(&parameters, &head.name)?;
        let elements = match (raw, contents) {
            (Some(raw), None) => head.split(&raw, n)?,
            (None, Some(contents)) => Elements::Bytes(head.counted(contents.bytes_contents, n)?),
            _ => return Err(head.wrong("an input has either contents or raw_input_contents")),
        };
        Ok((head, elements))
    }
}

/// No parameters of a tensor are known.
fn nothing(parameters: &HashMap<String, InferParameter>, tensor: &str) -> Result<(), ApiError> {
    match parameters.keys().next() {
        Some(name) => Err(ApiError::unsupported(tensor, format!("there is no such parameter of a tensor: {name}"))),
        None => Ok(()),
    }
}

/// A parameter as JSON has it.
fn parameter((name, value): (String, InferParameter)) -> Result<(String, Value), ApiError> {
    let value = match value.parameter_choice {
        Some(ParameterChoice::BoolParam(value)) => Value::from(value),
        Some(ParameterChoice::Int64Param(value)) => Value::from(value),
        Some(ParameterChoice::Uint64Param(value)) => Value::from(value),
        Some(ParameterChoice::StringParam(value)) => Value::from(value),
        Some(ParameterChoice::DoubleParam(value)) if value.is_finite() => Value::from(value),
        _ => return Err(ApiError::invalid("this parameter has no value, or none that is a number").about(name)),
    };
    Ok((name, value))
}

fn answer(model_name: String, id: String, found: Inferred) -> tonic::Response<ModelInferResponse> {
    let raw_output_contents = found.outputs.iter().map(|output| output.binary().into()).collect();
    let outputs = found.outputs.into_iter().map(told).collect();
    let (model_version, parameters) = (VERSION.to_owned(), HashMap::new());
    let said = ModelInferResponse { model_name, model_version, id, parameters, outputs, raw_output_contents };
    let mut response = tonic::Response::new(said);
    if let Some(timings) = found.spent {
        response.extensions_mut().insert(Spent(timings));
    }
    response
}

/// An output whose elements stand elsewhere.
fn told(output: Output) -> InferOutputTensor {
    let datatype = output.datatype().to_owned();
    let shape = output.shape.into_iter().map(|n| n as i64).collect();
    InferOutputTensor { name: output.name.to_owned(), datatype, shape, ..InferOutputTensor::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_grpc() {
        let parsed = |text: &str| timeout(&HeaderMap::from_iter([(TIMEOUT.parse().unwrap(), text.parse().unwrap())]));
        for (text, time) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("99999999m", Some(Duration::from_millis(99_999_999))),
            ("5u", Some(Duration::from_micros(5))),
            ("6n", Some(Duration::from_nanos(6))),
            ("100000000m", None),
            ("1", None),
            ("S", None),
            ("-1S", None),
            ("1s", None),
            ("", None),
        ] {
            assert_eq!(parsed(text), time, "{text}");
        }
    }

    #[test]
    fn numbers_that_are_none_are_no_parameters() {
        let read = |choice| parameter(("a".into(), InferParameter { parameter_choice: choice }));
        assert_eq!(read(Some(ParameterChoice::DoubleParam(0.5))).unwrap().1, 0.5);
        for choice in [None, Some(ParameterChoice::DoubleParam(f64::NAN)), Some(ParameterChoice::DoubleParam(f64::INFINITY))] {
            assert!(read(choice.clone()).is_err(), "{choice:?}");
        }
    }
}
