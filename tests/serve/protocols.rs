//! Every route says what the engine says.

use std::io::{BufRead, BufReader};
use std::process::Command;
use std::sync::LazyLock;

use serde_json::{Value, json};

use crate::client::{Server, at, image_url, picture, sample};

static SERVER: LazyLock<Server> = LazyLock::new(|| Server::start(&["--cache-bytes", "0"]));

/// What the command line prints with `--json`.
fn cli(arguments: &[&str]) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    // Vectors are JSON without being asked.
    let form: &[&str] = if arguments[0] == "embed" { &[] } else { &["--json"] };
    let output =
        command.args(arguments).args(form).args(["--provider", "cpu", "--threads", "1"]).current_dir(at("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn path(n: usize) -> String {
    format!("models/samples/{n}.png")
}

#[test]
fn captions_are_those_of_the_command_line() {
    let wanted = cli(&["caption", &path(0), &path(1), "--model", "tests/bundles/t5"]);
    let found = SERVER.post("/caption", &json!({"model": "t5", "images": [picture(0), picture(1)]})).ok();
    for (wanted, found) in wanted.iter().zip(found["results"].as_array().unwrap()) {
        assert_eq!((&wanted["text"], &wanted["tokens"]), (&found["text"], &found["tokens"]));
        assert_eq!(wanted["finish_reason"], found["finish_reason"]);
        assert!(found["timings_ms"]["vision"].as_f64().unwrap() > 0.0, "{found}");
    }
}

#[test]
fn options_have_the_names_and_the_meaning_of_the_command_line() {
    let flags = ["--beams", "3", "--num-return", "2", "--max-new-tokens", "6", "--repetition-penalty", "1.5"];
    let wanted = cli(&[&["caption", &path(2), "--model", "tests/bundles/t5"], &flags[..]].concat());
    let options = json!({"beams": 3, "num_return": 2, "max_new_tokens": 6, "repetition_penalty": 1.5});
    let found = SERVER.post("/caption", &json!({"model": "t5", "images": [picture(2)], "options": options})).ok();
    assert_eq!(found["results"][0]["candidates"], wanted[0]["candidates"]);
    let drawn = |seed| {
        let options = json!({"sample": true, "temperature": 5.0, "seed": seed, "max_new_tokens": 20});
        SERVER.post("/caption", &json!({"model": "t5", "images": [picture(2)], "options": options})).ok()["results"][0]["tokens"]
            .clone()
    };
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
}

#[test]
fn answers_come_picture_by_picture_and_question_by_question() {
    let questions = ["what is it?", "which colour?"];
    let wanted = cli(&["ask", &path(0), questions[0], questions[1], "--model", "tests/bundles/vqa-opt"]);
    let found = SERVER.post("/ask", &json!({"model": "vqa-opt", "images": [picture(0), picture(0)], "questions": questions})).ok();
    let found = found["results"].as_array().unwrap();
    assert_eq!(found.len(), 4);
    for (place, found) in found.iter().enumerate() {
        assert_eq!((&found["tokens"], &found["question"]), (&wanted[place % 2]["tokens"], &json!(questions[place % 2])));
        assert!(found["timings_ms"].get("vision").is_none(), "it was looked at once, before: {found}");
    }
}

#[test]
fn a_picture_with_a_name_is_not_looked_at_again() {
    let looked = SERVER.post("/images", &json!({"model": "vqa-opt", "image": picture(0)})).ok();
    let named = json!({"image_id": looked["image_id"]});
    let anew = SERVER.post("/ask", &json!({"model": "vqa-opt", "images": [picture(0)], "question": "what?"})).ok();
    let again = SERVER.post("/ask", &json!({"images": [named], "question": "what?"})).ok();
    assert_eq!((&again["model"], &again["results"][0]["tokens"]), (&json!("vqa-opt"), &anew["results"][0]["tokens"]));
    assert!(again["results"][0]["timings_ms"].get("vision").is_none(), "{again}");
    let other = SERVER.post("/caption", &json!({"model": "t5", "images": [named]}));
    assert!(other.refused(400).contains("another model"));
    let id = looked["image_id"].as_str().unwrap();
    assert_eq!(SERVER.delete(&format!("/images/{id}")).status, 204);
    assert!(SERVER.post("/ask", &json!({"images": [named], "question": "what?"})).refused(404).contains("image_id"));
}

#[test]
fn matching_similarity_and_vectors_are_those_of_the_command_line() {
    let texts = ["a red circle", "nothing"];
    let wanted = cli(&["match", &path(0), texts[0], texts[1], "--model", "tests/bundles/stage1"]);
    let found = SERVER.post("/match", &json!({"images": [picture(0)], "texts": texts})).ok();
    for (place, wanted) in wanted.iter().enumerate() {
        let found = &found["results"][0]["matches"][place];
        for key in ["itm_probability", "itc_similarity"] {
            assert!((wanted[key].as_f64().unwrap() - found[key].as_f64().unwrap()).abs() < 1e-4, "{wanted} {found}");
        }
    }
    let scores = SERVER.post("/v1/score", &json!({"text_1": texts, "text_2": {"content": [image_url(0), image_url(0)]}})).ok();
    let reranked = SERVER.post("/v1/rerank", &json!({"query": {"content": [image_url(0)]}, "documents": texts, "top_n": 1})).ok();
    let probability = |place: usize| found["results"][0]["matches"][place]["itm_probability"].as_f64().unwrap();
    assert!((0..2).all(|place| (scores["data"][place]["score"].as_f64().unwrap() - probability(place)).abs() < 1e-4), "{scores}");
    let best = usize::from(probability(1) > probability(0));
    assert_eq!((&reranked["results"][0]["index"], reranked["results"].as_array().unwrap().len()), (&json!(best), 1));
    let vectors = SERVER.post("/embed", &json!({"images": [picture(0)], "texts": ["a red circle"]})).ok();
    let wanted = cli(&["embed", "image", &path(0), "--model", "tests/bundles/stage1"]);
    let close = |a: &Value, b: &Value| {
        let (a, b) = (a.as_array().unwrap(), b.as_array().unwrap());
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-4)
    };
    assert!(close(&vectors["images"][0]["embedding"], &wanted[0]["embedding"]), "{} {}", vectors["images"][0], wanted[0]);
    let openai = SERVER.post("/v1/embeddings", &json!({"input": "a red circle"})).ok();
    assert!(close(&openai["data"][0]["embedding"], &vectors["texts"][0]["embedding"]));
    let message = json!({"messages": [{"role": "user", "content": [image_url(0)]}]});
    assert!(close(&SERVER.post("/v1/embeddings", &message).ok()["data"][0]["embedding"], &vectors["images"][0]["embedding"]));
}

/// Whether two lists of numbers are the same.
fn is_close(a: &Value, b: &Value) -> bool {
    let (a, b) = (a.as_array().unwrap(), b.as_array().unwrap());
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-4)
}

#[test]
fn coheres_form_says_what_native_routes_say() {
    let wanted = SERVER.post("/embed", &json!({"images": [picture(0), picture(1)], "texts": ["a red circle", "nothing"]})).ok();
    let url = |n: usize| image_url(n)["image_url"]["url"].clone();
    let texts = SERVER.post("/v2/embed", &json!({"texts": ["a red circle", "nothing"], "input_type": "search_query"})).ok();
    assert_eq!((&texts["texts"], &texts["images"]), (&json!(["a red circle", "nothing"]), &Value::Null));
    let pictures = SERVER.post("/v2/embed", &json!({"images": [url(0), url(1)], "embedding_types": ["float", "base64"]})).ok();
    let content = |part: Value| json!({"content": [part]});
    let inputs = json!([content(json!({"type": "text", "text": "nothing"})), content(image_url(1)), content(image_url(0))]);
    let mixed = SERVER.post("/v2/embed", &json!({"inputs": inputs, "embedding_types": ["float"], "truncate": "END"})).ok();
    for (found, kind, place) in [
        (&texts["embeddings"]["float"][1], "texts", 1),
        (&pictures["embeddings"]["float"][1], "images", 1),
        (&mixed["embeddings"]["float"][0], "texts", 1),
        (&mixed["embeddings"]["float"][1], "images", 1),
        (&mixed["embeddings"]["float"][2], "images", 0),
    ] {
        assert!(is_close(found, &wanted[kind][place]["embedding"]), "{kind} {place}: {found}");
    }
    let image = json!({"width": 256, "height": 256, "format": "png", "bit_depth": 24});
    assert_eq!((&pictures["images"][1], &mixed["embeddings"]["base64"]), (&image, &Value::Null));
    let encoded = SERVER.post("/v1/embeddings", &json!({"input": "nothing", "encoding_format": "base64"})).ok();
    let base64 = SERVER.post("/v2/embed", &json!({"texts": ["nothing"], "embedding_types": ["base64"]})).ok();
    assert_eq!(base64["embeddings"], json!({"base64": [encoded["data"][0]["embedding"]]}));
    let first = SERVER.post("/v1/embed", &json!({"texts": ["nothing"], "truncate": "END"})).ok();
    assert!(is_close(&first["embeddings"][0], &wanted["texts"][1]["embedding"]), "{first}");
    assert_eq!((&first["response_type"], &first["meta"]["api_version"]), (&json!("embeddings_floats"), &json!({"version": "1"})));
    let typed = SERVER.post("/v1/embed", &json!({"images": [url(1)], "embedding_types": ["float"]})).ok();
    assert!(is_close(&typed["embeddings"]["float"][0], &wanted["images"][1]["embedding"]), "{typed}");
    assert_eq!(typed["response_type"], "embeddings_by_type");
    let ranked = SERVER.post("/v2/rerank", &json!({"query": "a red circle", "documents": [url(0), url(1)]})).ok();
    let scores =
        SERVER.post("/v1/score", &json!({"text_1": "a red circle", "text_2": {"content": [image_url(0), image_url(1)]}})).ok();
    let best = ranked["results"][0]["index"].as_u64().unwrap() as usize;
    assert_eq!(ranked["results"][0]["relevance_score"], scores["data"][best]["score"]);
    assert!(ranked["results"][1]["relevance_score"].as_f64() <= ranked["results"][0]["relevance_score"].as_f64());
}

#[test]
fn coheres_form_refuses_what_blip2_has_no_place_for() {
    let two = json!([{"content": [{"type": "text", "text": "a"}, image_url(0)]}]);
    for (body, said) in [
        (json!({"texts": ["a"], "embedding_types": ["int8"]}), "int8"),
        (json!({"texts": ["a"], "images": []}), "exactly one"),
        (json!({}), "exactly one"),
        (json!({"texts": []}), "nothing in it"),
        (json!({"texts": ["a"], "output_dimension": 8}), "output_dimension"),
        (json!({"inputs": two}), "one part"),
        (json!({"images": ["data:image/bmp;base64,Qk0="]}), "JPEG, PNG, GIF or WebP"),
        (json!({"texts": ["a"], "model": "t5"}), "does not do embed"),
        (json!({"texts": ["a"], "colour": 1}), "unknown field"),
    ] {
        let refused = SERVER.post("/v2/embed", &body).refused(400);
        assert!(refused.contains(said), "{body}: {refused}");
    }
}

#[test]
fn candidates_are_ranked_as_on_the_command_line() {
    let answers: Vec<String> = (0..70).map(|n| format!("answer {n}")).collect();
    let mut arguments = vec!["rank", "models/samples/0.png", "what?"];
    arguments.extend(answers.iter().map(String::as_str));
    let wanted = cli(&[&arguments[..], &["--model", "tests/bundles/vqa-opt"]].concat());
    let found =
        SERVER.post("/rank", &json!({"model": "vqa-opt", "images": [picture(0)], "question": "what?", "answers": answers})).ok();
    let ranking = found["results"][0]["ranking"].as_array().unwrap();
    let likelihood = |ranking: &[Value], place: usize| ranking[place]["log_likelihood"].as_f64().unwrap();
    assert_eq!(ranking.len(), 70);
    assert!((1..70).all(|place| likelihood(ranking, place - 1) >= likelihood(ranking, place)));
    assert!((0..70).all(|place| (likelihood(ranking, place) - likelihood(&wanted, place)).abs() < 1e-3), "{wanted:?}");
}

#[test]
fn chat_says_what_captions_and_answers_say() {
    let ask = |content: Value, more: Value| {
        let mut body = json!({"model": "vqa-opt", "messages": [{"role": "user", "content": content}], "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        SERVER.post("/v1/chat/completions", &body)
    };
    let question = json!([image_url(0), {"type": "text", "text": "what is it?"}]);
    let wanted = SERVER
        .post("/ask", &json!({"model": "vqa-opt", "images": [picture(0)], "question": "what is it?", "options": {"beams": 1}}))
        .ok();
    let found = ask(question.clone(), json!({})).ok();
    assert_eq!(found["choices"][0]["message"]["content"], wanted["results"][0]["text"]);
    assert_eq!(found["usage"]["completion_tokens"], wanted["results"][0]["tokens"].as_array().unwrap().len());
    let several = ask(question.clone(), json!({"use_beam_search": true, "best_of": 3, "n": 2})).ok();
    assert_eq!(several["choices"].as_array().unwrap().len(), 2);
    let probable = ask(question.clone(), json!({"logprobs": true, "top_logprobs": 2})).ok();
    assert_eq!(probable["choices"][0]["logprobs"]["content"][0]["top_logprobs"].as_array().unwrap().len(), 2);
    for (more, said) in [
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"frequency_penalty": 1.0}), "frequency_penalty"),
        (json!({"max_tokns": 5}), "max_tokns"),
        (json!({"n": 2}), "greedy search writes one text"),
    ] {
        assert!(ask(question.clone(), more).refused(400).contains(said), "{said}");
    }
}

/// The events of a stream.
fn events(path: &str, body: &Value) -> Vec<String> {
    let stream = SERVER.send_only(path, body);
    let mut found = Vec::new();
    for line in BufReader::new(stream).lines() {
        if let Some(data) = line.unwrap().strip_prefix("data: ") {
            found.push(data.to_owned());
            if data == "[DONE]" {
                return found;
            }
        }
    }
    panic!("the stream broke off: {found:?}")
}

#[test]
fn streams_say_what_whole_answers_say() {
    let mut body = json!({"model": "t5", "images": [picture(0)], "options": {"beams": 1, "max_new_tokens": 20}});
    let whole = SERVER.post("/caption", &body).ok();
    body["stream"] = true.into();
    let told: Vec<Value> = events("/caption", &body).iter().filter_map(|event| serde_json::from_str(event).ok()).collect();
    let pieces: String = told.iter().filter_map(|event| event["text"].as_str()).collect();
    assert_eq!(json!(pieces.trim()), whole["results"][0]["text"]);
    assert_eq!(told.last().unwrap()["result"]["tokens"], whole["results"][0]["tokens"]);
    assert!(told.len() > 2, "{told:?}");

    let mut chat =
        json!({"model": "t5", "messages": [{"role": "user", "content": [image_url(0)]}], "temperature": 0, "max_tokens": 20});
    let whole = SERVER.post("/v1/chat/completions", &chat).ok();
    (chat["stream"], chat["stream_options"]) = (true.into(), json!({"include_usage": true}));
    let told: Vec<Value> =
        events("/v1/chat/completions", &chat).iter().filter_map(|event| serde_json::from_str(event).ok()).collect();
    let pieces: String = told.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(json!(pieces.trim()), whole["choices"][0]["message"]["content"]);
    assert_eq!(told.last().unwrap()["usage"], whole["usage"]);
    let begins: Vec<bool> = told.iter().map(|event| event["choices"][0]["delta"]["role"] == "assistant").collect();
    assert!(begins[0] && !begins[1..].contains(&true), "the role is told once: {told:?}");
    assert_ne!(told[0]["choices"][0]["delta"]["content"], "", "clients take the first chunk for the first token");
}

/// The events of a stream that ends with its connection.
fn named_events(path: &str, body: &Value) -> Vec<Value> {
    let reply = SERVER.post(path, body);
    assert!(reply.header("content-type").starts_with("text/event-stream"), "{reply:?}");
    let blocks = reply.text.split("\n\n").filter(|block| !block.is_empty());
    let event = |block: &str| {
        let (name, data) = block.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let event: Value = serde_json::from_str(data).unwrap();
        assert_eq!(event["type"], name);
        event
    };
    blocks.map(event).collect()
}

/// A conversation as responses take it.
fn responding(parts: Value, more: Value) -> Value {
    let mut body = json!({"model": "vqa-opt", "temperature": 0, "input": [{"role": "user", "content": parts}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn input_image(n: usize) -> Value {
    json!({"type": "input_image", "detail": "auto", "image_url": image_url(n)["image_url"]["url"]})
}

#[test]
fn responses_say_what_chat_says() {
    let messages = json!([
        {"role": "user", "content": [image_url(0), {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "which colour?"},
    ]);
    let wanted = SERVER.post("/v1/chat/completions", &json!({"model": "vqa-opt", "temperature": 0, "messages": messages})).ok();
    let mut body =
        responding(json!([input_image(0), {"type": "input_text", "text": "what is it?"}]), json!({"metadata": {"a": "b"}}));
    let earlier = json!({"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
        "content": [{"type": "output_text", "text": "a circle", "annotations": [], "logprobs": []}]});
    body["input"].as_array_mut().unwrap().extend([earlier, json!({"role": "user", "content": "which colour?"})]);
    let found = SERVER.post("/v1/responses", &body).ok();
    assert_eq!(found["output"][0]["content"][0]["text"], wanted["choices"][0]["message"]["content"]);
    assert_eq!(found["usage"]["input_tokens"], wanted["usage"]["prompt_tokens"]);
    assert_eq!(found["usage"]["output_tokens"], wanted["usage"]["completion_tokens"]);
    assert_eq!((&found["store"], &found["metadata"]), (&json!(false), &json!({"a": "b"})));
    let cut = SERVER.post("/v1/responses", &responding(json!([input_image(0)]), json!({"max_output_tokens": 1}))).ok();
    assert_eq!((&cut["status"], &cut["incomplete_details"]["reason"]), (&json!("incomplete"), &json!("max_output_tokens")));
    let id = found["id"].as_str().unwrap();
    assert!(SERVER.get(&format!("/v1/responses/{id}")).refused(404).contains("not stored"));
}

#[test]
fn responses_refuse_what_blip2_has_no_place_for() {
    let user = |parts: Value| json!({"input": [{"role": "user", "content": parts}]});
    for (more, param) in [
        (json!({"instructions": "be brief"}), "instructions"),
        (json!({"store": true}), "store"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"tools": [{"type": "web_search"}]}), "tools"),
        (json!({"text": {"format": {"type": "json_object"}}}), "text.format"),
        (json!({"input": "hello"}), "input"),
        (user(json!([{"type": "input_image", "image_url": "data:image/png;base64,!"}])), "input"),
        (json!({"input": [{"role": "tool", "content": "a"}]}), "input[0]"),
    ] {
        let reply = SERVER.post("/v1/responses", &responding(json!([input_image(0)]), more.clone()));
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{more}: {}", reply.text);
    }
    for unknown in [json!({"max_tokens": 5}), user(json!([{"type": "input_file", "file_id": "a"}]))] {
        SERVER.post("/v1/responses", &responding(json!([input_image(0)]), unknown)).refused(400);
    }
}

#[test]
fn responses_are_streamed_as_typed_events() {
    let mut body = responding(json!([input_image(0), {"type": "input_text", "text": "what?"}]), json!({"max_output_tokens": 20}));
    let whole = SERVER.post("/v1/responses", &body).ok();
    body["stream"] = true.into();
    let told = named_events("/v1/responses", &body);
    let names: Vec<&str> = told.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let before = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"];
    let behind = ["response.output_text.done", "response.content_part.done", "response.output_item.done"];
    let n = names.len();
    assert_eq!((&names[..4], &names[n - 4..n - 1]), (&before[..], &behind[..]));
    assert!(n > 10 && names[4..n - 4].iter().all(|name| *name == "response.output_text.delta"), "{names:?}");
    assert_eq!(names[n - 1], format!("response.{}", whole["status"].as_str().unwrap()));
    assert!((0..n).all(|place| told[place]["sequence_number"] == place));
    let pieces: String = told.iter().filter_map(|event| event["delta"].as_str()).collect();
    let (last, text) = (&told[n - 1]["response"], &whole["output"][0]["content"][0]["text"]);
    assert_eq!((&json!(pieces), &told[n - 4]["text"], &last["output"][0]["content"][0]["text"]), (text, text, text));
    assert_eq!((&last["usage"], &last["id"]), (&whole["usage"], &told[0]["response"]["id"]));
    let parts = json!([{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]);
    let failed = named_events("/v1/responses", &responding(parts, json!({"stream": true}))).pop().unwrap();
    assert_eq!((&failed["type"], &failed["response"]["error"]["code"]), (&json!("response.failed"), &json!("invalid_image")));
}

#[test]
fn a_form_says_what_json_says() {
    let boundary = "a-boundary";
    let mut body = Vec::new();
    let mut part = |about: &str, bytes: &[u8]| {
        body.extend(format!("--{boundary}\r\ncontent-disposition: form-data; {about}\r\n\r\n").as_bytes());
        body.extend(bytes);
        body.extend(b"\r\n");
    };
    part("name=\"image\"; filename=\"0.png\"", &sample(0));
    part("name=\"model\"", b"vqa-opt");
    part("name=\"question\"", b"what is it?");
    part("name=\"options\"", b"{\"beams\": 1}");
    body.extend(format!("--{boundary}--\r\n").as_bytes());
    let head = format!(
        "POST /ask HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: multipart/form-data; boundary={boundary}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let said = SERVER.raw(&[head.as_bytes(), &body].concat());
    let found: Value = serde_json::from_str(said.split("\r\n\r\n").nth(1).unwrap()).unwrap_or_else(|_| panic!("{said}"));
    let options = json!({"beams": 1});
    let wanted = SERVER
        .post("/ask", &json!({"model": "vqa-opt", "images": [picture(0)], "question": "what is it?", "options": options}))
        .ok();
    assert_eq!(found["results"][0]["tokens"], wanted["results"][0]["tokens"]);
}

#[test]
fn one_bad_picture_among_several_is_told_and_the_others_are_done() {
    let bad = json!({"data": "AAAA"});
    let found = SERVER.post("/caption", &json!({"model": "t5", "images": [picture(0), bad, picture(1)]})).ok();
    let codes: Vec<_> = (0..3).map(|place| found["results"][place]["error"]["code"].as_str()).collect();
    assert_eq!(codes, [None, Some("picture_unusable"), None]);
    SERVER.post("/caption", &json!({"model": "t5", "images": [bad]})).refused(400);
}

#[test]
fn a_model_is_found_by_name_or_by_what_it_does() {
    let models = SERVER.get("/v1/models").ok();
    let names: Vec<_> = models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["t5", "stage1", "vqa-opt"]);
    assert_eq!(SERVER.post("/match", &json!({"images": [picture(0)], "texts": ["a"]})).ok()["model"], "stage1");
    SERVER.post("/caption", &json!({"model": "gpt", "images": [picture(0)]})).refused(404);
    let said = SERVER.post("/match", &json!({"model": "t5", "images": [picture(0)], "texts": ["a"]})).refused(400);
    assert!(said.contains("does not do match") && !said.contains('/'), "{said}");
}

#[test]
fn answers_carry_their_times_and_their_names() {
    let reply = SERVER.post_with("/caption", &json!({"model": "t5", "images": [picture(0)]}), &[("x-request-id", "mine-1")]);
    assert_eq!((reply.header("x-request-id"), reply.header("x-content-type-options")), ("mine-1", "nosniff"));
    assert!(reply.header("server-timing").contains("vision;dur=") && reply.header("server-timing").contains("total;dur="));
    let counted = SERVER.get("/metrics").text;
    for name in [
        "blip2_requests_total{route=\"/caption\",status=\"200\"}",
        "blip2_time_to_first_token_seconds_bucket{le=",
        "blip2_vision_batch_size_sum{model=\"t5\"}",
        "blip2_num_requests_running{model=\"t5\"}",
        "process_resident_memory_bytes",
    ] {
        assert!(counted.contains(name), "{name}: {counted}");
    }
}

#[test]
fn pictures_that_come_again_are_kept_unless_a_request_says_no() {
    let server = Server::on(&["tests/bundles/t5"], &[]);
    let body = json!({"images": [picture(0)]});
    let looked = |headers: &[(&str, &str)]| {
        let found = server.post_with("/caption", &body, headers).ok();
        found["results"][0]["timings_ms"].get("vision").is_some()
    };
    assert_eq!([looked(&[]), looked(&[]), looked(&[("cache-control", "no-cache, No-Store")])], [true, false, true]);
}

#[test]
fn the_document_of_the_routes_is_served_as_it_is_printed() {
    let printed = Command::new(env!("CARGO_BIN_EXE_blip2")).args(["serve", "--openapi"]).output().unwrap();
    let printed: Value = serde_json::from_slice(&printed.stdout).unwrap();
    assert_eq!(SERVER.get("/openapi.json").ok(), printed);
    for path in ["/caption", "/v1/chat/completions", "/v1/rerank", "/health/ready"] {
        assert!(printed["paths"].get(path).is_some(), "{path}");
    }
}

#[test]
fn texts_become_tokens_and_tokens_texts() {
    let tokens = SERVER.post("/tokenize", &json!({"model": "t5", "prompt": "a red circle"})).ok();
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    let text = SERVER.post("/detokenize", &json!({"model": "t5", "tokens": tokens["tokens"]})).ok();
    assert!(text["prompt"].as_str().unwrap().contains("red"), "{text}");
    SERVER.post("/detokenize", &json!({"model": "t5", "tokens": [4_000_000]})).refused(400);
}

#[test]
fn the_benchmark_measures_a_server_as_it_measures_others() {
    for task in [&["--task", "caption"][..], &["--task", "embed"], &["--task", "match", "--text", "a red circle"]] {
        let url = format!("http://{}/v1", SERVER.address);
        let model = if task[1] == "caption" { "t5" } else { "stage1" };
        let few = ["--drawn", "2", "--image-size", "64x48", "--duration", "0", "--warm-up", "0", "--queries", "6"];
        let bench = ["bench", "server", "--url", &url, "--served-model", model, "--rate", "20"];
        let output =
            Command::new(env!("CARGO_BIN_EXE_blip2")).args(bench).args(few).args(task).current_dir(at("")).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains(" 0 failed"),
            "{task:?}: {said}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
