//! `blip2 serve`: bundles behind HTTP and gRPC.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::Failure;
use super::args::{ModelFolder, Run};
use super::plain::plain;
use crate::bundle::Bundle;
use crate::error::Error;
use crate::runtime::RuntimeOptions;
use crate::server::{self, Config, LogFormat, ModelConfig, Url};

/// What `blip2 serve` takes. Flags and the environment stand over the file.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Serve {
    /// A file of settings in TOML; --check shows all that there are
    #[arg(long, value_name = "FILE", env = "BLIP2_CONFIG")]
    config: Option<PathBuf>,
    /// A bundle; may be given several times, in the place of those that the file names [default: models/demo-opt, here or in a folder above
    /// the executable]
    #[arg(long, value_name = "DIR", env = "BLIP2_MODEL", value_delimiter = ',')]
    model: Vec<PathBuf>,
    /// Where requests come in [default: 127.0.0.1:8000]
    #[arg(long, value_name = "ADDRESS", env = "BLIP2_LISTEN")]
    listen: Option<SocketAddr>,
    /// Another address for /metrics and /admin, which are then nowhere else
    #[arg(long, value_name = "ADDRESS", env = "BLIP2_ADMIN_LISTEN")]
    admin_listen: Option<SocketAddr>,
    /// Where the Open Inference Protocol is spoken over gRPC, if anywhere
    #[arg(long, value_name = "ADDRESS", env = "BLIP2_GRPC_LISTEN")]
    grpc_listen: Option<SocketAddr>,
    /// A file of bearer keys in TOML: a table for each caller, with `key`, and if wanted `priority` and `requests_per_s`; it is read again
    /// when it changes
    #[arg(long, value_name = "FILE", env = "BLIP2_KEYS")]
    keys: Option<PathBuf>,
    /// Let anybody ask who reaches another address than loopback, without a key
    #[arg(long)]
    open: bool,
    /// Texts and pictures in hand at once, of each model; who comes then is told to come again; accelerators take more at once [default: 16]
    #[arg(long, value_name = "N")]
    max_in_hand: Option<usize>,
    /// Memory for what was made of pictures that may come again, of each model; 0 keeps nothing [default: 256MiB]
    #[arg(long, value_name = "N", value_parser = super::args::bytes)]
    cache_bytes: Option<u64>,
    /// After SIGTERM, for how many seconds requests are still taken while /health/ready says that none should come: for balancers that learn
    /// it late [default: 0]
    #[arg(long, value_name = "S")]
    grace: Option<f64>,
    /// Then, how many seconds running requests may take [default: 30]
    #[arg(long, value_name = "S")]
    drain: Option<f64>,
    /// How a line of the log looks
    #[arg(long, value_name = "text|json", env = "BLIP2_LOG_FORMAT", value_parser = log_format)]
    log_format: Option<LogFormat>,
    /// What is logged: error, warn, info, debug or off; at info, a line for every request
    #[arg(long, value_name = "LEVEL", env = "BLIP2_LOG")]
    log: Option<String>,
    /// An OpenTelemetry collector that gets traces by OTLP over HTTP, such as http://127.0.0.1:4318 [default: none are made]
    #[arg(long, value_name = "URL", env = "BLIP2_TRACES")]
    traces: Option<Url>,
    /// Check the settings and the bundles, print what holds, and end
    #[arg(long)]
    check: bool,
    /// Print the OpenAPI document of the routes, and end
    #[arg(long, exclusive = true)]
    openapi: bool,
    #[command(flatten)]
    run: Run,
}

pub(super) fn run(command: &Serve) -> Result<(), Failure> {
    if command.openapi {
        println!("{}", server::openapi());
        return Ok(());
    }
    let (config, runtime) = (command.config()?, RuntimeOptions::from(&command.run));
    config.check().map_err(Failure::Serve)?;
    if command.check {
        for model in &config.models {
            Bundle::open(&model.path).map_err(Error::from)?;
        }
        print!("{}", config.written());
        return Ok(());
    }
    let names: Vec<String> = config.names().collect();
    server::start_log(&config.log);
    server::serve(config, &runtime, |addresses| {
        let at: Vec<String> = addresses.iter().map(|(scheme, address)| format!("{scheme}://{address}")).collect();
        eprintln!("blip2: {} on {}", plain(&names.join(", ")), at.join(" and "));
    })
    .map_err(Failure::Serve)
}

impl Serve {
    /// What holds: the file, and over it what was typed.
    fn config(&self) -> Result<Config, Failure> {
        let mut config = self.config.as_deref().map_or_else(|| Ok(Config::default()), Config::read).map_err(Failure::Serve)?;
        if !self.model.is_empty() {
            config.models = self.model.iter().cloned().map(ModelConfig::at).collect();
        }
        if config.models.is_empty() {
            config.models.push(ModelConfig::at(ModelFolder { model: None }.path()));
        }
        config.listen = self.listen.unwrap_or(config.listen);
        config.admin_listen = self.admin_listen.or(config.admin_listen);
        config.grpc_listen = self.grpc_listen.or(config.grpc_listen);
        config.keys = self.keys.clone().or(config.keys);
        config.open |= self.open;
        config.limits.max_in_hand = self.max_in_hand.unwrap_or(config.limits.max_in_hand);
        config.cache.bytes = self.cache_bytes.unwrap_or(config.cache.bytes);
        config.grace_s = self.grace.unwrap_or(config.grace_s);
        config.drain_s = self.drain.unwrap_or(config.drain_s);
        config.log.format = self.log_format.unwrap_or(config.log.format);
        config.log.level = self.log.clone().unwrap_or(config.log.level);
        config.traces.endpoint = self.traces.clone().or(config.traces.endpoint);
        Ok(config)
    }
}

fn log_format(typed: &str) -> Result<LogFormat, String> {
    match typed {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("text and json are known".into()),
    }
}
