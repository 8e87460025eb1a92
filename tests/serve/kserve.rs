//! The Open Inference Protocol says what native routes say.

use std::sync::LazyLock;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::client::{Reply, Server, picture, sample};

static SERVER: LazyLock<Server> = LazyLock::new(|| Server::start(&[]));
const LENGTH: &str = "inference-header-content-length";

fn encoded(n: usize) -> String {
    BASE64_STANDARD.encode(sample(n))
}

fn tensor(name: &str, data: &[&str]) -> Value {
    json!({"name": name, "datatype": "BYTES", "shape": [data.len()], "data": data})
}

fn images(numbers: &[usize]) -> Value {
    let all: Vec<String> = numbers.iter().map(|n| encoded(*n)).collect();
    tensor("image", &all.iter().map(String::as_str).collect::<Vec<_>>())
}

fn infer(model: &str, body: &Value) -> Reply {
    SERVER.post(&format!("/v2/models/{model}/infer"), body)
}

/// The data of an output of this type and shape.
fn data(found: &Value, name: &str, datatype: &str, shape: &[usize]) -> Vec<Value> {
    let output = found["outputs"].as_array().unwrap().iter().find(|output| output["name"] == name).unwrap();
    assert_eq!((&output["datatype"], &output["shape"]), (&json!(datatype), &json!(shape)), "{output}");
    output["data"].as_array().unwrap().clone()
}

/// What the protocol says of a refusal.
fn refused(reply: &Reply, status: u16) -> String {
    assert_eq!(reply.status, status, "{}", reply.text);
    assert_eq!(reply.header("content-type"), "application/json");
    let said = reply.json();
    assert_eq!(said.as_object().unwrap().len(), 1, "{said}");
    said["error"].as_str().unwrap_or_else(|| panic!("{said}")).to_owned()
}

/// A tensor in binary form.
fn binary(elements: &[Vec<u8>]) -> Vec<u8> {
    elements.iter().flat_map(|one| [&u32::try_from(one.len()).unwrap().to_le_bytes()[..], one].concat()).collect()
}

/// Tensors of these elements behind JSON that announces them.
fn post_binary(model: &str, inputs: &[(&str, Vec<Vec<u8>>)], rest: Value) -> Reply {
    let mut body = rest;
    let parts: Vec<Vec<u8>> = inputs.iter().map(|(_, elements)| binary(elements)).collect();
    let announced = inputs.iter().zip(&parts).map(|((name, elements), part)| {
        json!({"name": name, "datatype": "BYTES", "shape": [elements.len()], "parameters": {"binary_data_size": part.len()}})
    });
    body["inputs"] = announced.collect();
    let head = body.to_string();
    let whole = [head.as_bytes(), &parts.concat()].concat();
    SERVER.post_bytes(&format!("/v2/models/{model}/infer"), &whole, &[(LENGTH, &head.len().to_string())])
}

#[test]
fn the_server_and_its_models_are_described() {
    let server = SERVER.get("/v2").ok();
    assert_eq!((&server["name"], &server["extensions"]), (&json!("blip2"), &json!(["binary_tensor_data"])));
    let bytes = |name: &str, n: i64| json!({"name": name, "datatype": "BYTES", "shape": [n]});
    let t5 = SERVER.get("/v2/models/t5").ok();
    assert_eq!(t5["versions"], json!(["1"]));
    assert_eq!(
        (&t5["inputs"], &t5["outputs"]),
        (&json!([bytes("image", -1), bytes("text", -1), bytes("task", 1)]), &json!([bytes("text", -1)]))
    );
    let stage1 = SERVER.get("/v2/models/stage1/versions/1").ok();
    let width = SERVER.post("/embed", &json!({"images": [picture(0)]})).ok()["images"][0]["embedding"].as_array().unwrap().len();
    let numbers = |name: &str, last: i64| json!({"name": name, "datatype": "FP32", "shape": [-1, last]});
    let outputs = json!([
        numbers("itm_probability", -1),
        numbers("itc_similarity", -1),
        numbers("embedding", i64::try_from(width).unwrap()),
        bytes("text", -1)
    ]);
    assert_eq!(stage1["outputs"], outputs);
    assert_eq!(SERVER.get("/v2/health/live").ok(), json!({"live": true}));
    assert_eq!(SERVER.get("/v2/health/ready").ok(), json!({"ready": true}));
    assert_eq!(SERVER.get("/v2/models/t5/ready").ok(), json!({"name": "t5", "ready": true}));
    assert_eq!(SERVER.get("/v2/models/t5/versions/1/ready").status, 200);
    for path in ["/v2/models/t6", "/v2/models/t5/versions/2", "/v2/models/t6/ready", "/v2/models/t5/versions/2/ready"] {
        refused(&SERVER.get(path), 404);
    }
    refused(&SERVER.post("/v2/models/t5/versions/2/infer", &json!({"inputs": [images(&[0])]})), 404);
    refused(&SERVER.get("/v2/models/t5/infer"), 405);
}

#[test]
fn captions_and_answers_are_those_of_native_routes() {
    let texts =
        |found: &Value| -> Vec<Value> { found["results"].as_array().unwrap().iter().map(|one| one["text"].clone()).collect() };
    let options = json!({"max_new_tokens": 7, "beams": 3, "repetition_penalty": 1.5});
    let wanted = SERVER.post("/caption", &json!({"model": "t5", "images": [picture(0), picture(1)], "options": options})).ok();
    let found = infer("t5", &json!({"id": "a-1", "parameters": options, "inputs": [images(&[0, 1])]})).ok();
    assert_eq!(data(&found, "text", "BYTES", &[2]), texts(&wanted));
    assert_eq!((&found["id"], &found["model_name"], &found["model_version"]), (&json!("a-1"), &json!("t5"), &json!("1")));
    let as_texts = json!({"max_new_tokens": "7", "beams": "3", "repetition_penalty": "1.5"});
    let again = infer("t5/versions/1", &json!({"parameters": as_texts, "inputs": [images(&[0, 1])]})).ok();
    assert_eq!((&again["outputs"], again.get("id")), (&found["outputs"], None));
    let questions = ["what is it?", "which colour?"];
    let options = json!({"max_new_tokens": 6, "stop": ["zz"], "prompt": "{} now"});
    let wanted = SERVER
        .post("/ask", &json!({"model": "vqa-opt", "images": [picture(0), picture(1)], "questions": questions, "options": options}));
    let found = infer("vqa-opt", &json!({"parameters": options, "inputs": [tensor("text", &questions), images(&[0, 1])]})).ok();
    assert_eq!(data(&found, "text", "BYTES", &[4]), texts(&wanted.ok()));
    let url = format!("data:image/png;base64,{}", encoded(0));
    let inputs = json!([tensor("image", &[&url]), tensor("text", &questions[..1]), tensor("task", &["ask"])]);
    let reply = infer("vqa-opt", &json!({"parameters": options, "inputs": inputs}));
    assert_eq!(data(&reply.ok(), "text", "BYTES", &[1])[0], data(&found, "text", "BYTES", &[4])[0]);
    assert!(
        reply.header("server-timing").contains("vision") || reply.header("server-timing").contains("decode"),
        "{:?}",
        reply.headers
    );
}

#[test]
fn matching_and_vectors_are_those_of_native_routes() {
    let texts = ["a red circle", "nothing", "two squares"];
    let close = |a: &Value, b: &Value| assert!((a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-4, "{a} {b}");
    let wanted = SERVER.post("/match", &json!({"images": [picture(0), picture(1)], "texts": texts})).ok();
    let found = infer("stage1", &json!({"inputs": [images(&[0, 1]), tensor("text", &texts)]})).ok();
    for name in ["itm_probability", "itc_similarity"] {
        for (place, value) in data(&found, name, "FP32", &[2, 3]).iter().enumerate() {
            close(value, &wanted["results"][place / 3]["matches"][place % 3][name]);
        }
    }
    let one = json!({"inputs": [images(&[0]), tensor("text", &texts)], "outputs": [{"name": "itc_similarity"}]});
    let found = infer("stage1", &one).ok();
    assert_eq!((found["outputs"].as_array().unwrap().len(), &found["outputs"][0]["name"]), (1, &json!("itc_similarity")));
    let wanted = SERVER.post("/embed", &json!({"images": [picture(0), picture(1)]})).ok();
    let width = wanted["images"][0]["embedding"].as_array().unwrap().len();
    let found = infer("stage1", &json!({"inputs": [images(&[0, 1]), tensor("task", &["embed"])]})).ok();
    for (place, value) in data(&found, "embedding", "FP32", &[2, width]).iter().enumerate() {
        close(value, &wanted["images"][place / width]["embedding"][place % width]);
    }
}

#[test]
fn tensors_in_binary_form_say_the_same() {
    let pictures = || vec![sample(0), sample(1)];
    let plain = infer("t5", &json!({"inputs": [images(&[0, 1])]})).ok();
    let found = post_binary("t5", &[("image", pictures())], json!({})).ok();
    assert_eq!(found["outputs"], plain["outputs"]);
    let reply = post_binary("t5", &[("image", pictures())], json!({"id": "7", "parameters": {"binary_data_output": true}}));
    assert_eq!((reply.status, reply.header("content-type")), (200, "application/octet-stream"));
    let (head, rest) = reply.bytes.split_at(reply.header(LENGTH).parse().unwrap());
    let head: Value = serde_json::from_slice(head).unwrap();
    let texts: Vec<Vec<u8>> =
        data(&plain, "text", "BYTES", &[2]).iter().map(|text| text.as_str().unwrap().as_bytes().to_vec()).collect();
    assert_eq!((rest, &head["id"]), (&binary(&texts)[..], &json!("7")));
    assert_eq!(head["outputs"][0]["parameters"], json!({"binary_data_size": rest.len()}));
    assert!(head["outputs"][0].get("data").is_none(), "{head}");
    let texts = || vec![b"a red circle".to_vec(), b"nothing".to_vec()];
    let outputs = json!([{"name": "itm_probability", "parameters": {"binary_data": false}}, {"name": "itc_similarity"}]);
    let wanted = json!({"parameters": {"binary_data_output": true}, "outputs": outputs});
    let reply = post_binary("stage1", &[("text", texts()), ("image", pictures())], wanted);
    let (head, rest) = reply.bytes.split_at(reply.header(LENGTH).parse().unwrap());
    let head: Value = serde_json::from_slice(head).unwrap();
    let plain = infer("stage1", &json!({"inputs": [images(&[0, 1]), tensor("text", &["a red circle", "nothing"])]})).ok();
    let numbers = rest.chunks(4).map(|four| f64::from(f32::from_le_bytes(four.try_into().unwrap())));
    let wanted = data(&plain, "itc_similarity", "FP32", &[2, 2]);
    assert_eq!(rest.len(), 16);
    assert!(numbers.zip(&wanted).all(|(a, b)| (a - b.as_f64().unwrap()).abs() < 1e-4), "{rest:?} {wanted:?}");
    assert_eq!(data(&head, "itm_probability", "FP32", &[2, 2]).len(), 4);
}

#[test]
fn what_makes_no_sense_is_refused_and_named() {
    let image = || images(&[0]);
    let with = |key: &str, value: Value| {
        let mut tensor = image();
        tensor[key] = value;
        json!({"inputs": [tensor]})
    };
    let cases = [
        ("t5", with("name", json!("picture")), "picture: there is no such input"),
        ("t5", with("datatype", json!("UINT8")), "image: this input has the datatype BYTES"),
        ("t5", with("shape", json!([2])), "image: the data has not as many elements"),
        ("t5", with("shape", json!([1, 1])), "image: this input has the shape [n]"),
        ("t5", with("shape", json!([-1])), "image: this input has the shape [n] of at least one"),
        ("t5", with("shape", json!([i64::MAX])), "image: 9223372036854775807 elements are more than"),
        ("t5", with("shape", json!([1.5])), "the JSON cannot be read"),
        ("t5", with("data", json!([7])), "image: the data is a list of texts"),
        ("t5", with("data", json!(["%%%"])), "image[0]: the picture is not base64"),
        ("t5", with("data", json!([BASE64_STANDARD.encode("no picture")])), "image[0]: the picture"),
        ("t5", with("data", json!(["https://127.0.0.1/a.png"])), "image[0]: pictures behind addresses"),
        ("t5", with("parameters", json!({"shared_memory_region": "a"})), "image: there is no such parameter"),
        ("t5", with("parameters", json!({"binary_data_size": 4})), "image: an input has either"),
        ("t5", json!({"inputs": []}), "image: the input `image` is missing"),
        ("t5", json!({"inputs": [image(), image()]}), "image: this input comes twice"),
        ("t5", json!({"inputs": [image(), tensor("task", &["dream"])]}), "task: there is no such task"),
        (
            "t5",
            json!({"inputs": [image(), tensor("task", &["match"]), tensor("text", &["a"])]}),
            "model: this model does not do match",
        ),
        ("t5", json!({"inputs": [image(), tensor("task", &["ask"])]}), "text: this task needs"),
        ("t5", json!({"inputs": [image(), tensor("task", &["caption"]), tensor("text", &["a"])]}), "text: this task takes no"),
        (
            "t5",
            json!({"inputs": [image()], "outputs": [{"name": "embedding"}]}),
            "embedding: caption has no such output; it has text",
        ),
        ("t5", json!({"inputs": [image()], "outputs": [{"name": "text"}, {"name": "text"}]}), "text: this output is wanted twice"),
        (
            "t5",
            json!({"inputs": [image()], "outputs": [{"name": "text", "parameters": {"classification": 2}}]}),
            "text: there is no",
        ),
        ("t5", json!({"inputs": [image()], "parameters": {"sequence_id": 7}}), "unknown field `sequence_id`"),
        ("t5", json!({"inputs": [image()], "parameters": {"max_new_tokens": -1}}), "parameters: "),
        ("t5", json!({"inputs": [image()], "parameters": {"max_new_tokens": 100_000, "beams": 100}}), "tokens in all rows"),
        ("t5", json!({"inputs": [image()], "parameters": {"sample": true, "temperature": 1e39}}), "temperature"),
        ("t5", json!({"inputs": [image()], "parameters": {"num_return": 2, "beams": 2}}), "num_return: no output"),
        ("t5", json!({"inputs": [image()], "parameters": {"binary_data_output": 1}}), "binary_data_output: it is true or false"),
        ("t5", json!({"inputs": [image()], "model_name": "other"}), "model_name: the address names another"),
        ("t5", json!({"inputs": [image()], "nonsense": 1}), "unknown field `nonsense`"),
        (
            "stage1",
            json!({"inputs": [image(), tensor("task", &["embed"])], "parameters": {"beams": 2}}),
            "beams: embed has no parameters",
        ),
    ];
    for (model, body, wanted) in cases {
        let said = refused(&infer(model, &body), 400);
        assert!(said.contains(wanted), "{said}, not {wanted}");
    }
    let said = refused(
        &infer("t5", &json!({"inputs": [tensor("image", &[&encoded(0), &BASE64_STANDARD.encode("no"), &encoded(1)])]})),
        400,
    );
    assert!(said.starts_with("image[1]: "), "{said}");
    let many = json!({"inputs": [tensor("image", &["a"; 65])]});
    assert!(refused(&infer("t5", &many), 400).contains("65 elements are more than the 64"));
    let overflow = "{\"inputs\": [{\"name\": \"image\", \"datatype\": \"BYTES\", \"shape\": [1e400], \"data\": [\"\"]}]}";
    assert!(refused(&SERVER.post_bytes("/v2/models/t5/infer", overflow.as_bytes(), &[]), 400).contains("out of range"));
}

#[test]
fn a_binary_half_that_does_not_fit_is_refused() {
    let head = |size: usize, n: usize| {
        json!({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [n], "parameters": {"binary_data_size": size}}]})
            .to_string()
    };
    let post = |head: &str, length: &str, rest: &[u8]| {
        SERVER.post_bytes("/v2/models/t5/infer", &[head.as_bytes(), rest].concat(), &[(LENGTH, length)])
    };
    let part = binary(&[sample(0)]);
    let right = head(part.len(), 1);
    assert_eq!(post(&right, &right.len().to_string(), &part).status, 200);
    let whole = right.len().to_string();
    for (head, length, rest, wanted) in [
        (&right, "x", &part[..], "no number of bytes"),
        (&right, "-1", &part, "no number of bytes"),
        (&right, "99999999", &part, "fewer bytes"),
        (&right, &whole, &part[1..], "no number of bytes that the body has"),
        (&right, &whole, &[&part[..], b"x"].concat(), "more bytes than its inputs"),
        (&head(part.len(), 2), "", &part, "not as many elements"),
        (&head(3, 1), "", &part[..3], "cut off"),
        (&head(4, 1), "", &[255; 4], "cut off"),
    ] {
        let length = if length.is_empty() { head.len().to_string() } else { length.to_owned() };
        let said = refused(&post(head, &length, rest), 400);
        assert!(said.contains(wanted), "{said}, not {wanted}");
    }
    let said = refused(&post_binary("vqa-opt", &[("image", vec![sample(0)]), ("text", vec![vec![0xff]])], json!({})), 400);
    assert!(said.contains("text: the data is not in UTF-8"), "{said}");
}

#[test]
fn only_health_is_told_without_a_key() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[alice]\nkey = 'alice-alice-alice'").unwrap();
    let server = Server::keyed("alice-alice-alice", &["--keys", file.path().to_str().unwrap()]);
    let bare = |head: &str| {
        let said = server.raw(format!("{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").as_bytes());
        (said.split(' ').nth(1).unwrap().parse::<u16>().unwrap(), said.split("\r\n\r\n").nth(1).unwrap().to_owned())
    };
    for path in ["/v2/health/live", "/v2/health/ready", "/v2/models/t5/ready"] {
        assert_eq!(bare(&format!("GET {path}")).0, 200, "{path}");
    }
    for head in
        ["GET /v2", "GET /v2/models/t5", "GET /v2/models/t6", "POST /v2/models/t5/infer", "POST /v2/models/t5/versions/1/infer"]
    {
        let (status, said) = bare(head);
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((status, said["error"].is_string()), (401, true), "{head}: {said}");
    }
    assert_eq!(server.post("/v2/models/t5/infer", &json!({"inputs": [images(&[0])]})).status, 200);
}

#[test]
fn a_model_that_is_not_loaded_is_not_ready() {
    let server = Server::on(&["tests/bundles/t5"], &[]);
    assert_eq!(server.post("/admin/models/t5/unload", &json!({})).status, 202);
    let ready = server.get("/v2/models/t5/ready");
    assert_eq!((ready.status, ready.json()), (503, json!({"name": "t5", "ready": false})));
    assert!(refused(&server.post("/v2/models/t5/infer", &json!({"inputs": [images(&[0])]})), 503).contains("not loaded"));
    assert_eq!(server.get("/v2/models/t5").status, 200);
}
