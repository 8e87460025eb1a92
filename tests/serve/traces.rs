//! What an OpenTelemetry collector is sent.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::json;

use super::client::{PATIENCE, Server, image_url, picture};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// Takes spans by OTLP over HTTP.
struct Collector {
    url: String,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let spans = Arc::new(Mutex::new(Vec::new()));
        let into = spans.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                while let Some(body) = read(&mut stream) {
                    let sent = ExportTraceServiceRequest::decode(&*body).unwrap().resource_spans;
                    for resource in &sent {
                        let said = &resource.resource.as_ref().unwrap().attributes;
                        assert_eq!(text(said, "service.name"), "blip2");
                    }
                    let scopes = sent.into_iter().flat_map(|resource| resource.scope_spans);
                    into.lock().unwrap().extend(scopes.flat_map(|scope| scope.spans));
                    stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
                }
            }
        });
        Self { url, spans }
    }
}

/// The body of the next request of a connection.
fn read(stream: &mut BufReader<std::net::TcpStream>) -> Option<Vec<u8>> {
    let mut first = String::new();
    stream.read_line(&mut first).ok().filter(|n| *n > 0)?;
    assert!(first.starts_with("POST /v1/traces "), "{first}");
    let mut length = 0;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        let line = line.trim().to_ascii_lowercase();
        if let Some(said) = line.strip_prefix("content-length:") {
            length = said.trim().parse().unwrap();
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    Some(body)
}

fn value(attributes: &[KeyValue], key: &str) -> Value {
    let found = attributes.iter().find(|attribute| attribute.key == key).unwrap_or_else(|| panic!("no {key}: {attributes:?}"));
    found.value.clone().unwrap().value.unwrap()
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    match value(attributes, key) {
        Value::StringValue(text) => text,
        other => panic!("{key}: {other:?}"),
    }
}

fn below<'a>(spans: &'a [Span], parent: &Span) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.parent_span_id == parent.span_id).collect()
}

/// The spans of a request, which is the only one of its route, have these stages.
fn check(spans: &[Span], route: &str, jobs: &[&str], stages: &[&str]) {
    let root = spans.iter().find(|span| span.name == route).unwrap_or_else(|| panic!("no {route}"));
    assert_eq!(value(&root.attributes, "http.response.status_code"), Value::IntValue(200));
    let found = below(spans, root);
    assert_eq!(found.iter().map(|job| &job.name).collect::<Vec<_>>(), jobs, "{route}");
    for job in found {
        let parts = below(spans, job);
        let names: BTreeSet<_> = parts.iter().map(|part| part.name.as_str()).collect();
        assert_eq!(names, stages.iter().copied().collect(), "{route}");
        for part in parts {
            assert_eq!(part.trace_id, root.trace_id);
            assert!(root.start_time_unix_nano <= job.start_time_unix_nano && job.start_time_unix_nano <= part.start_time_unix_nano);
            assert!(part.start_time_unix_nano <= part.end_time_unix_nano && part.end_time_unix_nano <= job.end_time_unix_nano);
            assert!(job.end_time_unix_nano <= root.end_time_unix_nano, "{}: {job:?} {root:?}", part.name);
        }
    }
}

#[test]
fn a_collector_gets_a_span_for_every_request_and_its_stages() {
    let collector = Collector::start();
    let mut server = Server::start(&["--traces", &collector.url]);
    let parent = ("traceparent", format!("00-{TRACE}-00f067aa0ba902b7-01"));
    server.post_with("/caption", &json!({"model": "t5", "images": [picture(0), picture(1)]}), &[(parent.0, &parent.1)]).ok();
    let chat = json!({"model": "vqa-opt", "messages": [{"role": "user", "content": [image_url(0)]}], "stream": true});
    assert_eq!(server.post("/v1/chat/completions", &chat).status, 200);
    server.post("/match", &json!({"images": [picture(2)], "texts": ["a ring"]})).ok();
    server.post("/caption", &json!({"model": "none", "images": [picture(0)]})).refused(404);
    server.signal("-TERM");
    assert!(server.wait().success());

    let spans = collector.spans.lock().unwrap();
    let named: Vec<_> =
        spans.iter().filter(|span| span.trace_id == u128::from_str_radix(TRACE, 16).unwrap().to_be_bytes()).collect();
    assert_eq!(named.iter().filter(|span| span.parent_span_id == 0x00f0_67aa_0ba9_02b7_u64.to_be_bytes()).count(), 1);
    let write = ["queue", "decode_image", "preprocess", "vision", "qformer", "prompt", "waiting", "prefill", "decode"];
    let captions: Vec<Span> = named.into_iter().cloned().collect();
    check(&captions, "POST /caption", &["write t5", "write t5"], &write);
    let job = captions.iter().find(|span| span.name == "write t5").unwrap();
    assert!(matches!(value(&job.attributes, "gen_ai.usage.output_tokens"), Value::IntValue(1..)));
    assert_eq!(text(&job.attributes, "gen_ai.request.model"), "t5");
    check(&spans, "POST /v1/chat/completions", &["write vqa-opt"], &write);
    check(&spans, "POST /match", &["match stage1"], &["queue", "decode_image", "preprocess", "vision", "qformer", "match"]);
    let statuses = spans.iter().filter(|span| span.name == "POST /caption");
    let statuses: Vec<_> = statuses.map(|span| value(&span.attributes, "http.response.status_code")).collect();
    assert!(statuses.contains(&Value::IntValue(404)), "{statuses:?}");
    let said = server.said.lock().unwrap();
    assert!(said.lines().any(|line| line.contains("/caption") && line.contains(TRACE)), "{said}");
}

#[test]
fn a_collector_that_is_not_there_is_said_and_hurts_nobody() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut server = Server::start(&["--traces", &format!("http://{nobody}")]);
    for n in 0..3 {
        server.post("/caption", &json!({"model": "t5", "images": [picture(n)]})).ok();
    }
    server.signal("-TERM");
    assert!(server.wait().success());
    let count = || server.said.lock().unwrap().matches("traces cannot be sent").count();
    let start = Instant::now();
    // What it said is read on a thread of its own.
    while count() == 0 && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(count(), 1, "{}", server.said.lock().unwrap());
}

#[test]
fn nothing_is_traced_unless_it_is_asked_for() {
    let collector = Collector::start();
    let path = std::env::temp_dir().join(format!("blip2-traces-{}.toml", std::process::id()));
    std::fs::write(&path, format!("[traces]\nendpoint = '{}'\nshare = 0.0\n", collector.url)).unwrap();
    let mut server = Server::start(&["--config", path.to_str().unwrap()]);
    std::fs::remove_file(&path).unwrap();
    server.post("/caption", &json!({"model": "t5", "images": [picture(0)]})).ok();
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    server.post_with("/caption", &json!({"model": "t5", "images": [picture(0)]}), &[("traceparent", &parent)]).ok();
    server.signal("-TERM");
    assert!(server.wait().success());
    let spans = collector.spans.lock().unwrap();
    assert!(!spans.is_empty() && spans.iter().all(|span| span.trace_id == u128::from_str_radix(TRACE, 16).unwrap().to_be_bytes()));
}
