//! Many at once: the same answers, quick refusals, nothing left behind.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{PATIENCE, Reply, Server, image_url, picture};

/// A request of every kind, some of them drawn from the number.
fn request(n: usize) -> (&'static str, Value) {
    let tokens = 3 + n % 9;
    match n % 6 {
        0 => ("/caption", json!({"model": "t5", "images": [picture(n % 5)], "options": {"beams": 1, "max_new_tokens": tokens}})),
        1 => (
            "/caption",
            json!({"model": "t5", "images": [picture(n % 5)], "options": {"beams": 2 + n % 3, "max_new_tokens": tokens}}),
        ),
        2 => ("/ask", json!({"model": "vqa-opt", "images": [picture(n % 5)], "question": format!("is it {}?", n % 7)})),
        3 => ("/match", json!({"images": [picture(n % 5)], "texts": ["a red circle", format!("{} squares", n % 7)]})),
        4 => {
            let options = json!({"sample": true, "temperature": 2.0, "seed": n % 11, "max_new_tokens": tokens});
            ("/caption", json!({"model": "vqa-opt", "images": [picture(n % 5)], "options": options}))
        }
        _ => {
            let content = json!([image_url(n % 5), {"type": "text", "text": "what is it?"}]);
            (
                "/v1/chat/completions",
                json!({"model": "t5", "messages": [{"role": "user", "content": content}], "max_tokens": tokens}),
            )
        }
    }
}

/// What of an answer must be the same every time.
fn essence(path: &str, reply: &Reply) -> Value {
    let found = reply.ok();
    match path {
        "/v1/chat/completions" => found["choices"].clone(),
        "/match" => {
            let matches = found["results"][0]["matches"].as_array().unwrap();
            // Pairs beside others are computed in another order.
            matches.iter().map(|found| (found["itm_probability"].as_f64().unwrap() * 1e3).round()).collect()
        }
        _ => found["results"].as_array().unwrap().iter().map(|result| result["tokens"].clone()).collect(),
    }
}

#[test]
fn answers_are_the_same_alone_and_in_company() {
    const N: usize = 500;
    const CLIENTS: usize = 12;
    // Nothing is kept, so that every picture is looked at beside others.
    let server = Server::start(&["--max-in-hand", "64", "--cache-bytes", "0"]);
    let kinds: Vec<_> = (0..60).map(request).collect();
    let alone: Vec<Value> = kinds.iter().map(|(path, body)| essence(path, &server.post(path, body))).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|threads| {
        for _ in 0..CLIENTS {
            threads.spawn(|| {
                while let Some(n) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|n| *n < N) {
                    let place = n * 7 % kinds.len();
                    let (path, body) = &kinds[place];
                    assert_eq!(essence(path, &server.post(path, body)), alone[place], "{path} {body}");
                }
            });
        }
    });
    assert_eq!(server.in_hand(), 0);
}

#[test]
fn more_than_may_be_in_hand_is_refused_at_once() {
    let server = Server::start(&["--max-in-hand", "3"]);
    let long =
        json!({"model": "t5", "images": [picture(0)], "options": {"beams": 4, "max_new_tokens": 500, "min_new_tokens": 500}});
    let (refused, answered) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|threads| {
        for _ in 0..16 {
            threads.spawn(|| {
                for _ in 0..4 {
                    let reply = server.post("/caption", &long);
                    match reply.status {
                        429 => {
                            let seconds: u64 = reply.header("retry-after").parse().unwrap();
                            assert!((1..=60).contains(&seconds));
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                        _ => drop((reply.ok(), answered.fetch_add(1, Ordering::Relaxed))),
                    }
                }
            });
        }
    });
    assert!(refused.into_inner() > 0 && answered.into_inner() > 0);
    assert!(server.get("/metrics").text.contains("blip2_requests_rejected_total{reason=\"overloaded\"}"));
    assert_eq!(server.in_hand(), 0);
}

#[test]
fn work_stops_when_clients_go_away() {
    const N: usize = 300;
    let server = Server::start(&["--max-in-hand", "16"]);
    let body =
        |n: usize| json!({"model": "t5", "images": [picture(n % 5)], "options": {"beams": 1 + n % 4, "max_new_tokens": 400}});
    for n in 0..N {
        let stream = server.send_only("/caption", &body(n));
        std::thread::sleep(Duration::from_micros((n as u64 * 7919) % 6000));
        drop(stream);
    }
    let start = Instant::now();
    server.wait_in_hand(|n| n == 0);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(server.post("/caption", &json!({"model": "t5", "images": [picture(0)]})).status, 200);
}

#[test]
fn a_signal_ends_what_runs_and_nothing_is_lost() {
    let mut server = Server::start(&[]);
    let long =
        json!({"model": "t5", "images": [picture(0)], "options": {"beams": 3, "max_new_tokens": 400, "min_new_tokens": 400}});
    std::thread::scope(|threads| {
        let running: Vec<_> = (0..4).map(|_| threads.spawn(|| server.post("/caption", &long).ok())).collect();
        server.wait_in_hand(|n| n == 4);
        server.signal("-TERM");
        let texts: Vec<Value> = running.into_iter().map(|one| one.join().unwrap()["results"][0]["tokens"].clone()).collect();
        assert!(texts.iter().all(|tokens| *tokens == texts[0] && !tokens.as_array().unwrap().is_empty()));
    });
    assert!(server.wait().success());
}

#[test]
fn in_the_time_of_grace_it_is_not_ready_and_answers() {
    let mut server = Server::start(&["--grace", "3"]);
    let start = Instant::now();
    server.signal("-TERM");
    while server.get("/health/ready").status == 200 {
        assert!(start.elapsed() < Duration::from_secs(2), "it is still ready");
    }
    assert_eq!(server.get("/v2/models/t5/ready").status, 503);
    // Each on a connection of its own.
    for _ in 0..3 {
        assert!(server.raw(&written("/caption", &json!({"model": "t5", "images": [picture(0)]}))).starts_with("HTTP/1.1 200 "));
    }
    assert!(server.wait().success());
    assert!(start.elapsed() >= Duration::from_secs(3));
}

#[test]
fn a_second_signal_ends_the_time_of_grace() {
    let mut server = Server::start(&["--grace", "600"]);
    server.signal("-TERM");
    while server.get("/health/ready").status == 200 {
        std::thread::sleep(Duration::from_millis(10));
    }
    server.signal("-TERM");
    let start = Instant::now();
    assert!(server.wait().success() && start.elapsed() < PATIENCE / 6);
}

/// A request that ends its connection.
fn written(path: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let length = body.len();
    let head = "host: localhost\r\nconnection: close\r\ncontent-type: application/json";
    format!("POST {path} HTTP/1.1\r\n{head}\r\ncontent-length: {length}\r\n\r\n{body}").into_bytes()
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut server = Server::start(&["--drain", "600"]);
    let slow = "POST /caption HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n";
    let mut stream = std::net::TcpStream::connect(&server.address).unwrap();
    std::io::Write::write_all(&mut stream, slow.as_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    server.signal("-TERM");
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    server.signal("-TERM");
    assert!(server.wait().success() && start.elapsed() < PATIENCE / 6);
}
