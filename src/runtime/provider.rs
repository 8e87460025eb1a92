//! Execution providers: which there are, which one works here, how each is registered.

use std::path::PathBuf;
use std::str::FromStr;

use ort::ep::{self, ExecutionProviderDispatch};
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::session::builder::SessionBuilder;

use super::RuntimeOptions;
use super::engines::Engine;
use super::graph::sentence;
use super::library::Loaded;
use super::model::identity;
use super::plugin::{PLUGINS, Plugin};
use super::settings::{ComputeType, Settings};
use super::turn::Turn;
use crate::bundle::{Dtype, Precision};

/// A place where graphs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An NVIDIA GPU, through engines built by TensorRT; what it cannot take runs on CUDA.
    TensorRt,
    /// Whatever a plugin is for.
    Plugin(Plugin),
}

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProviderChoice {
    /// The first that works of CUDA and CPU.
    #[default]
    Auto,
    /// This one or an error.
    Only(Provider),
}

/// What may run on the processor though another provider was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// Nothing but the shapes of tensors.
    #[default]
    Nothing,
    /// Operators that the provider does not have.
    Operators,
    /// Whole graphs with such operators.
    Graphs,
}

/// The provider in use, and those that would have come before it.
#[derive(Debug)]
pub struct Choice {
    /// The provider.
    pub provider: Provider,
    /// Why others were passed over, in the order in which they were tried; empty where one was asked for.
    pub passed_over: Vec<(Provider, ProviderError)>,
    pub(super) settings: Settings,
}

/// Why a provider cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// ONNX Runtime cannot start it.
    #[error("provider `{provider}` is not usable here; `blip2 doctor` lists what is")]
    Unusable {
        /// The provider.
        provider: Provider,
        /// What ONNX Runtime says.
        source: ort::Error,
    },
    /// Its library is not found.
    #[error("provider `{plugin}` {}", how_to_get(*.plugin))]
    NoPlugin {
        /// The plugin.
        plugin: Plugin,
    },
    /// The place that was named holds no library.
    #[error("provider `{plugin}`: there is no plugin at {}; --ep-library takes {}", .path.display(), what_it_is(*.plugin))]
    NoLibrary {
        /// The plugin.
        plugin: Plugin,
        /// The place.
        path: PathBuf,
    },
    /// The file is no library, or none that this ONNX Runtime can use.
    #[error("provider `{plugin}`: ONNX Runtime cannot use {} as a plugin", .path.display())]
    Unloadable {
        /// The plugin.
        plugin: Plugin,
        /// The file.
        path: PathBuf,
        /// What ONNX Runtime says.
        source: ort::Error,
    },
    /// A process has one library of a plugin.
    #[error("provider `{plugin}`: {} cannot be loaded beside {}, which this process already uses", .path.display(), .loaded.display())]
    Another {
        /// The plugin.
        plugin: Plugin,
        /// What was asked for now.
        path: PathBuf,
        /// What was loaded before.
        loaded: PathBuf,
    },
    /// Its library is there, a device is not.
    #[error("provider `{plugin}` {}", finds(*.plugin, *.device, *.found))]
    NoDevice {
        /// The plugin.
        plugin: Plugin,
        /// What was asked for, from 0.
        device: u32,
        /// How many there are.
        found: usize,
    },
    /// A plugin's options for what is none.
    #[error("provider `{choice}` takes no --ep-option; plugins do ({})", names(PLUGINS.into_iter()))]
    NoPluginsOptions {
        /// What was asked for.
        choice: ProviderChoice,
    },
    /// An option that would be dropped without a word.
    #[error("provider `{plugin}` has no option `{option}`; it takes {}", .known.join(", "))]
    NoSuchOption {
        /// The plugin.
        plugin: Plugin,
        /// The option.
        option: String,
        /// Those that it has.
        known: &'static [&'static str],
    },
    /// An option whose value is not of its form.
    #[error("provider `{plugin}`: option `{option}` cannot be used: {reason}")]
    Malformed {
        /// The plugin.
        plugin: Plugin,
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Its tensors lie where graphs on the processor cannot read them.
    #[error(
        "provider `{provider}` keeps tensors in memory of its own, so that no whole graph can run on the processor; --allow-fallback=operators is possible"
    )]
    NoGraphsBeside {
        /// The provider.
        provider: Provider,
    },
    /// It cannot be told what to compute in.
    #[error("provider `{choice}` computes in the types of the bundle's graphs; --precision is for {}", names(with_precisions()))]
    NoPrecisions {
        /// What was asked for.
        choice: ProviderChoice,
    },
    /// The processor lacks what makes a precision worth its loss.
    #[error(
        "provider `{plugin}` would compute in float32 and not say so, for this processor has no instructions for {precision}; \
         leave out --precision"
    )]
    NoInstructions {
        /// The plugin.
        plugin: Plugin,
        /// What was asked for.
        precision: ComputeType,
    },
}

pub(super) fn choose(loaded: &Loaded, options: &RuntimeOptions) -> Result<Choice, ProviderError> {
    options.check()?;
    let mut passed_over = Vec::new();
    let candidates = match options.provider {
        ProviderChoice::Only(provider) => {
            let settings = probe(loaded, provider, options)?;
            return Ok(Choice { provider, passed_over, settings });
        }
        ProviderChoice::Auto => Provider::AUTO,
    };
    for provider in candidates {
        match probe(loaded, provider, options) {
            Ok(settings) => return Ok(Choice { provider, passed_over, settings }),
            Err(error) => passed_over.push((provider, error)),
        }
    }
    Ok(Choice { provider: Provider::Cpu, passed_over, settings: Settings::default() })
}

/// Opens a session of one node. A provider that was asked for must take part or fail, so this is its true test.
pub(super) fn probe(loaded: &Loaded, provider: Provider, options: &RuntimeOptions) -> Result<Settings, ProviderError> {
    if let Provider::Plugin(plugin) = provider {
        plugin.register(loaded, options.ep_library.as_deref())?;
    }
    let settings = Settings::new(loaded, provider, options)?;
    let _turn = provider.turn();
    let open = || -> Result<Session, ort::Error> {
        let builder = Session::builder(&loaded.environment)?;
        register(builder, loaded, provider, &settings, Work::Built(&Engine::default()))?
            .commit_from_memory(&identity(Dtype::Float32))
    };
    open().map_err(|error| ProviderError::Unusable { provider, source: in_a_sentence(&error) })?;
    Ok(settings)
}

/// What ONNX Runtime or a plugin says, in one line.
pub(super) fn in_a_sentence(error: &ort::Error) -> ort::Error {
    ort::Error::new(sentence(&error.to_string()).trim_end_matches('.'))
}

/// What a session does, as far as its provider must know.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work<'a> {
    /// Runs its graph node by node.
    Plain,
    /// Runs the engine that TensorRT built of its graph.
    Built(&'a Engine),
    /// Runs its graph node by node, or as it was recorded in a run on the same tensors.
    Recorded,
}

/// Adds the provider to a session. TensorRT takes part where there is an engine of its graph.
pub(super) fn register(
    builder: SessionBuilder,
    loaded: &Loaded,
    provider: Provider,
    settings: &Settings,
    work: Work<'_>,
) -> Result<SessionBuilder, ort::Error> {
    let id = i32::try_from(settings.device).unwrap_or(i32::MAX);
    // TF32 keeps 10 bits of a float32; tokens must be the reference's.
    let cuda = ep::CUDA::default().with_device_id(id).with_tf32(false).with_cuda_graph(matches!(work, Work::Recorded));
    let cuda = cuda.build().error_on_failure();
    let providers: Vec<ExecutionProviderDispatch> = match provider {
        Provider::Cpu => return on_processor(builder, loaded),
        Provider::Cuda => vec![cuda],
        Provider::TensorRt => match work {
            Work::Built(engine) => vec![tensorrt(id, engine), cuda],
            Work::Plain | Work::Recorded => vec![cuda],
        },
        Provider::Plugin(plugin) => {
            let device = plugin.devices(&loaded.environment).nth(settings.device as usize);
            let capture = plugin.capture().filter(|_| matches!(work, Work::Recorded)).map(|option| (option, "1".into()));
            let options: Vec<(String, String)> = settings.options.iter().cloned().chain(capture).collect();
            return Ok(builder.with_devices(device, Some(&options))?);
        }
    };
    Ok(builder.with_execution_providers(providers)?)
}

/// The processor by name: left to itself, a session takes a device of any plugin that the process has registered.
fn on_processor(builder: SessionBuilder, loaded: &Loaded) -> Result<SessionBuilder, ort::Error> {
    let processor = loaded.environment.devices().find(|device| matches!(device.ep(), Ok("CPUExecutionProvider")));
    Ok(builder.with_devices(processor, None)?)
}

/// With an engine that lies in a folder, or is built there.
fn tensorrt(device: i32, engine: &Engine) -> ExecutionProviderDispatch {
    let mut provider = ep::TensorRT::default().with_device_id(device);
    if let Some(precision) = engine.precision {
        let (folder, [least, best, most]) = (engine.folder.display(), &engine.sizes);
        provider = provider.with_engine_cache(true).with_engine_cache_path(&folder).with_engine_cache_prefix(&engine.prefix);
        provider = provider.with_timing_cache(true).with_timing_cache_path(&folder);
        provider = provider.with_profile_min_shapes(least).with_profile_opt_shapes(best).with_profile_max_shapes(most);
        provider = provider.with_fp16(precision == Precision::Float16).with_bf16(precision == Precision::Bfloat16);
        // Squares of what ViTs add up over their layers go beyond float16.
        provider = provider.with_layer_norm_fp32_fallback(true);
    }
    provider.build().error_on_failure()
}

/// Where tensors lie that a graph works on; nothing where that is the processor's memory.
pub(super) fn memory(loaded: &Loaded, provider: Provider, device: u32) -> Result<Option<MemoryInfo<'static>>, ort::Error> {
    match provider {
        Provider::Cpu => Ok(None),
        Provider::Cuda | Provider::TensorRt => {
            let id = i32::try_from(device).unwrap_or(i32::MAX);
            MemoryInfo::new(AllocationDevice::CUDA, id, AllocatorType::Device, MemoryType::Default).map(Some)
        }
        Provider::Plugin(plugin) if !plugin.has_memory() => Ok(None),
        Provider::Plugin(plugin) => {
            let device = plugin.devices(&loaded.environment).nth(device as usize);
            Ok(device.map(|device| device.memory_info(false).to_owned()))
        }
    }
}

impl Provider {
    /// Whether it can record runs.
    pub(super) fn records(self) -> bool {
        match self {
            Self::Cpu => false,
            Self::Cuda | Self::TensorRt => true,
            Self::Plugin(plugin) => plugin.capture().is_some(),
        }
    }

    /// To be held while it records.
    pub(super) fn turn_to_record(self) -> Turn {
        if matches!(self, Self::Cuda | Self::TensorRt) { Turn::recording() } else { self.turn() }
    }

    /// To be held while it is used.
    pub(super) fn turn(self) -> Turn {
        match self {
            Self::Cpu => Turn::Free,
            Self::Cuda | Self::TensorRt => Turn::shared(),
            Self::Plugin(plugin) => plugin.turn().map_or(Turn::Free, Turn::Only),
        }
    }

    /// What [`ProviderChoice::Auto`] tries, in this order, before it takes the processor. TensorRT needs engines that somebody built.
    pub const AUTO: [Self; 1] = [Self::Cuda];

    /// Every provider that is known by name.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::Cpu, Self::Cuda, Self::TensorRt].into_iter().chain(PLUGINS.into_iter().map(Self::Plugin))
    }
}

impl ProviderChoice {
    /// The plugin that was asked for.
    pub fn plugin(self) -> Option<Plugin> {
        if let Self::Only(Provider::Plugin(plugin)) = self { Some(plugin) } else { None }
    }
}

impl ProviderError {
    /// Why not, in one line.
    pub fn reason(&self) -> String {
        match self {
            Self::Unusable { source, .. } => source.to_string(),
            Self::Unloadable { source, .. } => format!("{self}: {source}"),
            other => other.to_string(),
        }
    }

    /// Whether it is the options that are wrong, on any machine.
    pub fn blames_the_options(&self) -> bool {
        let of_options = matches!(self, Self::NoPluginsOptions { .. } | Self::NoSuchOption { .. } | Self::Malformed { .. });
        of_options || matches!(self, Self::NoPrecisions { .. } | Self::NoGraphsBeside { .. })
    }
}

fn how_to_get(plugin: Plugin) -> String {
    let Some(package) = plugin.known.map(|known| known.package) else {
        return format!("is none that is known ({}), so its library must be named with --ep-library", names(PLUGINS.into_iter()));
    };
    format!(
        "needs a plugin that is not found; install it with `pip install {package}` beside ONNX Runtime, or name its library with --ep-library"
    )
}

fn what_it_is(plugin: Plugin) -> String {
    plugin.known.map_or("the library".into(), |known| format!("the library, or the folder with {}", known.file()))
}

fn finds(plugin: Plugin, device: u32, found: usize) -> String {
    match (plugin.known, found) {
        (Some(known), 0) => format!("finds no device here; it runs on {}", known.hardware),
        (None, 0) => "finds no device here; its library brings no provider, or none for this machine".into(),
        _ => format!("finds no device {device} here; it counts from 0 and finds {found}"),
    }
}

fn with_precisions() -> impl Iterator<Item = Plugin> {
    PLUGINS.into_iter().filter(|plugin| plugin.has_precisions())
}

fn names(plugins: impl Iterator<Item = Plugin>) -> String {
    plugins.map(|plugin| plugin.name).collect::<Vec<_>>().join(", ")
}

/// Such as `cpu (cuda: is not in this build)`.
impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.provider)?;
        let why: Vec<String> = self.passed_over.iter().map(|(provider, error)| format!("{provider}: {}", error.reason())).collect();
        if why.is_empty() { Ok(()) } else { write!(f, " ({})", why.join("; ")) }
    }
}

impl FromStr for ProviderChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Provider::all().find(|provider| provider.to_string() == name);
        match (name.strip_prefix("plugin:"), known) {
            (Some(""), _) => Err("`plugin:` needs a name behind it, known or your own".into()),
            (Some(plugin), _) => Ok(Self::Only(Provider::Plugin(Plugin::named(plugin)))),
            (None, Some(provider)) => Ok(Self::Only(provider)),
            (None, None) if name == "auto" => Ok(Self::Auto),
            (None, None) => {
                let names: Vec<String> = Provider::all().map(|provider| provider.to_string()).collect();
                Err(format!("auto, {} and plugin:NAME are known", names.join(", ")))
            }
        }
    }
}

impl FromStr for Fallback {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = [Self::Nothing, Self::Operators, Self::Graphs];
        let known = all.into_iter().find(|fallback| fallback.to_string() == name);
        known.ok_or_else(|| format!("{} are known", all.map(|fallback| fallback.to_string()).join(", ")))
    }
}

impl std::fmt::Display for Fallback {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nothing => "nothing",
            Self::Operators => "operators",
            Self::Graphs => "graphs",
        })
    }
}

impl std::fmt::Display for Provider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda => f.write_str("cuda"),
            Self::TensorRt => f.write_str("tensorrt"),
            Self::Plugin(plugin) => plugin.fmt(f),
        }
    }
}

impl std::fmt::Display for ProviderChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Only(provider) => provider.fmt(f),
        }
    }
}
