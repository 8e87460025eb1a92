//! ONNX Runtime: the library, execution providers, graphs and tensors. The only door to `ort` and `half`.

mod bytes;
mod cancel;
mod copies;
mod engines;
mod graph;
mod library;
mod memory;
mod model;
mod placement;
mod plugin;
mod processor;
mod provider;
mod recording;
mod rows;
mod settings;
mod tensor;
mod threads;
mod trial;
mod turn;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use ort::memory::MemoryInfo;
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};

use copies::Counters;
use library::Loaded;
use placement::Placement;
use provider::Work;
use threads::Threads;
use turn::Turn;

use crate::bundle::{Bundle, BundleError, Load, Reckoning};
pub use cancel::Cancel;
pub use copies::Copies;
pub use engines::Purpose;
pub use graph::{Binding, Graph, Outputs, Place};
pub use library::{Library, LibraryError, Source};
pub use memory::{Budget, free as free_memory, installed_bytes};
pub use plugin::{Known, Offer, PLUGINS, Plugin};
pub use processor::{Extension, Gain, Processor};
pub use provider::{Choice, Fallback, Provider, ProviderChoice, ProviderError};
pub use recording::Recording;
pub use rows::{Move, Mover, Row};
pub use settings::ComputeType;
pub use tensor::{Tensor, f32_from};
pub use threads::default_threads;
pub use trial::Trial;

/// What the user decides about the runtime.
#[derive(Clone, Debug, Default)]
pub struct RuntimeOptions {
    /// The ONNX Runtime library, or a folder that holds it; searched for when absent.
    pub library: Option<PathBuf>,
    /// Where graphs run.
    pub provider: ProviderChoice,
    /// Which GPU.
    pub device: u32,
    /// Threads inside an operator; [`default_threads`] when absent. All sessions of a process share the pool of its first [`Runtime`];
    /// those of a later one that asks for another number have a pool each.
    pub threads: Option<NonZeroUsize>,
    /// The library of the plugin that `provider` names, or a folder that holds it; searched for when absent.
    pub ep_library: Option<PathBuf>,
    /// Options of that plugin, by names without the provider's.
    pub ep_options: Vec<(String, String)>,
    /// What a provider computes in that can be told; float32 when absent.
    pub precision: Option<ComputeType>,
    /// What a provider that was asked for may leave to the processor.
    pub fallback: Fallback,
    /// Starts every kernel of a decode step on its own, where the GPU could record a step and repeat it whole.
    pub no_graph_capture: bool,
    /// Where TensorRT keeps built engines, in a folder for each bundle; under the user's cache folder when absent.
    pub cache: Option<PathBuf>,
    /// Bytes of the processor's memory that may be taken in all. A bundle that needs more is refused before it is loaded, and what it
    /// leaves is the most for KV caches and logits.
    pub memory_limit: Option<u64>,
    /// Bytes that KV caches and logits of the texts written together may take. When absent, three quarters of the free memory on the
    /// processor; a GPU says itself when it is full.
    pub max_cache_bytes: Option<u64>,
}

/// A loaded library and a provider that works here. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Runtime(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    loaded: Loaded,
    choice: Choice,
    options: RuntimeOptions,
    /// The memory of the device; none where graphs run in the processor's.
    device: Option<MemoryInfo<'static>>,
    counters: Counters,
    multiplies_bytes: OnceLock<bool>,
    notices: Mutex<Vec<String>>,
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
    /// The bundle needs more memory.
    #[error(
        "{}: it takes {needed}; {allowed}; use a bundle of lower precision or a smaller model, or allow more",
        .folder.display()
    )]
    Memory {
        /// The bundle.
        folder: PathBuf,
        /// The reckoning.
        needed: String,
        /// What there is, and who says so.
        allowed: String,
    },
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

/// Weights of one graph are prepared on all threads. As they are let go together at the end, they lie in memory twice until then: 996 MB
/// instead of 672 for a decoder of 478 MB, so it is for machines with more cores than graphs that load side by side, and without a limit.
const PARALLEL_PREPACKING: &str = "session.prepack.enable_parallel";
const GRAPHS_AT_ONCE: usize = 3;

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
    /// An engine is built for sizes of a range, and would be built again for others.
    #[error("{graph}: {axis} is {found}, its TensorRT engine was built for {least} to {most}; ask for fewer at a time")]
    Beyond {
        /// Which graph.
        graph: String,
        /// Which axis of its inputs.
        axis: String,
        /// Its size.
        found: usize,
        /// The least that the engine takes.
        least: usize,
        /// The most.
        most: usize,
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
    /// A plugin computes on threads of its own, often on the same cores.
    fn pool(&self) -> Threads {
        Threads { count: self.threads.unwrap_or_else(default_threads), spin: self.provider.plugin().is_none() }
    }
}

impl Runtime {
    /// Finds and loads the library and settles on a provider.
    pub fn load(options: &RuntimeOptions) -> Result<Self, UnavailableError> {
        if let Some(threads) = options.threads.filter(|threads| threads.get() > MOST_THREADS) {
            return Err(UnavailableError::Threads(threads));
        }
        let loaded = library::load(options.library.as_deref(), options.pool())?;
        let choice = provider::choose(&loaded, options)?;
        let provider = choice.provider;
        let device = provider::memory(&loaded, provider, options.device);
        let device = device.map_err(|source| ProviderError::Unusable { provider, source })?;
        if device.is_some() && options.fallback == Fallback::Graphs {
            return Err(ProviderError::NoGraphsBeside { provider }.into());
        }
        let (counters, multiplies_bytes, notices) = Default::default();
        let options = options.clone();
        Ok(Self(Arc::new(Shared { loaded, choice, options, device, counters, multiplies_bytes, notices })))
    }

    /// The library in use.
    pub fn library(&self) -> &Library {
        &self.0.loaded.library
    }

    /// The provider in use.
    pub fn provider(&self) -> Provider {
        self.0.choice.provider
    }

    /// The provider in use, and why not others.
    pub fn choice(&self) -> &Choice {
        &self.0.choice
    }

    /// What went between host and device so far.
    pub fn copies(&self) -> Copies {
        self.0.counters.read()
    }

    /// How much KV caches and logits of a bundle's texts may take.
    pub fn budget(&self, bundle: &Bundle) -> Result<Budget, BundleError> {
        let rest = |limit: u64| Ok(limit.saturating_sub(bundle.memory(Load::LEAST)?.without_texts()));
        let left = self.0.options.memory_limit.map(rest).transpose()?;
        let limit = self.0.options.max_cache_bytes.into_iter().chain(left).min();
        Ok(Budget { limit, is_host: !self.has_device() })
    }

    /// Refuses what needs more of the processor's memory than may be taken, or than is free.
    pub fn require_memory(&self, folder: &Path, needed: &Reckoning) -> Result<(), UnavailableError> {
        let asked = self.0.options.memory_limit;
        match asked.or_else(memory::free).filter(|_| !self.has_device()) {
            Some(allowed) if needed.peak() > allowed => {
                let source = if asked.is_some() { "may be taken (memory-limit)" } else { "are free (memory-limit says otherwise)" };
                let (folder, needed) = (folder.to_path_buf(), needed.to_string());
                Err(UnavailableError::Memory { folder, needed, allowed: format!("{:.0} MB {source}", allowed as f64 / 1e6) })
            }
            _ => Ok(()),
        }
    }

    /// Why `provider` cannot be used here with these options, or nothing if it can.
    pub fn probe(&self, provider: Provider, options: &RuntimeOptions) -> Result<(), ProviderError> {
        provider::probe(&self.0.loaded, provider, options).map(drop)
    }

    /// What a plugin's library brings, once the plugin was tried.
    pub fn offer(&self, plugin: Plugin) -> Option<Offer> {
        plugin.offer(&self.0.loaded.environment)
    }

    /// What users should know of the graphs that were opened, a line each.
    pub fn notices(&self) -> Vec<String> {
        self.0.notices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn notice(&self, line: String) {
        self.0.notices.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    /// Refuses a library older than `needed` (`major.minor`).
    pub fn require(&self, needed: &str) -> Result<(), UnavailableError> {
        if version(&self.0.loaded.library.version) >= version(needed) {
            return Ok(());
        }
        let (found, path) = (self.0.loaded.library.version.clone(), self.0.loaded.library.path.clone());
        Err(UnavailableError::TooOld { needed: needed.into(), found, path })
    }

    /// A session to be, on `provider` and as the user wants it.
    fn builder(&self, provider: Provider, work: Work<'_>) -> Result<SessionBuilder, ort::Error> {
        let builder = Session::builder(&self.0.loaded.environment)?.with_optimization_level(GraphOptimizationLevel::All)?;
        let is_parallel = self.0.options.pool().count.get() > GRAPHS_AT_ONCE && self.0.options.memory_limit.is_none();
        let builder = builder.with_config_entry(PARALLEL_PREPACKING, if is_parallel { "1" } else { "0" })?;
        let builder = self.0.options.pool().apply(self.0.loaded.threads, builder)?;
        provider::register(builder, &self.0.loaded, provider, &self.0.choice.settings, work)
    }

    /// What a bundle's engines are for here.
    pub fn purpose(&self, bundle: &Bundle) -> Purpose {
        Purpose::new(bundle, &self.library().version, self.0.options.device)
    }

    /// Where engines are kept: under the user's cache folder unless told otherwise.
    pub fn engines(&self) -> Option<PathBuf> {
        let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let home = || set("HOME").map(|home| home.join(".cache"));
        let users = || set("XDG_CACHE_HOME").or_else(home).map(|cache| cache.join("blip2").join("tensorrt"));
        self.0.options.cache.clone().or_else(users)
    }

    /// A session of a model made here. It runs on the provider or not at all: what it moves must not make a detour.
    fn small_session(&self, model: &[u8], work: Work<'_>) -> Result<Session, ort::Error> {
        let placement = Placement::default();
        let session = placement.listen(self.builder(self.provider(), work)?)?.commit_from_memory(model)?;
        let strangers = placement.strangers();
        match self.has_device() && !strangers.is_empty() {
            true => Err(ort::Error::new(format!("provider {} does not run {strangers}", self.provider()))),
            false => Ok(session),
        }
    }

    /// Whether products of 8-bit numbers come out right on the processor; tried once.
    fn multiplies_bytes(&self) -> Result<bool, ort::Error> {
        if let Some(known) = self.0.multiplies_bytes.get() {
            return Ok(*known);
        }
        let found = bytes::multiply(&self.0.loaded)?;
        Ok(*self.0.multiplies_bytes.get_or_init(|| found))
    }

    /// What may run on the processor, where a provider was asked for that is another.
    fn fallback(&self) -> Option<Fallback> {
        let asked = matches!(self.0.options.provider, ProviderChoice::Only(provider) if provider != Provider::Cpu);
        asked.then_some(self.0.options.fallback)
    }

    /// To be held while the provider is used.
    fn turn(&self) -> Turn {
        self.provider().turn()
    }

    fn has_device(&self) -> bool {
        self.0.device.is_some()
    }

    fn memory(&self, place: Place) -> MemoryInfo<'static> {
        self.0.device.clone().filter(|_| place == Place::Device).unwrap_or_default()
    }

    fn counters(&self) -> &Counters {
        &self.0.counters
    }

    /// Counts a tensor that is about to be bound for `place`.
    fn count(&self, tensor: &Tensor, place: Place) {
        match (tensor.is_on_host(), place) {
            (true, Place::Device) if self.has_device() => self.0.counters.up(tensor.n_bytes()),
            (false, Place::Host) => self.0.counters.down(tensor.n_bytes()),
            _ => {}
        }
    }
}

fn version(text: &str) -> (u32, u32) {
    let mut parts = text.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}
