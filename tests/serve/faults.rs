//! Models that come and go.

use serde_json::json;

use crate::client::{Server, picture};

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
    let start = std::time::Instant::now();
    while caption().status != 200 {
        assert!(start.elapsed() < crate::client::PATIENCE, "it is not loaded again");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
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
