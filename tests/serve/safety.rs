//! Hostile clients get the right status, learn nothing, and leave the server as it was.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{PATIENCE, Server, at, picture};

static SERVER: LazyLock<Server> = LazyLock::new(|| Server::on(&["tests/bundles/t5"], &[]));

const KEYS: &str = "[alice]\nkey = 'alice-alice-alice'\n[bob]\nkey = 'bob-bob-bob-bob-bob'\nrequests_per_s = 1\n";

fn post(head: &str, body: &[u8]) -> String {
    let head =
        format!("POST /caption HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{head}content-length: {}\r\n\r\n", body.len());
    SERVER.raw(&[head.as_bytes(), body].concat())
}

fn status(said: &str) -> u16 {
    said.split_whitespace().nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("no status: {said}"))
}

const JSON: &str = "content-type: application/json\r\n";

#[test]
fn bodies_that_are_none_are_refused() {
    let deep = format!("{{\"images\": {}", "[".repeat(100_000));
    let cases: [(&str, &[u8], u16); 9] = [
        (JSON, b"", 400),
        (JSON, b"{", 400),
        (JSON, b"\xff\xfe", 400),
        (JSON, b"{\"images\": [], \"nonsense\": 1}", 400),
        (JSON, b"{\"images\": [{\"data\": \"%%%\"}]}", 400),
        (JSON, b"{\"images\": [{\"url\": \"http://127.0.0.1/\"}]}", 400),
        (JSON, deep.as_bytes(), 400),
        ("content-type: text/plain\r\n", b"{}", 415),
        ("content-type: multipart/form-data\r\n", b"{}", 400),
    ];
    for (head, body, wanted) in cases {
        let said = post(head, body);
        assert_eq!(status(&said), wanted, "{said}");
        assert!(said.contains("\"error\"") && !said.contains(".rs") && !said.contains(env!("CARGO_MANIFEST_DIR")), "{said}");
    }
}

#[test]
fn numbers_that_are_none_are_refused() {
    for options in [
        r#"{"temperature": NaN}"#,
        r#"{"beams": -1}"#,
        r#"{"beams": 1e99}"#,
        r#"{"beams": 100000}"#,
        r#"{"max_new_tokens": 0}"#,
        r#"{"sample": true, "temperature": 1e-40}"#,
        r#"{"length_penalty": 1e38, "beams": 3}"#,
        r#"{"log_probs": 100000}"#,
        r#"{"stop": [""]}"#,
        r#"{"num_return": 0}"#,
    ] {
        let body = format!(r#"{{"images": [{}], "options": {options}}}"#, picture(0));
        let said = post(JSON, body.as_bytes());
        assert_eq!(status(&said), 400, "{options}: {said}");
    }
}

#[test]
fn what_is_too_large_is_refused_before_it_is_read() {
    let head = format!("POST /caption HTTP/1.1\r\nhost: localhost\r\n{JSON}content-length: 99999999999\r\n\r\n");
    let start = Instant::now();
    assert_eq!(status(&SERVER.raw(format!("{head}{{").as_bytes())), 413);
    assert!(start.elapsed() < PATIENCE / 4);
    let headers = format!("GET /version HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    assert_eq!(status(&SERVER.raw(headers.as_bytes())), 431);
    let many: String = (0..1000).map(|n| format!("x{n}: y\r\n")).collect();
    assert_eq!(status(&SERVER.raw(format!("GET /version HTTP/1.1\r\nhost: localhost\r\n{many}\r\n").as_bytes())), 431);
}

#[test]
fn a_body_that_grows_when_it_is_unpacked_is_cut_off() {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packer.write_all(br#"{"images": [{"data": ""#).unwrap();
    (0..64).for_each(|_| packer.write_all(&[b'A'; 1 << 20]).unwrap());
    let packed = packer.finish().unwrap();
    assert!(packed.len() < 1 << 20);
    let before = resident();
    assert_eq!(status(&post(&format!("{JSON}content-encoding: gzip\r\n"), &packed)), 413);
    assert!(resident() < before + (200 << 20), "{} → {}", before, resident());
    assert_eq!(status(&post(&format!("{JSON}content-encoding: gzip\r\n"), b"no gzip")), 400);
}

fn resident() -> i64 {
    let counted = SERVER.get("/metrics").text;
    let line = counted.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes ")).unwrap();
    line.parse().unwrap()
}

#[test]
fn pictures_that_are_bombs_are_refused_by_their_headers() {
    // A portable map needs no more than a header to be as large as that.
    let huge = base64(b"P6 60000 60000 255\n");
    let said = SERVER.post("/caption", &json!({"images": [{"data": huge}]})).refused(413);
    assert!(said.contains("60000"), "{said}");
    for bytes in [&b"P6 0 0 255\n"[..], b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0\x08\0\0\0", b"RIFF\0\0\0\0WEBP", b""] {
        SERVER.post("/caption", &json!({"images": [{"data": base64(bytes)}]})).refused(400);
    }
    assert_eq!(SERVER.post("/caption", &json!({"images": [picture(0)]})).status, 200);
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.encode(bytes)
}

#[test]
fn who_sends_slowly_is_cut_off() {
    let server = Server::on(&["tests/bundles/t5"], &["--config", at("tests/serve/impatient.toml").to_str().unwrap()]);
    for beginning in
        ["GET /version HT".to_owned(), format!("POST /caption HTTP/1.1\r\nhost: localhost\r\n{JSON}content-length: 100\r\n\r\n{{")]
    {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(beginning.as_bytes()).unwrap();
        let start = Instant::now();
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        assert!(start.elapsed() < Duration::from_secs(20), "{beginning}");
    }
    assert_eq!(server.get("/version").status, 200);
}

#[test]
fn names_lead_nowhere_else() {
    for path in
        ["/samples/../../Cargo.toml", "/samples/..%2f..%2fCargo.toml", "/samples/%00", "/v1/models/..%2f..", "/page/../keys"]
    {
        let said = SERVER.raw(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes());
        assert_eq!(status(&said), 404, "{path}: {said}");
    }
    SERVER.get("/nowhere").refused(404);
    SERVER.get("/caption").refused(405);
}

#[test]
fn pages_from_elsewhere_cannot_ask() {
    for headers in ["host: evil.example", "host: localhost\r\nsec-fetch-site: cross-site"] {
        let said = SERVER.raw(format!("GET /v1/models HTTP/1.1\r\n{headers}\r\nconnection: close\r\n\r\n").as_bytes());
        assert_eq!(status(&said), 403, "{said}");
    }
}

#[test]
fn only_who_has_a_key_is_let_in() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), KEYS).unwrap();
    let keys = file.path().to_str().unwrap();
    let server = Server::keyed("alice-alice-alice", &["--keys", keys]);
    let with = |header: &str| {
        let said = server.raw(format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{header}\r\n").as_bytes());
        status(&said)
    };
    assert_eq!(with("authorization: Bearer alice-alice-alice\r\n"), 200);
    for header in
        ["", "authorization: Bearer alice-alice-alicf\r\n", "authorization: alice-alice-alice\r\n", "authorization: Bearer\r\n"]
    {
        assert_eq!(with(header), 401, "{header}");
    }
    for path in ["/metrics", "/load", "/version", "/samples", "/openapi.json", "/nowhere", "/admin/models/t5/load"] {
        let said = server.raw(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes());
        assert_eq!(status(&said), 401, "{path}");
    }
    for path in ["/health/live", "/health/ready", "/"] {
        let said = server.raw(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes());
        assert_eq!(status(&said), 200, "{path}");
    }
    let bob: Vec<u16> = (0..3).map(|_| with("authorization: Bearer bob-bob-bob-bob-bob\r\n")).collect();
    assert!(bob.contains(&200) && bob.contains(&429), "{bob:?}");
    let looked = server.post("/images", &json!({"image": picture(0)})).ok();
    std::thread::sleep(Duration::from_millis(1100));
    let body = json!({"images": [{"image_id": looked["image_id"]}]}).to_string();
    let head = format!("POST /caption HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{JSON}content-length: {}\r\n", body.len());
    let asks = |key: &str| status(&server.raw(format!("{head}authorization: Bearer {key}\r\n\r\n{body}").as_bytes()));
    assert_eq!((asks("bob-bob-bob-bob-bob"), asks("alice-alice-alice")), (404, 200));
}

#[test]
fn nobody_from_elsewhere_is_let_in_by_accident() {
    let run = |options: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_blip2"));
        command.args(["serve", "--check", "--model"]).arg(at("tests/bundles/t5")).args(options);
        command.env_remove("BLIP2_MODEL").output().unwrap()
    };
    let open = run(&["--listen", "0.0.0.0:8000"]);
    assert_eq!(open.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&open.stderr).contains("--keys"));
    let checked = run(&["--listen", "0.0.0.0:8000", "--open"]);
    assert!(checked.status.success() && String::from_utf8_lossy(&checked.stdout).contains("max_in_hand = 16"));
}

#[test]
fn damaged_requests_leave_it_as_it_was() {
    damage(&SERVER, 400);
    assert_eq!(SERVER.post("/caption", &json!({"images": [picture(0)]})).status, 200);
}

/// Sends so many requests with a few bytes changed, or without an end.
pub fn damage(server: &Server, n: usize) {
    let chat = json!({"model": "t5", "messages": [{"role": "user", "content": [crate::client::image_url(1)]}], "max_tokens": 3});
    let caption = json!({"model": "t5", "images": [picture(0)], "options": {"beams": 2, "max_new_tokens": 3}});
    let bodies = [caption.to_string(), chat.to_string()];
    let mut state = 1_u64;
    let mut draw = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for round in 0..n {
        let which = round % 2;
        let path = ["/caption", "/v1/chat/completions"][which];
        let mut bytes = bodies[which].clone().into_bytes();
        // Most of a body is its picture, so that half of the damage goes to the rest.
        for _ in 0..1 + draw(4) {
            let place = if draw(2) == 0 { draw(60) } else { draw(bytes.len()) };
            bytes[place] = draw(256) as u8;
        }
        if draw(5) == 0 {
            bytes.truncate(1 + draw(bytes.len() - 1));
        }
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{JSON}content-length: {}\r\n\r\n",
            bytes.len()
        );
        let said = server.raw(&[head.as_bytes(), &bytes].concat());
        assert!([200, 400, 404, 413].contains(&status(&said)), "{said}");
    }
}
