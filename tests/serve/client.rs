//! A server that a test has started, and what asks it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

pub const PATIENCE: Duration = Duration::from_secs(60);
/// Connections that clients of one server keep.
const N_KEPT: usize = 100;

/// A process that ends with the test.
pub struct Server {
    child: Child,
    /// Ends the process if the test ends without dropping this, as it does with what is static.
    watcher: Child,
    pub address: String,
    /// Of gRPC, if it has one.
    pub grpc: String,
    pub said: Arc<Mutex<String>>,
    agent: ureq::Agent,
    key: Option<&'static str>,
}

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub text: String,
    pub bytes: Vec<u8>,
}

pub fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

pub fn sample(n: usize) -> Vec<u8> {
    std::fs::read(at(&format!("models/samples/{n}.png"))).unwrap()
}

/// A picture as native routes take it.
pub fn picture(n: usize) -> Value {
    json!({"data": BASE64_STANDARD.encode(sample(n))})
}

/// A picture as OpenAI's routes take it.
pub fn image_url(n: usize) -> Value {
    json!({"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{}", BASE64_STANDARD.encode(sample(n)))}})
}

impl Server {
    /// On tiny bundles that write, match and answer questions.
    pub fn start(options: &[&str]) -> Self {
        Self::on(&["tests/bundles/t5", "tests/bundles/stage1", "tests/bundles/vqa-opt"], options)
    }

    /// On these bundles. It is ready when this returns.
    pub fn on(bundles: &[&str], options: &[&str]) -> Self {
        let mut server = Self::begun(bundles, options);
        server.key = None;
        server.wait_ready();
        server
    }

    /// With a key that it asks for.
    pub fn keyed(key: &'static str, options: &[&str]) -> Self {
        let mut server = Self::begun(&["tests/bundles/t5"], options);
        server.key = Some(key);
        server.wait_ready();
        server
    }

    /// As `on`, behind whoever asks where both want a processor: clients that wait for one would measure themselves.
    pub fn behind(bundles: &[&str], options: &[&str]) -> Self {
        let mut command = Command::new("nice");
        command.args(["-n", "10", env!("CARGO_BIN_EXE_blip2")]);
        let server = Self::run(command, bundles, options);
        server.wait_ready();
        server
    }

    /// On these bundles; whether it is ready is not known.
    pub fn begun(bundles: &[&str], options: &[&str]) -> Self {
        Self::run(Command::new(env!("CARGO_BIN_EXE_blip2")), bundles, options)
    }

    fn run(mut command: Command, bundles: &[&str], options: &[&str]) -> Self {
        command.args(["serve", "--listen", "127.0.0.1:0", "--provider", "cpu"]).args(options);
        if !options.contains(&"--threads") {
            command.args(["--threads", "1"]);
        }
        for bundle in bundles {
            command.arg("--model").arg(at(bundle)); // one that is absolute stays as it is
        }
        command.env_remove("BLIP2_MODEL").current_dir(at("")).stderr(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        let watcher = watcher(child.id());
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut last = String::new();
        let (address, grpc) = loop {
            let mut line = String::new();
            assert!(lines.read_line(&mut line).unwrap() > 0, "it ended before it listened: {last}");
            if let Some((_, rest)) = line.split_once("http://") {
                let first = |text: &str| text.split_whitespace().next().unwrap_or_default().to_owned();
                break (first(rest), rest.split_once("grpc://").map(|(_, rest)| first(rest)).unwrap_or_default());
            }
            last = line;
        };
        let said = Arc::new(Mutex::new(String::new()));
        let into = said.clone();
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let mut said = into.lock().unwrap();
                said.push_str(&line);
                said.push('\n');
            }
        });
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE));
        // Its clients keep their connections, as a proxy does: with each new one `ureq` looks the name up on a new thread.
        let config = config.max_idle_connections(N_KEPT).max_idle_connections_per_host(N_KEPT);
        Self { child, watcher, address, grpc, said, agent: config.build().into(), key: None }
    }

    fn wait_ready(&self) {
        let start = Instant::now();
        while self.get("/health/ready").status != 200 {
            assert!(start.elapsed() < PATIENCE, "it is not ready: {}", self.said.lock().unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn get(&self, path: &str) -> Reply {
        let request = self.agent.get(self.url(path));
        let request = if let Some(key) = self.key { request.header("authorization", format!("Bearer {key}")) } else { request };
        reply(request.call())
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_with(path, body, &[])
    }

    pub fn post_with(&self, path: &str, body: &Value, headers: &[(&str, &str)]) -> Reply {
        let mut request = self.agent.post(self.url(path)).header("content-type", "application/json");
        if let Some(key) = self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        reply(request.send(body.to_string()))
    }

    /// Bytes that are no JSON, or not alone.
    pub fn post_bytes(&self, path: &str, body: &[u8], headers: &[(&str, &str)]) -> Reply {
        let mut request = self.agent.post(self.url(path));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        reply(request.send(body))
    }

    pub fn delete(&self, path: &str) -> Reply {
        reply(self.agent.delete(self.url(path)).call())
    }

    /// What comes back to bytes that need be no HTTP; the connection is closed behind them.
    pub fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // A server may refuse before it has read everything.
        let _ = stream.write_all(bytes);
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        String::from_utf8_lossy(&said).into_owned()
    }

    /// A request whose answer nobody waits for.
    pub fn send_only(&self, path: &str, body: &Value) -> TcpStream {
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body.as_bytes()).unwrap();
        stream
    }

    /// Texts and pictures in hand.
    pub fn in_hand(&self) -> u64 {
        self.get("/load").json()["server_load"].as_u64().unwrap()
    }

    /// Waits until as many are in hand.
    pub fn wait_in_hand(&self, wanted: impl Fn(u64) -> bool) {
        let start = Instant::now();
        while !wanted(self.in_hand()) {
            assert!(start.elapsed() < PATIENCE, "{} are in hand: {}", self.in_hand(), self.said.lock().unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap().success());
    }

    /// How it ended.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "it does not end: {}", self.said.lock().unwrap());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.watcher.kill();
        let _ = self.watcher.wait();
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until nobody holds the other end of its standard input, then ends a process.
fn watcher(process: u32) -> Child {
    let script = ["-c", "cat; kill -9 $0", &process.to_string()];
    Command::new("sh").args(script).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The JSON of an answer that is one.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }

    /// What is said of a refusal.
    pub fn refused(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.text);
        self.json()["error"]["message"].as_str().unwrap().to_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

fn reply(response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Reply {
    let mut response = response.unwrap();
    let bytes = response.body_mut().read_to_vec().unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Reply { status: response.status().as_u16(), headers: response.headers().clone(), text, bytes }
}
