//! A server that speaks OpenAI's chat completions as a target: our own, vLLM's, any other. Answers are streamed, so that the first token
//! and every gap are seen as a client sees them. Scores and vectors are asked for as vLLM's `/v1/score` and `/v1/embeddings` take pictures
//! (its documentation, "Pooling models").

use std::io::{BufRead, BufReader};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::BenchError;
use super::load::{Query, Target, Told, What};
use super::local::digest;

/// A server that takes longer to answer is as good as gone.
const PATIENCE: Duration = Duration::from_secs(600);
const CONNECTING: Duration = Duration::from_secs(10);
/// Of what a server says when it refuses, so much is kept.
const MOST_SAID: usize = 200;

/// Where queries go.
#[derive(Clone, Debug)]
pub struct Server {
    /// Up to and with `/v1`.
    pub url: String,
    /// The model's name there; the first that the server lists if there is none.
    pub model: Option<String>,
    /// What stands behind `Bearer`.
    pub key: Option<String>,
}

/// What is asked about a picture.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The encoded picture.
    pub picture: Arc<[u8]>,
    /// What is wanted of it.
    pub wanted: Wanted,
}

/// What is wanted of a picture.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// A text.
    Text {
        /// The text beside the picture.
        text: String,
        /// Exactly so many tokens, where the server can be told so.
        tokens: Option<usize>,
        /// Beam search, where the server knows it by vLLM's name.
        beams: Option<usize>,
    },
    /// How well each text fits.
    Scores(Vec<String>),
    /// Its vector.
    Vector,
}

/// A server with requests that are made once.
pub struct Http {
    agent: ureq::Agent,
    server: Server,
    requests: Vec<Request>,
}

/// A request as it is sent.
#[derive(Clone)]
struct Request {
    route: &'static str,
    body: Arc<str>,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    delta: Delta,
}

#[derive(Default, Deserialize)]
struct Delta {
    content: Option<String>,
}

/// What comes back at once.
#[derive(Deserialize)]
struct Found {
    data: Vec<Numbers>,
}

#[derive(Deserialize)]
struct Numbers {
    score: Option<f32>,
    embedding: Option<Vec<f32>>,
}

#[derive(Deserialize)]
struct Usage {
    completion_tokens: usize,
}

impl Http {
    /// Asks the server which models it has; an error if it cannot be reached or lacks the named one.
    pub fn connect(mut server: Server, inputs: &[Asked]) -> Result<Self, BenchError> {
        server.url = server.url.trim_end_matches('/').to_owned();
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(CONNECTING))
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .max_idle_connections_per_host(1024)
            .build();
        let agent = ureq::Agent::new_with_config(config);
        let model = model(&agent, &server)?;
        let requests = inputs.iter().map(|asked| asked.request(&model)).collect();
        server.model = Some(model);
        Ok(Self { agent, server, requests })
    }

    /// The server, with the model that is asked.
    pub fn server(&self) -> &Server {
        &self.server
    }
}

impl Target for Http {
    fn send(&mut self, query: &Query, to: Told) {
        for (place, input) in query.inputs.iter().enumerate() {
            let (agent, server, request, told) =
                (self.agent.clone(), self.server.clone(), self.requests[*input].clone(), to.about(place));
            std::thread::spawn(move || {
                let end = match ask(&agent, &server, &request, &told) {
                    Ok(text) => What::Done { output: text.into(), stages_ms: Vec::new() },
                    Err(why) => What::Failed(why),
                };
                told.tell(end);
            });
        }
    }
}

impl Asked {
    fn request(&self, model: &str) -> Request {
        let picture = format!("data:{};base64,{}", kind(&self.picture), BASE64_STANDARD.encode(&self.picture));
        let picture = json!({"type": "image_url", "image_url": {"url": picture}});
        let (route, mut body) = match &self.wanted {
            Wanted::Text { text, tokens, beams } => ("chat/completions", chat(picture, text, *tokens, *beams)),
            // Of several texts each has a picture of its own.
            Wanted::Scores(texts) => ("score", json!({"text_1": texts, "text_2": {"content": vec![picture; texts.len()]}})),
            Wanted::Vector => {
                ("embeddings", json!({"messages": [{"role": "user", "content": [picture]}], "encoding_format": "float"}))
            }
        };
        body["model"] = model.into();
        Request { route, body: body.to_string().into() }
    }
}

fn chat(picture: Value, text: &str, tokens: Option<usize>, beams: Option<usize>) -> Value {
    let mut parts = vec![picture];
    if !text.is_empty() {
        parts.push(json!({"type": "text", "text": text}));
    }
    let mut body = json!({
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    if let Some(n) = tokens {
        body["max_tokens"] = n.into();
        body["min_tokens"] = n.into();
        body["ignore_eos"] = true.into();
    }
    if let Some(n) = beams.filter(|n| *n > 1) {
        body["use_beam_search"] = true.into();
        body["best_of"] = n.into();
    }
    body
}

fn kind(picture: &[u8]) -> &'static str {
    match picture {
        [0xFF, 0xD8, ..] => "image/jpeg",
        [0x89, b'P', b'N', b'G', ..] => "image/png",
        [b'G', b'I', b'F', ..] => "image/gif",
        [b'R', b'I', b'F', b'F', ..] => "image/webp",
        [b'B', b'M', ..] => "image/bmp",
        _ => "application/octet-stream",
    }
}

fn model(agent: &ureq::Agent, server: &Server) -> Result<String, BenchError> {
    let url = format!("{}/models", server.url);
    let unusable = |why: String| BenchError::Server { url: url.clone(), why };
    let request = agent.get(&url);
    let request = if let Some(key) = &server.key { request.header("Authorization", format!("Bearer {key}")) } else { request };
    let mut response = request.call().map_err(|error| unusable(error.to_string()))?;
    let said = response.body_mut().read_to_string().map_err(|error| unusable(error.to_string()))?;
    if !response.status().is_success() {
        return Err(unusable(refusal(response.status().as_u16(), &said)));
    }
    let models: Models = serde_json::from_str(&said).map_err(|_| unusable("it lists no models as OpenAI's servers do".into()))?;
    let known = || models.data.iter().map(|model| model.id.as_str()).collect::<Vec<_>>().join(", ");
    match &server.model {
        Some(wanted) if models.data.iter().any(|model| model.id == *wanted) => Ok(wanted.clone()),
        Some(wanted) => Err(unusable(format!("it has no model `{wanted}`, but {}", known()))),
        None => models.data.first().map(|model| model.id.clone()).ok_or_else(|| unusable("it has no model".into())),
    }
}

/// The whole answer.
fn ask(agent: &ureq::Agent, server: &Server, asked: &Request, told: &Told) -> Result<String, String> {
    let request = agent.post(format!("{}/{}", server.url, asked.route)).header("Content-Type", "application/json");
    // Pictures come again here as they do not elsewhere.
    let request = request.header("Cache-Control", "no-store");
    let request = if let Some(key) = &server.key { request.header("Authorization", format!("Bearer {key}")) } else { request };
    let mut response = request.send(&*asked.body).map_err(|error| error.to_string())?;
    if !response.status().is_success() {
        let said = response.body_mut().read_to_string().unwrap_or_default();
        return Err(refusal(response.status().as_u16(), &said));
    }
    if asked.route == "chat/completions" { written(response.into_body(), told) } else { found(response.into_body()) }
}

/// Scores as they are, of a vector its digest.
fn found(mut body: ureq::Body) -> Result<String, String> {
    let said = body.read_to_string().map_err(|error| error.to_string())?;
    let found: Found =
        serde_json::from_str(&said).map_err(|_| format!("the answer has neither scores nor vectors: {}", cut(&said)))?;
    let one = |numbers: &Numbers| match numbers {
        Numbers { score: Some(score), .. } => Some(format!("{score:.4}")),
        Numbers { embedding, .. } => embedding.as_deref().map(digest),
    };
    let all: Option<Vec<String>> = found.data.iter().map(one).collect();
    let all = all.filter(|all| !all.is_empty());
    all.map(|all| all.join(" ")).ok_or_else(|| format!("the answer has neither scores nor vectors: {}", cut(&said)))
}

/// The whole text; every piece is told as it comes.
fn written(body: ureq::Body, told: &Told) -> Result<String, String> {
    let (mut text, mut n_tokens, mut n_pieces, mut is_done) = (String::new(), None, 0, false);
    for line in BufReader::new(body.into_reader()).lines() {
        let line = line.map_err(|error| error.to_string())?;
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
        if data == "[DONE]" {
            is_done = true;
            break;
        }
        let chunk: Chunk = serde_json::from_str(data).map_err(|_| format!("a part of the answer is no JSON: {}", cut(data)))?;
        if let Some(error) = chunk.error {
            return Err(cut(&error.to_string()));
        }
        n_tokens = chunk.usage.map(|usage| usage.completion_tokens).or(n_tokens);
        for piece in chunk.choices.into_iter().filter_map(|choice| choice.delta.content).filter(|piece| !piece.is_empty()) {
            text.push_str(&piece);
            n_pieces += 1;
            told.tell(What::Tokens(1));
        }
    }
    if !is_done {
        return Err("the answer broke off".into());
    }
    // A piece may be several tokens, and an end token is none.
    if let Some(n) = n_tokens.filter(|n| *n > n_pieces) {
        told.tell(What::More(n - n_pieces));
    }
    Ok(text)
}

fn refusal(status: u16, said: &str) -> String {
    format!("status {status}: {}", cut(said))
}

fn cut(said: &str) -> String {
    let line = said.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(MOST_SAID).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::bench::load::{Length, Load, Run};
    use crate::bench::record::Record;

    /// A server that answers every request for a text with `answer`, thirty milliseconds a line.
    fn serve(answer: &'static str) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}/v1/", listener.local_addr().expect("it is bound"));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || reply(stream, answer));
            }
        });
        Server { url, model: None, key: Some("secret".into()) }
    }

    fn reply(mut stream: std::net::TcpStream, answer: &str) {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        stream.read_exact(&mut body).expect("the body was announced");
        let known = head.contains("authorization: bearer secret");
        let (status, lines) = match (known, head.starts_with("get /v1/models ")) {
            (false, _) => ("401 Unauthorized", "who is there?"),
            (true, true) => ("200 OK", r#"{"data":[{"id":"demo"}]}"#),
            (true, false) if answer.starts_with("data:") || answer.starts_with('{') => ("200 OK", answer),
            (true, false) => ("429 Too Many Requests", answer),
        };
        let _ = write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n\r\n");
        for line in lines.lines() {
            std::thread::sleep(Duration::from_millis(30));
            let _ = writeln!(stream, "{line}");
        }
    }

    fn ask_once(answer: &'static str) -> Record {
        ask_for(Wanted::Text { text: "what?".into(), tokens: Some(3), beams: None }, answer)
    }

    fn ask_for(wanted: Wanted, answer: &'static str) -> Record {
        let asked = Asked { picture: [0xFF, 0xD8, 0].as_slice().into(), wanted };
        let mut target = Http::connect(serve(answer), &[asked]).expect("it is there");
        assert_eq!(target.server().model.as_deref(), Some("demo"));
        let (stop, inputs) = (AtomicBool::new(false), ["a".to_owned()]);
        let mut run =
            Run { target: &mut target, inputs: &inputs, n_pictures: 1, stop: &stop, truths: None, on_record: &mut |_| {} };
        run.go(&Load::Closed(1), Length { queries: 1, time: Duration::ZERO }, false).remove(0)
    }

    #[test]
    fn pieces_are_timed_as_they_come() {
        let record = ask_once(concat!(
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"a \"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"star\"}}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"completion_tokens\":3}}\n\ndata: [DONE]\n",
        ));
        assert_eq!((record.output.as_str(), record.n_tokens, record.error.as_deref()), ("a star", 3, None));
        assert!(record.gaps_ms.len() == 1 && record.gaps_ms[0] > 10.0, "{record:?}");
        assert!(record.time_to_first_token_ms().expect("it wrote") < record.latency_ms());
    }

    #[test]
    fn scores_and_vectors_come_at_once() {
        let scores = r#"{"object":"list","data":[{"index":0,"object":"score","score":0.75},{"index":1,"score":0.5}]}"#;
        let record = ask_for(Wanted::Scores(vec!["a".into(), "b".into()]), scores);
        assert_eq!((record.output.as_str(), record.n_tokens, record.error), ("0.7500 0.5000", 0, None));
        let vector = ask_for(Wanted::Vector, r#"{"data":[{"embedding":[0.25,-1.5]}],"usage":{"prompt_tokens":3}}"#);
        assert_eq!(vector.output, digest(&[0.25, -1.5]));
        for answer in [r#"{"data":[]}"#, r#"{"data":[{"index":0}]}"#, r#"{"detail":"what?"}"#] {
            let error = ask_for(Wanted::Vector, answer).error.expect("nothing of use");
            assert!(error.contains("neither scores nor vectors"), "{error}");
        }
    }

    #[test]
    fn what_goes_wrong_is_the_record_s_error() {
        for (answer, part) in [
            ("no room", "status 429: no room"),
            ("data: {\"choices\":[{\"delta\":{\"content\":\"a \"}}]}\n", "broke off"),
            ("data: {\"error\":{\"message\":\"out of memory\"}}\n", "out of memory"),
            ("data: {\n", "no JSON"),
        ] {
            let error = ask_once(answer).error.expect("it failed");
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_server_that_is_of_no_use_is_refused_before_anything_is_measured() {
        let refused = |server: Server| Http::connect(server, &[]).err().expect("it is of no use").to_string();
        let closed = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("it is bound");
        let server = serve("data:");
        for (server, part) in [
            (Server { url: format!("http://{closed}/v1"), ..server.clone() }, "refused"),
            (Server { key: None, ..server.clone() }, "status 401: who is there?"),
            (Server { model: Some("other".into()), ..server.clone() }, "no model `other`, but demo"),
            (Server { url: "no url".into(), ..server }, "no url/models"),
        ] {
            let error = refused(server);
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_request_has_the_picture_and_what_was_wanted() {
        let body = |wanted| {
            let request = Asked { picture: [0x89, b'P', b'N', b'G'].as_slice().into(), wanted }.request("demo");
            (request.route, serde_json::from_str::<Value>(&request.body).expect("it is JSON"))
        };
        let (route, body_of_scores) = body(Wanted::Scores(vec!["a star".into(), "a ring".into()]));
        assert_eq!((route, &body_of_scores["text_1"]), ("score", &json!(["a star", "a ring"])));
        assert_eq!(body_of_scores["text_2"]["content"].as_array().map(Vec::len), Some(2));
        let (route, body_of_vector) = body(Wanted::Vector);
        assert_eq!((route, &body_of_vector["model"]), ("embeddings", &json!("demo")));
        assert_eq!(body_of_vector["messages"][0]["content"][0]["type"], "image_url");
        let (route, body) = body(Wanted::Text { text: String::new(), tokens: Some(20), beams: Some(5) });
        assert_eq!(route, "chat/completions");
        assert_eq!(body["messages"][0]["content"][0]["image_url"]["url"], "data:image/png;base64,iVBORw==");
        assert_eq!((&body["max_tokens"], &body["best_of"], &body["stream"]), (&json!(20), &json!(5), &json!(true)));
        assert!(body["messages"][0]["content"][1].is_null());
    }
}
