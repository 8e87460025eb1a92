//! What a server is told: a file of TOML, overridden by flags and the environment.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use url::Url;

use super::ServeError;
use crate::pixels;
use crate::runtime::ProviderChoice;

/// Everything that can be set. A file need name only what differs from [`Config::default`].
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where requests come in. Another address than loopback needs `keys`, or `open`.
    pub listen: SocketAddr,
    /// Where `/metrics` and `/admin` are, if not beside the rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_listen: Option<SocketAddr>,
    /// Where gRPC is, if anywhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_listen: Option<SocketAddr>,
    /// A file of bearer keys, one a line, each behind a name and a colon. It is read again when it changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keys: Option<PathBuf>,
    /// Whether anybody who reaches another address than loopback may ask without a key.
    pub open: bool,
    /// After a SIGTERM, how long requests are still taken while `/health/ready` says that none should come: for balancers that learn it late.
    pub grace_s: f64,
    /// Then, how long running requests may take.
    pub drain_s: f64,
    /// The bundles; the first that can do what a request asks for does it, if the request names none.
    pub models: Vec<ModelConfig>,
    /// What a request may be, and how many.
    pub limits: Limits,
    /// What is kept of pictures.
    pub cache: CacheConfig,
    /// Pictures behind addresses.
    pub remote: RemoteConfig,
    /// What is written to standard error.
    pub log: LogConfig,
    /// Where traces go, if anywhere.
    pub traces: TraceConfig,
}

/// A bundle.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// What requests call it; the folder's name if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its folder.
    pub path: PathBuf,
    /// Where its graphs run, if not where --provider says.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "as_text")]
    pub provider: Option<ProviderChoice>,
    /// Which of the provider's devices, if not the one of --device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<u32>,
    /// Threads inside an operator, if not as many as --threads says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<std::num::NonZeroUsize>,
    /// Whether it waits for `/admin/models/NAME/load`.
    #[serde(default)]
    pub unloaded: bool,
}

/// What a request may be, and how many.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Pictures and texts in hand at once, of each model; who comes then is refused with 429. More are answered in a second where a device
    /// takes more rows at once, and each waits longer.
    pub max_in_hand: usize,
    /// How long one may wait in line before it is refused with 503.
    pub max_wait_s: f64,
    /// Bytes of a request's body, behind any compression.
    pub max_body_bytes: usize,
    /// Bytes of all bodies that are being read or wait.
    pub max_bodies_bytes: usize,
    /// Pixels of a picture, checked before it is decoded.
    pub max_pixels: u64,
    /// Longest side of a picture.
    pub max_side: u32,
    /// Pictures of one request.
    pub max_pictures: usize,
    /// Texts of one request, for each picture.
    pub max_texts: usize,
    /// Rows × new tokens of one text: what one request may make the language model do.
    pub max_cost: usize,
    /// Connections at once.
    pub max_connections: usize,
    /// Until a request's head is there, and so how long a connection may be idle between two requests.
    pub head_timeout_s: f64,
    /// Until a request's body is there.
    pub body_timeout_s: f64,
    /// Requests a second of one key, on average; 0 is without a limit.
    pub requests_per_s: f64,
}

/// What is kept of pictures.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Memory for what was made of pictures that may come again, of each model; 0 keeps nothing.
    pub bytes: u64,
    /// Memory for what `/images` made, of all models.
    pub images_bytes: u64,
    /// How long an `image_id` is good for after it was used last.
    pub images_s: f64,
}

/// Pictures behind addresses. Without hosts none is fetched.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RemoteConfig {
    /// Hosts from which pictures are fetched, over https: `images.example.org`, or `*.example.org` for all below.
    pub allow: Vec<String>,
}

/// What is written to standard error.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// How a line looks.
    pub format: LogFormat,
    /// `error`, `warn`, `info` or `debug`; at `info`, a line for every request.
    pub level: String,
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// Where traces go, if anywhere.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct TraceConfig {
    /// An OpenTelemetry collector that takes OTLP over HTTP, such as `http://127.0.0.1:4318`; without a path, `/v1/traces` is its.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Url>,
    /// The share of requests that are traced, from 0 to 1; a request that is part of a trace already is traced if the rest of it is.
    pub share: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: (Ipv4Addr::LOCALHOST, 8000).into(),
            admin_listen: None,
            grpc_listen: None,
            keys: None,
            open: false,
            grace_s: 0.0,
            drain_s: 30.0,
            models: Vec::new(),
            limits: Limits::default(),
            cache: CacheConfig::default(),
            remote: RemoteConfig::default(),
            log: LogConfig::default(),
            traces: TraceConfig::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_in_hand: 16,
            max_wait_s: 30.0,
            max_body_bytes: 32 << 20,
            max_bodies_bytes: 512 << 20,
            max_pixels: 40_000_000,
            max_side: 65_535,
            max_pictures: 64,
            max_texts: 256,
            max_cost: 8192,
            max_connections: 1024,
            head_timeout_s: 30.0,
            body_timeout_s: 30.0,
            requests_per_s: 0.0,
        }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { bytes: 256 << 20, images_bytes: 256 << 20, images_s: 600.0 }
    }
}

impl Default for TraceConfig {
    fn default() -> Self {
        Self { endpoint: None, share: 1.0 }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::default(), level: "info".into() }
    }
}

impl Config {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ServeError> {
        let text = std::fs::read_to_string(path).map_err(|source| ServeError::File { path: path.into(), source })?;
        toml::from_str(&text).map_err(|source| ServeError::Config { path: path.into(), source: Box::new(source) })
    }

    /// As a file has it.
    pub fn written(&self) -> String {
        toml::to_string(self).expect("it is made of what TOML has")
    }

    /// Refuses what cannot be meant; says nothing about what is not there yet, such as bundles.
    pub fn check(&self) -> Result<(), ServeError> {
        let limits = &self.limits;
        let seconds = [
            ("grace_s", self.grace_s),
            ("drain_s", self.drain_s),
            ("limits.max_wait_s", limits.max_wait_s),
            ("limits.head_timeout_s", limits.head_timeout_s),
            ("limits.body_timeout_s", limits.body_timeout_s),
            ("limits.requests_per_s", limits.requests_per_s),
            ("cache.images_s", self.cache.images_s),
        ];
        if let Some((name, found)) = seconds.into_iter().find(|(_, found)| !(0.0..=1e7).contains(found)) {
            return Err(ServeError::Value(format!("{name} is {found}; it must be from 0 to 10000000")));
        }
        let counts = [
            ("limits.max_in_hand", limits.max_in_hand),
            ("limits.max_body_bytes", limits.max_body_bytes),
            ("limits.max_pictures", limits.max_pictures),
            ("limits.max_texts", limits.max_texts),
            ("limits.max_cost", limits.max_cost),
            ("limits.max_connections", limits.max_connections),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, found)| *found == 0) {
            return Err(ServeError::Value(format!("{name} must be at least 1")));
        }
        if limits.max_bodies_bytes < limits.max_body_bytes {
            return Err(ServeError::Value("limits.max_bodies_bytes is less than one body may have (limits.max_body_bytes)".into()));
        }
        if !["error", "warn", "info", "debug", "off"].contains(&self.log.level.as_str()) {
            return Err(ServeError::Value(format!(
                "log.level is {:?}; error, warn, info, debug and off are known",
                self.log.level
            )));
        }
        self.check_traces()?;
        self.check_names()?;
        self.check_openness()
    }

    /// The names by which requests ask for models, in order.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.models.iter().map(ModelConfig::name)
    }

    /// What a picture may be.
    pub fn picture_limits(&self) -> pixels::Limits {
        let Limits { max_pixels, max_side, max_body_bytes, .. } = self.limits;
        pixels::Limits { max_bytes: max_body_bytes as u64, max_pixels, max_side }
    }

    fn check_traces(&self) -> Result<(), ServeError> {
        let TraceConfig { endpoint, share } = &self.traces;
        if let Some(endpoint) = endpoint.as_ref().filter(|endpoint| !["http", "https"].contains(&endpoint.scheme())) {
            return Err(ServeError::Value(format!("traces.endpoint is {endpoint}; it must be an address of http or https")));
        }
        if !(0.0..=1.0).contains(share) {
            return Err(ServeError::Value(format!("traces.share is {share}; it must be from 0 to 1")));
        }
        Ok(())
    }

    fn check_names(&self) -> Result<(), ServeError> {
        let names: Vec<_> = self.names().collect();
        if names.is_empty() {
            return Err(ServeError::Value("there is no model; name a bundle with --model DIR or under [[models]]".into()));
        }
        for (place, name) in names.iter().enumerate() {
            let is_plain = |char: char| char.is_ascii_alphanumeric() || "-_.".contains(char);
            if name.is_empty() || !name.chars().all(is_plain) || name.starts_with('.') {
                return Err(ServeError::Value(format!("a model's name has letters, digits, `-`, `_` and `.`; `{name}` has not")));
            }
            if names[..place].contains(name) {
                return Err(ServeError::Value(format!("two models are called `{name}`; give one another `name`")));
            }
        }
        Ok(())
    }

    fn check_openness(&self) -> Result<(), ServeError> {
        let addresses = std::iter::once(self.listen).chain(self.admin_listen).chain(self.grpc_listen);
        match addresses.into_iter().find(|address| !address.ip().is_loopback()) {
            Some(address) if self.keys.is_none() && !self.open => Err(ServeError::Open(address)),
            _ => Ok(()),
        }
    }
}

impl ModelConfig {
    /// A bundle as the command line names it.
    pub fn at(path: PathBuf) -> Self {
        Self { name: None, path, provider: None, device: None, threads: None, unloaded: false }
    }

    /// What requests call it.
    pub fn name(&self) -> String {
        let of_folder = || {
            let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
        };
        self.name.clone().unwrap_or_else(of_folder)
    }
}

/// A provider as people write it.
mod as_text {
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    use crate::runtime::ProviderChoice;

    pub fn serialize<S: Serializer>(value: &Option<ProviderChoice>, to: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => to.collect_str(value),
            None => to.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<ProviderChoice>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse().map_err(de::Error::custom)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(text: &str, wanted: &str) {
        let found = toml::from_str::<Config>(text).map_err(|error| error.to_string());
        let found = found.and_then(|config| config.check().map_err(|error| error.to_string()));
        assert!(found.as_ref().is_err_and(|said| said.contains(wanted)), "{text}: {found:?}");
    }

    #[test]
    fn what_is_not_named_stays_as_it_is() {
        let config: Config = toml::from_str("[[models]]\npath = 'models/demo-opt'\n[limits]\nmax_in_hand = 3").unwrap();
        assert!(config.check().is_ok());
        assert_eq!((config.limits.max_in_hand, config.limits.max_pictures), (3, Limits::default().max_pictures));
        assert_eq!(config.names().collect::<Vec<_>>(), ["demo-opt"]);
    }

    #[test]
    fn what_is_written_can_be_read_again() {
        let config: Config = toml::from_str("[[models]]\npath = 'a'\nprovider = 'cuda'\n[remote]\nallow = ['x.org']").unwrap();
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::to_string(&toml::from_str::<Config>(&text).unwrap()).unwrap(), text);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let models = "models = [{path = 'a'}]\n";
        says("", "there is no model");
        says("models = [{path = 'a'}, {path = 'b/a'}]", "two models are called `a`");
        says("models = [{path = 'a', name = '../x'}]", "a model's name");
        says("modles = []", "unknown field `modles`");
        says(&format!("listen = '0.0.0.0:80'\n{models}"), "0.0.0.0:80");
        says(&format!("grpc_listen = '0.0.0.0:81'\n{models}"), "0.0.0.0:81");
        says(&format!("drain_s = -1\n{models}"), "drain_s is -1");
        says(&format!("drain_s = nan\n{models}"), "drain_s is NaN");
        says(&format!("{models}[limits]\nmax_in_hand = 0"), "limits.max_in_hand");
        says(&format!("{models}[log]\nlevel = 'loud'"), "log.level");
        says(&format!("{models}[traces]\nendpoint = 'ftp://x.org'"), "traces.endpoint is ftp://x.org");
        says(&format!("{models}[traces]\nendpoint = 'x.org'"), "endpoint");
        says(&format!("{models}[traces]\nshare = 1.5"), "traces.share is 1.5");
        assert!(toml::from_str::<Config>(&format!("listen = '[::1]:80'\n{models}")).unwrap().check().is_ok());
        assert!(toml::from_str::<Config>(&format!("listen = '0.0.0.0:80'\nopen = true\n{models}")).unwrap().check().is_ok());
    }
}
