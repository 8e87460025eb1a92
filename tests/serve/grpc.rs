//! The Open Inference Protocol over gRPC, byte by byte: frames, trailers and statuses are looked at, and no library's idea of them.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use serde_json::{Value, json};

use crate::client::{PATIENCE, Server, picture, sample};

#[allow(missing_docs, dead_code, clippy::all, clippy::unwrap_used)]
mod wire {
    include!(concat!(env!("OUT_DIR"), "/inference.rs"));
}

use wire::infer_parameter::ParameterChoice;
use wire::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use wire::{InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse};

static SERVER: LazyLock<Server> = LazyLock::new(|| Server::start(&["--grpc-listen", "127.0.0.1:0"]));

const OK: i32 = 0;
const INVALID_ARGUMENT: i32 = 3;
const DEADLINE_EXCEEDED: i32 = 4;
const NOT_FOUND: i32 = 5;
const RESOURCE_EXHAUSTED: i32 = 8;
const UNIMPLEMENTED: i32 = 12;
const UNAVAILABLE: i32 = 14;
const UNAUTHENTICATED: i32 = 16;

/// What came back: a status, what is said of it, and a message.
#[derive(Debug)]
struct Reply {
    status: i32,
    said: String,
    head: http::HeaderMap,
    trailers: http::HeaderMap,
    body: Vec<u8>,
}

/// How a call is made.
#[derive(Default)]
struct How<'a> {
    headers: &'a [(&'static str, &'a str)],
    /// After so long, the caller goes away.
    patience: Option<Duration>,
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&[0], &u32::try_from(message.len()).unwrap().to_be_bytes()[..], message].concat()
}

/// Sends a body to a method; None if the caller went away.
fn send(server: &Server, method: &str, body: Vec<u8>, how: &How<'_>) -> Option<Reply> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let asked = ask(server, method, body, how.headers);
        tokio::time::timeout(how.patience.unwrap_or(PATIENCE), asked).await.ok()
    })
}

async fn ask(server: &Server, method: &str, body: Vec<u8>, headers: &[(&'static str, &str)]) -> Reply {
    let stream = tokio::net::TcpStream::connect(&server.grpc).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let uri = format!("http://{}/inference.GRPCInferenceService/{method}", server.grpc);
    let mut request = http::Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (response, mut body_stream) = sender.ready().await.unwrap().send_request(request.body(()).unwrap(), false).unwrap();
    // A server may refuse before it has read everything.
    let _ = body_stream.send_data(Bytes::from(body), true);
    let (head, mut received) = response.await.unwrap().into_parts();
    assert_eq!(head.status, 200, "{head:?}");
    assert_eq!(head.headers["content-type"], "application/grpc");
    let mut body = Vec::new();
    while let Some(part) = received.data().await {
        let part = part.unwrap();
        let _ = received.flow_control().release_capacity(part.len());
        body.extend_from_slice(&part);
    }
    // A refusal without a body has its trailers in its head.
    let trailers = received.trailers().await.unwrap().unwrap_or_else(|| head.headers.clone());
    let text = |name: &str| trailers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let status = text("grpc-status").unwrap_or_else(|| panic!("{trailers:?}")).parse().unwrap();
    Reply { status, said: text("grpc-message").unwrap_or_default(), head: head.headers, trailers, body }
}

fn call(server: &Server, method: &str, message: &impl Message) -> Reply {
    send(server, method, framed(&message.encode_to_vec()), &How::default()).unwrap()
}

impl Reply {
    fn ok<T: Message + Default>(&self) -> T {
        assert_eq!(self.status, OK, "{}", self.said);
        assert_eq!(&self.body[..5], &framed(&self.body[5..])[..5], "it is not one frame");
        T::decode(&self.body[5..]).unwrap()
    }
}

fn raw(elements: &[Vec<u8>]) -> Bytes {
    elements.iter().flat_map(|one| [&u32::try_from(one.len()).unwrap().to_le_bytes()[..], one].concat()).collect()
}

fn head(name: &str, n: usize) -> InferInputTensor {
    InferInputTensor {
        name: name.into(),
        datatype: "BYTES".into(),
        shape: vec![i64::try_from(n).unwrap()],
        ..InferInputTensor::default()
    }
}

/// A request whose tensors are in binary form.
fn request(model: &str, inputs: &[(&str, Vec<Vec<u8>>)]) -> ModelInferRequest {
    ModelInferRequest {
        model_name: model.into(),
        id: "a-1".into(),
        inputs: inputs.iter().map(|(name, elements)| head(name, elements.len())).collect(),
        raw_input_contents: inputs.iter().map(|(_, elements)| raw(elements)).collect(),
        ..ModelInferRequest::default()
    }
}

fn with(mut request: ModelInferRequest, parameters: &[(&str, ParameterChoice)]) -> ModelInferRequest {
    let parameter = |choice: &ParameterChoice| InferParameter { parameter_choice: Some(choice.clone()) };
    request.parameters = parameters.iter().map(|(name, choice)| ((*name).to_owned(), parameter(choice))).collect();
    request
}

/// Four beams that write for as long as they may.
fn long() -> ModelInferRequest {
    let n = ParameterChoice::Int64Param;
    with(request("t5", &[("image", vec![sample(0)])]), &[("beams", n(4)), ("max_new_tokens", n(500)), ("min_new_tokens", n(500))])
}

#[test]
fn texts_are_those_of_native_routes() {
    let options = json!({"max_new_tokens": 7, "beams": 3, "length_penalty": 0.5, "stop": ["zz"]});
    let wanted = SERVER.post("/caption", &json!({"model": "t5", "images": [picture(0), picture(1)], "options": options})).ok();
    let wanted: Vec<Vec<u8>> =
        wanted["results"].as_array().unwrap().iter().map(|one| one["text"].as_str().unwrap().as_bytes().to_vec()).collect();
    let parameters = [
        ("max_new_tokens", ParameterChoice::Int64Param(7)),
        ("beams", ParameterChoice::Uint64Param(3)),
        ("length_penalty", ParameterChoice::DoubleParam(0.5)),
        ("stop", ParameterChoice::StringParam("zz".into())),
    ];
    let request = with(request("t5", &[("image", vec![sample(0), sample(1)])]), &parameters);
    let found: ModelInferResponse = call(&SERVER, "ModelInfer", &request).ok();
    assert_eq!((&*found.model_name, &*found.model_version, &*found.id), ("t5", "1", "a-1"));
    let output = &found.outputs[0];
    assert_eq!((&*output.name, &*output.datatype, &output.shape[..], &output.contents), ("text", "BYTES", &[2][..], &None));
    assert_eq!(found.raw_output_contents, [raw(&wanted)]);
    let mut listed = request.clone();
    listed.raw_input_contents.clear();
    listed.inputs[0].contents =
        Some(InferTensorContents { bytes_contents: vec![sample(0).into(), sample(1).into()], ..InferTensorContents::default() });
    listed.model_version = "1".into();
    let one = call(&SERVER, "ModelInfer", &self::request("t5", &[("image", vec![sample(0)])]));
    let timing = one.head["server-timing"].to_str().unwrap();
    assert!(timing.contains("decode;dur=") && timing.contains("total;dur="), "{timing}");
    assert_eq!(call(&SERVER, "ModelInfer", &listed).ok::<ModelInferResponse>(), found);
}

#[test]
fn numbers_are_those_of_native_routes() {
    let texts = ["a red circle", "nothing", "two squares"];
    let wanted = SERVER.post("/match", &json!({"images": [picture(0), picture(1)], "texts": texts})).ok();
    let elements = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    let mut asked = request("stage1", &[("text", elements), ("image", vec![sample(0), sample(1)])]);
    let wish = |name: &str| InferRequestedOutputTensor { name: name.into(), ..InferRequestedOutputTensor::default() };
    asked.outputs = vec![wish("itc_similarity"), wish("itm_probability")];
    let found: ModelInferResponse = call(&SERVER, "ModelInfer", &asked).ok();
    for (place, name) in ["itc_similarity", "itm_probability"].into_iter().enumerate() {
        let (output, bytes) = (&found.outputs[place], &found.raw_output_contents[place]);
        assert_eq!((&*output.name, &*output.datatype, &output.shape[..]), (name, "FP32", &[2, 3][..]));
        assert_eq!(bytes.len(), 24);
        for (place, four) in bytes.chunks(4).enumerate() {
            let wanted = &wanted["results"][place / 3]["matches"][place % 3][name];
            let found = f64::from(f32::from_le_bytes(four.try_into().unwrap()));
            assert!((found - wanted.as_f64().unwrap()).abs() < 1e-4, "{found} {wanted}");
        }
    }
    asked.outputs.truncate(1);
    assert_eq!(call(&SERVER, "ModelInfer", &asked).ok::<ModelInferResponse>().outputs.len(), 1);
}

#[test]
fn the_server_and_its_models_are_described_as_over_http() {
    assert!(call(&SERVER, "ServerLive", &wire::ServerLiveRequest {}).ok::<wire::ServerLiveResponse>().live);
    assert!(call(&SERVER, "ServerReady", &wire::ServerReadyRequest {}).ok::<wire::ServerReadyResponse>().ready);
    let one = wire::ModelReadyRequest { name: "t5".into(), version: "1".into() };
    assert!(call(&SERVER, "ModelReady", &one).ok::<wire::ModelReadyResponse>().ready);
    let server: wire::ServerMetadataResponse = call(&SERVER, "ServerMetadata", &wire::ServerMetadataRequest {}).ok();
    assert_eq!(SERVER.get("/v2").ok(), json!({"name": server.name, "version": server.version, "extensions": server.extensions}));
    for model in ["t5", "stage1", "vqa-opt"] {
        let asked = wire::ModelMetadataRequest { name: model.into(), version: String::new() };
        let told: wire::ModelMetadataResponse = call(&SERVER, "ModelMetadata", &asked).ok();
        let tensors = |all: &[wire::model_metadata_response::TensorMetadata]| -> Value {
            all.iter().map(|one| json!({"name": one.name, "datatype": one.datatype, "shape": one.shape})).collect()
        };
        let (inputs, outputs) = (tensors(&told.inputs), tensors(&told.outputs));
        let told =
            json!({"name": told.name, "versions": told.versions, "platform": told.platform, "inputs": inputs, "outputs": outputs});
        assert_eq!(SERVER.get(&format!("/v2/models/{model}")).ok(), told);
    }
}

#[test]
fn what_makes_no_sense_has_its_status() {
    let sound = || request("t5", &[("image", vec![sample(0)])]);
    let changed = |change: &dyn Fn(&mut ModelInferRequest)| {
        let mut request = sound();
        change(&mut request);
        request
    };
    let wish = InferRequestedOutputTensor { name: "embedding".into(), ..InferRequestedOutputTensor::default() };
    let contents = || Some(InferTensorContents::default());
    let no_number = [("temperature", ParameterChoice::DoubleParam(f64::NAN))];
    let cases = [
        (changed(&|asked| asked.model_name = "t6".into()), NOT_FOUND, "model: there is no model of this name"),
        (changed(&|asked| asked.model_version = "2".into()), NOT_FOUND, "version: "),
        (changed(&|asked| asked.inputs[0].datatype = "UINT8".into()), INVALID_ARGUMENT, "image: this input has the datatype"),
        (changed(&|asked| asked.inputs[0].shape = vec![2]), INVALID_ARGUMENT, "image: the data has not as many"),
        (changed(&|asked| asked.inputs[0].contents = contents()), INVALID_ARGUMENT, "image: an input has either"),
        (changed(&|asked| asked.raw_input_contents.push(Bytes::new())), INVALID_ARGUMENT, "raw_input_contents: "),
        (changed(&|asked| asked.raw_input_contents.clear()), INVALID_ARGUMENT, "image: an input has either"),
        (changed(&|asked| asked.outputs.push(wish.clone())), INVALID_ARGUMENT, "embedding: caption has no such output"),
        (with(sound(), &no_number), INVALID_ARGUMENT, "temperature: this parameter"),
        (request("t5", &[("image", vec![sample(0), b"no picture".to_vec()])]), INVALID_ARGUMENT, "image[1]: the picture"),
        (request("t5", &[("image", vec![b"P6 60000 60000 255\n".to_vec()])]), RESOURCE_EXHAUSTED, "60000"),
        (changed(&|asked| asked.inputs = vec![InferInputTensor::default(); 1000]), INVALID_ARGUMENT, "more fields than"),
    ];
    for (request, status, wanted) in cases {
        let reply = call(&SERVER, "ModelInfer", &request);
        assert!(reply.status == status && decoded(&reply.said).contains(wanted), "{reply:?}, not {status} {wanted}");
    }
    let bytes = |method: &str, body: Vec<u8>| send(&SERVER, method, body, &How::default()).unwrap().status;
    assert_eq!(bytes("ModelStreamInfer", framed(&[])), UNIMPLEMENTED);
    assert_eq!(bytes("ModelInfer", framed(&vec![0; 33 << 20])), RESOURCE_EXHAUSTED);
    assert_eq!(bytes("ModelInfer", vec![0; 3]), INVALID_ARGUMENT);
    assert_eq!(bytes("ModelInfer", [framed(&sound().encode_to_vec()), framed(&[])].concat()), INVALID_ARGUMENT);
    assert_ne!(bytes("ModelInfer", framed(&[0xff; 64])), OK);
    assert_eq!(call(&SERVER, "ModelInfer", &sound()).status, OK);
    let counted = SERVER.get("/metrics").text;
    let label = |status: u16| format!("route=\"/inference.GRPCInferenceService/ModelInfer\",status=\"{status}\"");
    assert!(counted.contains(&label(200)) && counted.contains(&label(400)) && counted.contains(&label(404)), "{counted}");
}

/// As gRPC writes texts in headers.
fn decoded(said: &str) -> String {
    said.replace("%20", " ").replace("%5B", "[").replace("%5D", "]").replace("%60", "`")
}

#[test]
fn only_health_is_told_without_a_key() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[alice]\nkey = 'alice-alice-alice'").unwrap();
    let options = ["--grpc-listen", "127.0.0.1:0", "--keys", file.path().to_str().unwrap()];
    let server = Server::keyed("alice-alice-alice", &options);
    let asks = |method: &str, header: &str| {
        let body = match method {
            "ModelInfer" => request("t5", &[("image", vec![sample(0)])]).encode_to_vec(),
            "ModelReady" | "ModelMetadata" => wire::ModelReadyRequest { name: "t5".into(), ..Default::default() }.encode_to_vec(),
            _ => Vec::new(),
        };
        send(&server, method, framed(&body), &How { headers: &[("authorization", header)], patience: None }).unwrap().status
    };
    for method in ["ServerLive", "ServerReady", "ModelReady"] {
        assert_eq!(asks(method, ""), OK, "{method}");
    }
    for method in ["ServerMetadata", "ModelMetadata", "ModelInfer"] {
        let found = ["", "Bearer alice-alice-alicf", "Bearer alice-alice-alice"].map(|header| asks(method, header));
        assert_eq!(found, [UNAUTHENTICATED, UNAUTHENTICATED, OK], "{method}");
    }
}

#[test]
fn who_comes_when_all_is_full_is_told_when_to_come_again() {
    let server = Server::on(&["tests/bundles/t5"], &["--grpc-listen", "127.0.0.1:0", "--max-in-hand", "1"]);
    std::thread::scope(|threads| {
        let first = threads.spawn(|| call(&server, "ModelInfer", &long()));
        server.wait_in_hand(|n| n == 1);
        let refused = call(&server, "ModelInfer", &request("t5", &[("image", vec![sample(0)])]));
        assert_eq!(refused.status, RESOURCE_EXHAUSTED, "{refused:?}");
        let seconds: u64 = refused.trailers["retry-after"].to_str().unwrap().parse().unwrap();
        let ms: u64 = refused.trailers["grpc-retry-pushback-ms"].to_str().unwrap().parse().unwrap();
        assert!((1..=60).contains(&seconds) && ms == seconds * 1000);
        first.join().unwrap().ok::<ModelInferResponse>();
    });
    assert!(server.get("/metrics").text.contains("blip2_requests_rejected_total{reason=\"overloaded\"}"));
}

#[test]
fn work_stops_when_the_time_is_over_and_when_callers_go_away() {
    let server = Server::on(&["tests/bundles/t5"], &["--grpc-listen", "127.0.0.1:0", "--max-in-hand", "40"]);
    let body = framed(&long().encode_to_vec());
    // So many at once that none could be done by then.
    let give_up = |how: &How<'_>| {
        std::thread::scope(|threads| {
            let asked: Vec<_> = (0..12).map(|_| threads.spawn(|| send(&server, "ModelInfer", body.clone(), how))).collect();
            server.wait_in_hand(|n| n > 0);
            asked.into_iter().map(|one| one.join().unwrap()).collect::<Vec<_>>()
        })
    };
    let late = give_up(&How { headers: &[("grpc-timeout", "150m")], patience: None });
    let n_late = late.iter().flatten().filter(|reply| reply.status == DEADLINE_EXCEEDED).count();
    let start = Instant::now();
    server.wait_in_hand(|n| n == 0);
    let gone = give_up(&How { headers: &[], patience: Some(Duration::from_millis(150)) });
    let n_gone = gone.iter().filter(|reply| reply.is_none()).count();
    server.wait_in_hand(|n| n == 0);
    assert!(n_late > 0 && n_gone > 0 && start.elapsed() < Duration::from_secs(10), "{n_late} {n_gone} {:?}", start.elapsed());
    assert_eq!(call(&server, "ModelInfer", &request("t5", &[("image", vec![sample(0)])])).status, OK);
}

#[test]
fn a_signal_ends_what_runs_and_nothing_is_lost() {
    let mut server = Server::on(&["tests/bundles/t5"], &["--grpc-listen", "127.0.0.1:0"]);
    std::thread::scope(|threads| {
        let running: Vec<_> = (0..3).map(|_| threads.spawn(|| call(&server, "ModelInfer", &long()))).collect();
        server.wait_in_hand(|n| n == 3);
        server.signal("-TERM");
        for one in running {
            assert_eq!(one.join().unwrap().ok::<ModelInferResponse>().outputs[0].shape, [1]);
        }
    });
    assert!(server.wait().success());
}

#[test]
fn a_model_that_is_not_loaded_is_unavailable() {
    let server = Server::on(&["tests/bundles/t5"], &["--grpc-listen", "127.0.0.1:0"]);
    assert_eq!(server.post("/admin/models/t5/unload", &json!({})).status, 202);
    let one = wire::ModelReadyRequest { name: "t5".into(), version: String::new() };
    assert!(!call(&server, "ModelReady", &one).ok::<wire::ModelReadyResponse>().ready);
    assert_eq!(call(&server, "ModelInfer", &request("t5", &[("image", vec![sample(0)])])).status, UNAVAILABLE);
}
