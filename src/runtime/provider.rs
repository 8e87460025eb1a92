//! Execution providers: which there are, which one works here, how each is registered.

use std::str::FromStr;
use std::sync::MutexGuard;

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
    Plugin(&'static Plugin),
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

/// The provider in use, and those that would have come before it.
#[derive(Debug)]
pub struct Choice {
    /// The provider.
    pub provider: Provider,
    /// Why others were passed over, in the order in which they were tried; empty where one was asked for.
    pub passed_over: Vec<ProviderError>,
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
    /// Its library is missing.
    #[error(
        "provider `{}` needs a plugin that is not found; install it with `pip install {}` beside ONNX Runtime, or name its library with --ep-library",
        .plugin.name,
        .plugin.package
    )]
    NoPlugin {
        /// The plugin.
        plugin: &'static Plugin,
    },
    /// Its library is there, a device is not.
    #[error("provider `{}` finds no device {device} here; it counts from 0 and finds {found}", .plugin.name)]
    NoDevice {
        /// The plugin.
        plugin: &'static Plugin,
        /// What was asked for, from 0.
        device: u32,
        /// How many there are.
        found: usize,
    },
}

pub(super) fn choose(loaded: &Loaded, options: &RuntimeOptions) -> Result<Choice, ProviderError> {
    match options.provider {
        ProviderChoice::Only(provider) => probe(loaded, provider, options).map(|()| Choice { provider, passed_over: Vec::new() }),
        ProviderChoice::Auto => {
            let mut passed_over = Vec::new();
            for provider in Provider::AUTO {
                match probe(loaded, provider, options) {
                    Ok(()) => return Ok(Choice { provider, passed_over }),
                    Err(error) => passed_over.push(error),
                }
            }
            Ok(Choice { provider: Provider::Cpu, passed_over })
        }
    }
}

/// Opens a session of one node. A provider that was asked for must take part or fail, so this is its true test.
pub(super) fn probe(loaded: &Loaded, provider: Provider, options: &RuntimeOptions) -> Result<(), ProviderError> {
    if let Provider::Plugin(plugin) = provider {
        plugin.register(&loaded.environment, &loaded.library, options.ep_library.as_deref())?;
        let (device, found) = (options.device, plugin.devices(&loaded.environment).count());
        if device as usize >= found {
            return Err(ProviderError::NoDevice { plugin, device, found });
        }
    }
    let _turn = provider.turn();
    let open = || -> Result<Session, ort::Error> {
        let builder = Session::builder(&loaded.environment)?;
        register(builder, loaded, provider, options.device, Some(&Engine::default()))?.commit_from_memory(&identity(Dtype::Float32))
    };
    open().map(drop).map_err(|source| ProviderError::Unusable { provider, source })
}

/// Adds the provider to a session. TensorRT takes part where there is an engine of its graph.
pub(super) fn register(
    builder: SessionBuilder,
    loaded: &Loaded,
    provider: Provider,
    device: u32,
    engine: Option<&Engine>,
) -> Result<SessionBuilder, ort::Error> {
    let id = i32::try_from(device).unwrap_or(i32::MAX);
    // TF32 keeps 10 bits of a float32; tokens must be the reference's.
    let cuda = || ep::CUDA::default().with_device_id(id).with_tf32(false).build().error_on_failure();
    let providers: Vec<ExecutionProviderDispatch> = match provider {
        Provider::Cpu => return on_processor(builder, loaded),
        Provider::Cuda => vec![cuda()],
        Provider::TensorRt => engine.map(|engine| tensorrt(id, engine)).into_iter().chain([cuda()]).collect(),
        Provider::Plugin(plugin) => {
            let option = |(key, value): &(&str, &str)| (format!("{}.{key}", plugin.provider), (*value).to_owned());
            let options: Vec<(String, String)> = plugin.options.iter().map(option).collect();
            let device = plugin.devices(&loaded.environment).nth(device as usize);
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
        Provider::Plugin(plugin) if !plugin.has_memory => Ok(None),
        Provider::Plugin(plugin) => {
            let device = plugin.devices(&loaded.environment).nth(device as usize);
            Ok(device.map(|device| device.memory_info(false).to_owned()))
        }
    }
}

impl Provider {
    /// To be held while it is used.
    pub(super) fn turn(self) -> Option<MutexGuard<'static, ()>> {
        if let Self::Plugin(plugin) = self { plugin.turn() } else { None }
    }

    /// What [`ProviderChoice::Auto`] tries, in this order, before it takes the processor. TensorRT needs engines that somebody built.
    pub const AUTO: [Self; 1] = [Self::Cuda];

    /// Every provider that this engine knows.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::Cpu, Self::Cuda, Self::TensorRt].into_iter().chain(PLUGINS.iter().map(Self::Plugin))
    }
}

impl ProviderError {
    /// Which provider.
    pub fn provider(&self) -> Provider {
        match self {
            Self::Unusable { provider, .. } => *provider,
            Self::NoPlugin { plugin } | Self::NoDevice { plugin, .. } => Provider::Plugin(plugin),
        }
    }

    /// Why not, in one line.
    pub fn reason(&self) -> String {
        match self {
            Self::Unusable { source, .. } => sentence(&source.to_string()).trim_end_matches('.').to_owned(),
            Self::NoPlugin { .. } | Self::NoDevice { .. } => self.to_string(),
        }
    }
}

/// Such as `cpu (cuda: is not in this build)`.
impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.provider)?;
        let why: Vec<String> = self.passed_over.iter().map(|error| format!("{}: {}", error.provider(), error.reason())).collect();
        if why.is_empty() { Ok(()) } else { write!(f, " ({})", why.join("; ")) }
    }
}

impl FromStr for ProviderChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Provider::all().find(|provider| provider.to_string() == name);
        match (name, known) {
            ("auto", _) => Ok(Self::Auto),
            (_, Some(provider)) => Ok(Self::Only(provider)),
            _ => {
                let names: Vec<String> = Provider::all().map(|provider| provider.to_string()).collect();
                Err(format!("auto, {} are known", names.join(", ")))
            }
        }
    }
}

impl std::fmt::Display for Provider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
            Self::Plugin(plugin) => plugin.name,
        })
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
