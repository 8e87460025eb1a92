//! Models that come and go.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{PATIENCE, Server, at, picture};

#[test]
fn models_are_unloaded_and_loaded_while_others_answer() {
    let server = Server::start(&[]);
    let caption = || server.post("/caption", &json!({"model": "t5", "images": [picture(0)]}));
    let before = caption().ok();
    assert_eq!(server.post("/admin/models/t5/unload", &json!({})).status, 202);
    assert!(caption().refused(503).contains("not loaded"));
    assert_eq!(server.post("/ask", &json!({"model": "vqa-opt", "images": [picture(0)], "question": "what?"})).status, 200);
    // Nobody wants it, so that its absence is no fault.
    assert_eq!(server.get("/health/ready").status, 200);
    assert_eq!(server.post("/admin/models/t5/load", &json!({})).status, 202);
    wait(|| caption().status == 200);
    assert_eq!(caption().ok()["results"][0]["tokens"], before["results"][0]["tokens"]);
    server.post("/admin/models/..%2Ft5/load", &json!({})).refused(404);
}

#[test]
fn controls_have_an_address_of_their_own_where_one_is_named() {
    let server = Server::on(&["tests/bundles/t5"], &["--admin-listen", "127.0.0.1:0"]);
    for path in ["/metrics", "/admin/models/t5/unload"] {
        server.get(path).refused(404);
    }
    assert_eq!(server.get("/health/ready").status, 200);
}

#[test]
fn a_model_that_cannot_be_loaded_is_tried_again_and_the_others_answer() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("mended");
    assert!(Command::new("cp").arg("-r").args([&at("tests/bundles/t5"), &bundle]).status().unwrap().success());
    let tokenizer = bundle.join("tokenizer.json");
    let sound = std::fs::read(&tokenizer).unwrap();
    // As large as it should be, so that only loading finds it out.
    std::fs::write(&tokenizer, vec![b' '; sound.len()]).unwrap();
    let server = Server::begun(&["tests/bundles/vqa-opt", bundle.to_str().unwrap()], &[]);
    let asked = json!({"model": "vqa-opt", "images": [picture(0)], "question": "what?"});
    wait(|| server.post("/ask", &asked).status == 200);
    let caption = || server.post("/caption", &json!({"model": "mended", "images": [picture(0)]}));
    wait(|| caption().refused(503).contains("cannot be loaded"));
    let ready = server.get("/health/ready");
    assert_eq!((ready.status, &ready.json()["models"]["mended"]), (503, &json!("failed")));
    std::fs::write(&tokenizer, sound).unwrap();
    wait(|| caption().status == 200);
    assert_eq!(server.get("/health/ready").status, 200);
}

#[test]
fn what_memory_can_never_hold_is_refused_and_what_fits_is_not() {
    let server = Server::on(&["tests/bundles/t5"], &["--max-cache-bytes", "200kB"]);
    let caption = |beams: usize| server.post("/caption", &json!({"images": [picture(0)], "options": {"beams": beams}}));
    assert!(caption(60).refused(400).contains("of memory"));
    assert_eq!(caption(1).status, 200);
}

fn wait(holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "it does not come to that");
        std::thread::sleep(Duration::from_millis(50));
    }
}
