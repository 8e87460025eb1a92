//! ONNX Runtime: the library, execution providers, graphs and tensors. The only door to `ort` and `half`.

mod cancel;
mod graph;
mod library;
mod memory;
mod provider;
mod tensor;
mod threads;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ort::environment::Environment;

use library::Loaded;
use threads::Threads;

pub use cancel::Cancel;
pub use graph::{Binding, Graph, Outputs, Place};
pub use library::{Library, LibraryError, Source};
pub use memory::Memory;
pub use provider::{Provider, ProviderChoice, ProviderError};
pub use tensor::{Tensor, f32_from};

/// What the user decides about the runtime.
#[derive(Clone, Debug, Default)]
pub struct RuntimeOptions {
    /// The ONNX Runtime library, or a folder that holds it; searched for when absent.
    pub library: Option<PathBuf>,
    /// Where graphs run.
    pub provider: ProviderChoice,
    /// Which GPU.
    pub device: u32,
    /// Threads inside an operator; ONNX Runtime's own choice (one a core) when absent. All sessions of a process share the pool of its
    /// first [`Runtime`]; those of a later one that asks for another number have a pool each.
    pub threads: Option<NonZeroUsize>,
    /// Where TensorRT keeps built engines; beside the bundle's files when absent.
    pub cache: Option<PathBuf>,
    /// Bytes that KV caches and logits of the texts written together may take. When absent, three quarters of the free memory on the
    /// processor; a GPU says itself when it is full.
    pub max_cache_bytes: Option<u64>,
}

/// A loaded library and a provider that works here.
#[derive(Debug)]
pub struct Runtime {
    environment: Environment,
    library: Library,
    provider: Provider,
    options: RuntimeOptions,
    /// The environment's.
    threads: Threads,
}

/// Why the runtime cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UnavailableError {
    /// No usable ONNX Runtime.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The library is there, the provider is not.
    #[error(transparent)]
    Provider(#[from] ProviderError),
    /// More threads than any machine has use for.
    #[error("{0} threads inside an operator are too many; at most {MOST_THREADS} are possible, and one a core is usual")]
    Threads(NonZeroUsize),
    /// The bundle needs a later version.
    #[error("the bundle needs ONNX Runtime {needed} or later, {} is {found}", .path.display())]
    TooOld {
        /// Lowest version that will do.
        needed: String,
        /// Version of the library.
        found: String,
        /// The library.
        path: PathBuf,
    },
}

/// Threads that may be asked for; with many more ONNX Runtime comes to a standstill.
const MOST_THREADS: usize = 256;

/// What ONNX Runtime reports.
pub type GraphError = ort::Error;

/// A graph failed while it ran. Cheap to clone: one failed run may belong to many requests.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RuntimeError {
    /// ONNX Runtime reports an error.
    #[error("{graph}: {doing} failed")]
    Failed {
        /// Which graph.
        graph: String,
        /// What was tried.
        doing: &'static str,
        /// What ONNX Runtime says.
        source: Arc<ort::Error>,
    },
    /// It was stopped from outside; see [`Cancel`].
    #[error("{graph}: the run was stopped from outside")]
    Cancelled {
        /// Which graph.
        graph: String,
    },
    /// The graph cannot run on what it is made for.
    #[error("{graph}: the graph cannot run: {reason}")]
    Refused {
        /// Which graph.
        graph: String,
        /// What ONNX Runtime says, in one sentence.
        reason: String,
    },
    /// A graph gives something else than it promises.
    #[error("{graph}: `{output}` came out as {found:?}, the bundle says {expected}")]
    Shape {
        /// Which graph.
        graph: String,
        /// Which output.
        output: String,
        /// Its sizes.
        found: Vec<usize>,
        /// What was promised.
        expected: String,
    },
    /// The weights, the input or the precision do not hold up.
    #[error("{graph}: `{output}` holds values that are not numbers")]
    NotANumber {
        /// Which graph.
        graph: String,
        /// Which output.
        output: String,
    },
    /// A text needs more than there is.
    #[error(
        "{rows} rows of {positions} positions need {needed} bytes for keys, values and logits, {allowed} may be used; \
         ask for fewer beams, texts or tokens, or allow more (max-cache-bytes)"
    )]
    NoRoom {
        /// Rows side by side.
        rows: usize,
        /// Positions of a row.
        positions: usize,
        /// Bytes that they take.
        needed: u64,
        /// Bytes that may be used.
        allowed: u64,
    },
}

impl RuntimeError {
    /// Whether the bundle is at fault rather than the machine: the engine gives graphs nothing that their facts do not allow.
    pub fn blames_the_bundle(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Shape { .. } | Self::NotANumber { .. })
    }
}

impl RuntimeOptions {
    fn pool(&self) -> Threads {
        Threads { count: self.threads, spin: true }
    }
}

impl Runtime {
    /// Finds and loads the library and settles on a provider.
    pub fn load(options: &RuntimeOptions) -> Result<Self, UnavailableError> {
        if let Some(threads) = options.threads.filter(|threads| threads.get() > MOST_THREADS) {
            return Err(UnavailableError::Threads(threads));
        }
        let Loaded { library, environment, threads } = library::load(options.library.as_deref(), options.pool())?;
        let provider = provider::choose(&environment, options)?;
        Ok(Self { environment, library, provider, options: options.clone(), threads })
    }

    /// The library in use.
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// The provider in use.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// How much of it KV caches and logits may take.
    pub fn memory(&self) -> Memory {
        Memory { limit: self.options.max_cache_bytes, is_host: self.provider == Provider::Cpu }
    }

    /// Why `provider` cannot be used here, or nothing if it can.
    pub fn probe(&self, provider: Provider) -> Result<(), ProviderError> {
        provider::probe(&self.environment, provider, &self.options)
    }

    /// Refuses a library older than `needed` (`major.minor`).
    pub fn require(&self, needed: &str) -> Result<(), UnavailableError> {
        if version(&self.library.version) >= version(needed) {
            return Ok(());
        }
        let (found, path) = (self.library.version.clone(), self.library.path.clone());
        Err(UnavailableError::TooOld { needed: needed.into(), found, path })
    }

    fn cache(&self, beside: &Path) -> PathBuf {
        self.options.cache.clone().unwrap_or_else(|| beside.join(".tensorrt"))
    }
}

fn version(text: &str) -> (u32, u32) {
    let mut parts = text.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}
