//! What takes minutes, or needs a machine for itself: `make promises`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Server, image_url, picture};
use crate::safety::damage;

/// As many as the server's default and its line hold, and more.
const CLIENTS: usize = 96;

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

/// On the demo, or the bundle that PROMISES_MODEL names.
fn measured(options: &[&str]) -> Server {
    let threads = std::thread::available_parallelism().unwrap().to_string();
    let model = std::env::var("PROMISES_MODEL").unwrap_or_else(|_| "models/demo-opt".into());
    Server::behind(&[&model], &[&["--cache-bytes", "0", "--log", "error", "--threads", &threads], options].concat())
}

/// About a picture that has to be looked at.
fn caption(n: usize) -> Value {
    text_of(picture(n % 6), 30)
}

/// About pictures that were looked at before, so that nothing but writing is left.
fn writing(server: &Server, n_tokens: usize) -> Vec<Value> {
    let looked = |n| server.post("/images", &json!({"image": picture(n)})).ok()["image_id"].clone();
    (0..6).map(|n| text_of(json!({"image_id": looked(n)}), n_tokens)).collect()
}

fn text_of(picture: Value, n_tokens: usize) -> Value {
    json!({"images": [picture], "options": {"beams": 1, "max_new_tokens": n_tokens, "min_new_tokens": n_tokens}})
}

/// How long a rate is offered: PROMISES_SECONDS, by default 20, in which the demo answers a thousand.
fn patience() -> Duration {
    Duration::from_secs(std::env::var("PROMISES_SECONDS").map_or(20, |seconds| seconds.parse().unwrap()))
}

/// Milliseconds that a hundredth of exchanges takes longer than, of a byte for a byte between two threads that do nothing else: what this
/// machine takes to wake somebody while the server works.
fn floor(while_: &AtomicBool) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut asker = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut answerer, _) = listener.accept().unwrap();
    let answers = std::thread::spawn(move || {
        let mut byte = [0];
        while answerer.read_exact(&mut byte).is_ok() {
            answerer.write_all(&byte).unwrap();
        }
    });
    let mut times = Vec::new();
    while while_.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(10));
        let start = Instant::now();
        asker.write_all(&[1]).unwrap();
        asker.read_exact(&mut [0]).unwrap();
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    drop(asker);
    answers.join().unwrap();
    Found::quantile(&mut times, 0.99)
}

/// Milliseconds of the answered and of the refused; of the answered what no stage accounts for, and what of that is not on the server's own
/// clock, which runs from a request's headers to its answer.
#[derive(Default)]
struct Found {
    answered: Vec<f64>,
    refused: Vec<f64>,
    added: Vec<f64>,
    outside: Vec<f64>,
}

impl Found {
    fn quantile(times: &mut [f64], share: f64) -> f64 {
        times.sort_by(f64::total_cmp);
        times[((times.len() as f64 * share) as usize).min(times.len() - 1)]
    }
}

/// Clients that ask one after another for so long; answers a second.
fn capacity(server: &Server, n_clients: usize, time: Duration, bodies: &[Value]) -> f64 {
    let (start, n) = (Instant::now(), AtomicUsize::new(0));
    std::thread::scope(|threads| {
        for client in 0..n_clients {
            let n = &n;
            threads.spawn(move || {
                while start.elapsed() < time {
                    assert_eq!(server.post("/caption", &bodies[client % bodies.len()]).status, 200);
                    n.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    n.into_inner() as f64 / start.elapsed().as_secs_f64()
}

/// Requests at even gaps, whether or not earlier ones have ended. Latency counts from when each was due.
fn offered(server: &Server, rate: f64, time: Duration) -> Found {
    let (start, next, found) = (Instant::now(), AtomicUsize::new(0), Mutex::new(Found::default()));
    let n = (rate * time.as_secs_f64()) as usize;
    // What the clients take of the machine is taken from the server.
    let bodies: Vec<Vec<u8>> = captions().iter().map(|body| body.to_string().into_bytes()).collect();
    std::thread::scope(|threads| {
        for _ in 0..CLIENTS {
            threads.spawn(|| {
                while let Some(place) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|place| *place < n) {
                    let due = start + Duration::from_secs_f64(place as f64 / rate);
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    let sent = Instant::now();
                    let reply = server.post_bytes("/caption", &bodies[place % bodies.len()], &JSON);
                    let (from_due, from_sent) = (due.elapsed().as_secs_f64() * 1e3, sent.elapsed().as_secs_f64() * 1e3);
                    let mut found = found.lock().unwrap();
                    match reply.status {
                        200 => {
                            let total = reply.json()["results"][0]["timings_ms"]["total"].as_f64().unwrap();
                            found.answered.push(from_due);
                            found.added.push(from_sent - total);
                            let (_, by_server) = reply.header("server-timing").rsplit_once("total;dur=").unwrap();
                            found.outside.push(from_sent - by_server.parse::<f64>().unwrap());
                        }
                        429 => found.refused.push(from_sent),
                        _ => panic!("{reply:?}"),
                    }
                }
            });
        }
    });
    found.into_inner().unwrap()
}

fn resident(server: &Server) -> f64 {
    let counted = server.get("/metrics").text;
    counted.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes ")).unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs a machine for itself: `make promises`"]
fn three_times_too_much_leaves_the_admitted_as_quick_as_before() {
    let (server, time) = (measured(&[]), patience());
    let sixteen = capacity(&server, 16, time / 2, &captions());
    // Everything that it ever holds at once has been held then.
    offered(&server, 3.0 * sixteen, time / 2);
    let before = resident(&server);
    let (mut most, mut over) = (offered(&server, 0.8 * sixteen, time), offered(&server, 3.0 * sixteen, time));
    let after = resident(&server);
    let usual = Found::quantile(&mut most.answered, 0.99);
    let (admitted, refusal) = (Found::quantile(&mut over.answered, 0.99), Found::quantile(&mut over.refused, 0.99));
    println!("p99 at 80 % {usual:.1} ms, at 300 % {admitted:.1} ms ({:.2} times), refusals {refusal:.1} ms", admitted / usual);
    println!(
        "{} of {} were refused; memory {:.3} times",
        over.refused.len(),
        over.refused.len() + over.answered.len(),
        after / before
    );
    assert!(admitted <= 1.5 * usual && refusal <= 10.0 && after <= 1.05 * before);
}

fn captions() -> Vec<Value> {
    (0..6).map(caption).collect()
}

#[test]
#[ignore = "needs a machine for itself: `make promises`"]
fn sixteen_clients_get_more_than_one() {
    let (server, time) = (measured(&[]), patience() / 2);
    let writing = writing(&server, 60);
    let measured =
        [("captions", captions(), 1.5), ("texts about pictures seen before", writing, 2.0)].map(|(what, bodies, least)| {
            let (one, sixteen) = (capacity(&server, 1, time, &bodies), capacity(&server, 16, time, &bodies));
            println!("{what}: 1 client {one:.1}/s, 16 clients {sixteen:.1}/s ({:.2} times)", sixteen / one);
            (what, sixteen / one, least)
        });
    for (what, times, least) in measured {
        assert!(times >= least, "{what}: {times:.2} times");
    }
}

/// Milliseconds until a text's first piece comes, and until its next one.
fn first_piece(server: &Server, n: usize) -> (f64, f64) {
    let mut body = caption(n);
    body["stream"] = true.into();
    let start = Instant::now();
    let mut lines = BufReader::new(server.send_only("/caption", &body)).lines().map_while(Result::ok);
    let mut pieces = lines.by_ref().filter(|line| line.starts_with("data: {\"text\"")).map(|_| start.elapsed().as_secs_f64() * 1e3);
    let first = pieces.next().unwrap();
    let next = pieces.next().unwrap();
    (first, next - first)
}

fn median(mut times: Vec<f64>) -> f64 {
    Found::quantile(&mut times, 0.5)
}

#[test]
#[ignore = "needs a machine for itself: `make promises`"]
fn it_is_ready_soon_adds_little_and_lets_a_new_text_in_beside_others() {
    let start = Instant::now();
    let server = measured(&[]);
    let ready = start.elapsed().as_secs_f64();
    let half = 0.5 * capacity(&server, 16, patience() / 4, &captions());
    let works = AtomicBool::new(true);
    let (mut found, floor) = std::thread::scope(|threads| {
        let floor = threads.spawn(|| floor(&works));
        let found = offered(&server, half, patience());
        works.store(false, Ordering::Relaxed);
        (found, floor.join().unwrap())
    });
    let (usual, added) = (Found::quantile(&mut found.added, 0.5), Found::quantile(&mut found.added, 0.99));
    let (usual_outside, outside) = (Found::quantile(&mut found.outside, 0.5), Found::quantile(&mut found.outside, 0.99));
    let (alone, _): (Vec<f64>, Vec<f64>) = (0..40).map(|n| first_piece(&server, n)).unzip();
    let (is_over, writing) = (AtomicBool::new(false), writing(&server, 90));
    let (beside, steps): (Vec<f64>, Vec<f64>) = std::thread::scope(|threads| {
        for client in 0..8 {
            let (server, is_over, writing) = (&server, &is_over, &writing);
            threads.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    assert_eq!(server.post("/caption", &writing[client % writing.len()]).status, 200);
                }
            });
        }
        let found = (0..40).map(|n| first_piece(&server, n)).unzip();
        is_over.store(true, Ordering::Relaxed);
        found
    });
    let (alone, beside, step) = (median(alone), median(beside), median(steps));
    println!("ready after {ready:.2} s; added by the server at half load: {usual:.2} ms, p99 {added:.2} ms");
    println!("of that outside its own clock: {usual_outside:.2} ms, p99 {outside:.2} ms; a bare exchange {floor:.2} ms");
    println!("first piece alone {alone:.2} ms, beside 8 others {beside:.2} ms, a step then {step:.2} ms");
    assert!(ready <= 1.0 && added <= 2.0 && beside <= 2.0 * alone + step);
}

/// Milliseconds between the pieces of a text.
fn gaps(server: &Server, n: usize, mut after_first: impl FnMut()) -> Vec<f64> {
    let mut body = caption(n);
    body["stream"] = true.into();
    let lines = BufReader::new(server.send_only("/caption", &body)).lines().map_while(Result::ok);
    let (mut last, mut gaps) = (None, Vec::new());
    // The connection stays open behind the last piece.
    for _ in lines.filter(|line| line.starts_with("data: ")).take_while(|line| line.starts_with("data: {\"text\"")) {
        let now = Instant::now();
        match last.replace(now) {
            Some(last) => gaps.push((now - last).as_secs_f64() * 1e3),
            None => after_first(),
        }
    }
    gaps
}

/// The longest stage of these names among answers, in milliseconds.
fn longest(answers: &[Value], stages: &[&str]) -> f64 {
    let of = |answer: &Value| {
        let timings = &answer["results"][0]["timings_ms"];
        stages.iter().filter_map(|stage| timings[*stage].as_f64()).sum::<f64>()
    };
    answers.iter().map(of).fold(0.0, f64::max)
}

#[test]
#[ignore = "needs a machine for itself: `make promises`"]
fn a_storm_of_pictures_stalls_a_running_text_for_a_bounded_time() {
    let server = measured(&[]);
    let alone: Vec<f64> = (0..10).flat_map(|n| gaps(&server, n, || ())).collect();
    let (mut beside, mut answers) = (Vec::new(), Vec::new());
    for round in 0..10 {
        std::thread::scope(|threads| {
            let mut storm = Vec::new();
            beside.extend(gaps(&server, round, || {
                storm.extend((0..16).map(|n| {
                    threads.spawn({
                        let server = &server;
                        move || server.post("/caption", &caption(n)).ok()
                    })
                }));
            }));
            answers.extend(storm.into_iter().map(|one| one.join().unwrap()));
        });
    }
    let (look, read, step) = (longest(&answers, &["vision", "qformer"]), longest(&answers, &["prefill"]), median(beside.clone()));
    let stall = Found::quantile(&mut beside, 1.0);
    println!("a step alone {:.2} ms, beside 16 others {step:.2} ms; the longest stall {stall:.2} ms", median(alone));
    println!("looking at a batch of theirs took at most {look:.2} ms, reading their prompts {read:.2} ms");
    assert!(stall <= look + read + step);
}

#[test]
#[ignore = "takes minutes: `make promises`"]
fn a_hundred_thousand_damaged_requests_leave_it_as_it_was() {
    let n: usize = std::env::var("FUZZ_REQUESTS").map_or(100_000, |n| n.parse().unwrap());
    let server = Server::on(&["tests/bundles/t5"], &["--log", "error"]);
    let before = resident(&server);
    damage(&server, n);
    println!("memory {:.3} times", resident(&server) / before);
    assert_eq!(server.post("/caption", &json!({"images": [picture(0)]})).status, 200);
}

#[test]
#[ignore = "takes half an hour: `make promises`"]
fn half_an_hour_of_mixed_load_with_faults_loses_nothing() {
    let minutes: f64 = std::env::var("SOAK_MINUTES").map_or(30.0, |minutes| minutes.parse().unwrap());
    let time = Duration::from_secs_f64(minutes * 60.0);
    let server = Server::start(&["--log", "error", "--max-in-hand", "24"]);
    let (start, is_over) = (Instant::now(), AtomicBool::new(false));
    let (answered, refused, gone) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let mut sizes = Vec::new();
    std::thread::scope(|threads| {
        for client in 0..8 {
            let (server, is_over, answered, refused, gone) = (&server, &is_over, &answered, &refused, &gone);
            threads.spawn(move || {
                let mut n = client;
                while !is_over.load(Ordering::Relaxed) {
                    n += 8;
                    match soaked(server, n) {
                        Some(200) => answered.fetch_add(1, Ordering::Relaxed),
                        Some(429) => refused.fetch_add(1, Ordering::Relaxed),
                        Some(status) => panic!("status {status}"),
                        None => gone.fetch_add(1, Ordering::Relaxed),
                    };
                }
            });
        }
        while start.elapsed() < time {
            std::thread::sleep(time / 60);
            sizes.push(resident(&server));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    server.wait_in_hand(|n| n == 0);
    let (answered, refused, gone) = (answered.into_inner(), refused.into_inner(), gone.into_inner());
    let counted = answers_counted(&server);
    let (warm, last) = (sizes[sizes.len() / 6], sizes[sizes.len() - 1]);
    println!("{answered} answered, {refused} refused, {gone} damaged or gone; memory {:.0} → {:.0} MB", warm / 1e6, last / 1e6);
    assert!((answered..=answered + gone).contains(&counted), "{counted} were counted by the server");
    assert!(last <= 1.1 * warm, "{sizes:?}");
}

/// Good answers to requests about pictures.
fn answers_counted(server: &Server) -> usize {
    let counted = server.get("/metrics").text;
    let good = counted.lines().filter(|line| line.starts_with("blip2_requests_total{") && line.contains("status=\"200\""));
    let asked = good.filter(|line| ["/caption\"", "/match\"", "/completions\""].iter().any(|route| line.contains(route)));
    asked.map(|line| line.rsplit(' ').next().unwrap().parse::<usize>().unwrap()).sum()
}

/// One of many kinds of requests; its status, unless its client went away. What is answered is what was asked for.
fn soaked(server: &Server, n: usize) -> Option<u16> {
    let tokens = 2 + n % 40;
    let options = json!({"beams": 1 + n % 3, "max_new_tokens": tokens});
    let caption = json!({"model": "t5", "images": [picture(n % 5)], "options": options});
    match n % 11 {
        0 => {
            let stream = server.send_only("/caption", &caption);
            std::thread::sleep(Duration::from_millis((n % 30) as u64));
            drop(stream);
            None
        }
        1 => Some(server.post("/caption", &json!({"images": [{"data": "AAAA"}]})))
            .filter(|reply| reply.status != 400)
            .map(|reply| reply.status),
        2 => Some(server.post("/match", &json!({"images": [picture(n % 5)], "texts": ["a", "b"]})).status),
        3 => {
            let content = json!([image_url(n % 5), {"type": "text", "text": "what?"}]);
            Some(
                server
                    .post("/v1/chat/completions", &json!({"model": "vqa-opt", "messages": [{"role": "user", "content": content}]}))
                    .status,
            )
        }
        _ => {
            let reply = server.post("/caption", &caption);
            if reply.status == 200 {
                assert!(reply.json()["results"][0]["tokens"].as_array().unwrap().len() <= tokens);
            }
            Some(reply.status)
        }
    }
}
