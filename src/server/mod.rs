//! `blip2 serve`: bundles behind HTTP and gRPC.
//!
//! A request is recognised, admitted, read, asked and answered, each in one file: `connection` limits what reaches the router, `guard`
//! knows callers, counts and refuses, `body` and `picture` read what a request says within its limits, `call` turns it into jobs, `worker`
//! hands them to a [`service`](crate::service) and is the only place where what is asked meets what blocks. `routes` has a file for each
//! route, `kserve` those of a protocol of its own; one `match` in `error` says which status goes with what. Handlers hold no locks and run no inference.

mod body;
mod call;
mod config;
mod connection;
mod error;
mod fleet;
mod guard;
mod images;
mod keys;
mod kserve;
mod log;
mod metrics;
mod picture;
mod remote;
mod routes;
mod traces;
mod worker;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::error::Error;
use crate::runtime::RuntimeOptions;

pub use config::{CacheConfig, Config, Limits, LogConfig, LogFormat, ModelConfig, RemoteConfig, TraceConfig};
pub use log::start as start_log;
pub use routes::openapi;
pub use url::Url;

use fleet::Fleet;
use images::Images;
use keys::Keys;
use metrics::Metrics;
use remote::Remote;
use traces::Traces;

/// Threads that parse and answer; what computes has its own.
const N_THREADS: usize = 2;

/// Pictures that are fetched at once: each holds a thread, and may hold as many bytes as a body.
const N_FETCHES: usize = 16;

/// What is spoken at an address, and the address.
pub type Address = (&'static str, SocketAddr);

/// Why a server does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A file cannot be read.
    #[error("{} cannot be read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The configuration is no TOML, or names what is not known.
    #[error("{}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: Box<toml::de::Error>,
    },
    /// A value that cannot be meant.
    #[error("{0}")]
    Value(String),
    /// The file of keys makes no sense.
    #[error("{}: {why}", path.display())]
    Keys {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Anybody could ask from anywhere.
    #[error("{0} can be reached from elsewhere, and there are no keys: name a file of them with --keys, or say --open")]
    Open(SocketAddr),
    /// An address cannot be listened on.
    #[error("{address} cannot be listened on")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The runtime of the server's own threads cannot be made.
    #[error("the server's threads cannot be started")]
    Threads(#[source] std::io::Error),
    /// A bundle is at fault.
    #[error(transparent)]
    Engine(#[from] Error),
}

/// What all handlers know.
pub struct App {
    config: Config,
    fleet: Fleet,
    keys: Option<Arc<Keys>>,
    /// Who asks where there are no keys.
    anybody: keys::Caller,
    metrics: Metrics,
    images: Images,
    remote: Remote,
    traces: Option<Traces>,
    /// Pictures that may be fetched at once.
    fetches: Semaphore,
    /// Room for bodies, in steps of [`body::ROOM_STEP`] bytes.
    bodies: Arc<Semaphore>,
    is_leaving: AtomicBool,
    is_draining: AtomicBool,
}

/// Serves until the process is told to stop; `tell` gets the addresses once they are listened on. A second signal stops at once.
pub fn serve(config: Config, runtime: &RuntimeOptions, tell: impl FnOnce(&[Address])) -> Result<(), ServeError> {
    config.check()?;
    let app = App::start(config, runtime)?;
    let threads = tokio::runtime::Builder::new_multi_thread().worker_threads(N_THREADS).enable_all().build();
    let threads = threads.map_err(ServeError::Threads)?;
    let served = threads.block_on(app.serve(tell));
    // What still blocks has been given up by its callers.
    threads.shutdown_timeout(Duration::from_millis(100));
    served
}

impl App {
    fn start(config: Config, runtime: &RuntimeOptions) -> Result<Arc<Self>, ServeError> {
        let rate = config.limits.requests_per_s;
        let keys = config.keys.as_deref().map(|path| Keys::open(path, rate)).transpose()?;
        let remote = Remote::new(&config.remote.allow).map_err(|error| ServeError::Value(error.to_string()))?;
        let traces = Traces::start(&config.traces)?;
        let metrics = Metrics::new();
        let fleet = Fleet::start(&config, runtime, &metrics)?;
        let (images, room) = (Images::new(&config.cache), config.limits.max_bodies_bytes / body::ROOM_STEP);
        let bodies = Arc::new(Semaphore::new(room.min(Semaphore::MAX_PERMITS)));
        let fetches = Semaphore::new(N_FETCHES);
        let anybody = keys::Caller::anybody(rate);
        let (is_leaving, is_draining) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Arc::new(Self {
            config,
            fleet,
            keys,
            anybody,
            metrics,
            images,
            remote,
            traces,
            fetches,
            bodies,
            is_leaving,
            is_draining,
        }))
    }

    async fn serve(self: Arc<Self>, tell: impl FnOnce(&[Address])) -> Result<(), ServeError> {
        let mut listeners = vec![(listen(self.config.listen).await?, routes::all(&self))];
        if let Some(address) = self.config.admin_listen {
            listeners.push((listen(address).await?, routes::admin(&self)));
        }
        let schemes = vec!["http"; listeners.len()].into_iter().chain(["grpc"]);
        if let Some(address) = self.config.grpc_listen {
            listeners.push((listen(address).await?, routes::of_grpc(&self)));
        }
        let addresses = schemes.zip(&listeners).filter_map(|(scheme, (listener, _))| Some((scheme, listener.local_addr().ok()?)));
        tell(&addresses.collect::<Vec<_>>());
        connection::serve(&self, listeners).await;
        if let Some(traces) = &self.traces {
            traces.finish();
        }
        Ok(())
    }

    /// Whether requests should come here.
    fn is_ready(&self) -> bool {
        !self.is_leaving() && self.fleet.is_ready()
    }

    fn is_leaving(&self) -> bool {
        self.is_leaving.load(Ordering::Relaxed)
    }

    /// No more requests should come.
    fn leave(&self) {
        self.is_leaving.store(true, Ordering::Relaxed);
    }

    /// Whether requests that come nevertheless are refused.
    fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    fn drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// Whether only this machine can ask, and without a key.
    fn is_private(&self) -> bool {
        self.keys.is_none() && !self.config.open
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|source| ServeError::Listen { address, source })
}
