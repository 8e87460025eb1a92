//! Execution providers: which there are, which one works here, how each is registered.

use std::path::Path;
use std::str::FromStr;

use ort::environment::Environment;
use ort::ep::{self, ExecutionProviderDispatch};
use ort::session::Session;
use ort::session::builder::SessionBuilder;

use super::RuntimeOptions;

/// A place where graphs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An NVIDIA GPU, through engines built by TensorRT; what it cannot take runs on CUDA.
    TensorRt,
}

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProviderChoice {
    /// The first that works of TensorRT, CUDA and CPU.
    #[default]
    Auto,
    /// This one or an error.
    Only(Provider),
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
}

/// An ONNX model of one Identity node on one float: the smallest thing a provider can be tried with.
const PROBE: &[u8] = b"\x08\x08\x12\x05blip2\x3a7\x0a\x10\x0a\x01x\x12\x01y\x22\x08Identity\x12\x01pZ\x0f\x0a\x01x\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01b\x0f\x0a\x01y\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01B\x04\x0a\x00\x10\x11";

pub(super) fn choose(environment: &Environment, options: &RuntimeOptions) -> Result<Provider, ProviderError> {
    match options.provider {
        ProviderChoice::Only(provider) => probe(environment, provider, options).map(|()| provider),
        ProviderChoice::Auto => {
            let usable = |provider: &Provider| probe(environment, *provider, options).is_ok();
            Ok([Provider::TensorRt, Provider::Cuda].into_iter().find(usable).unwrap_or(Provider::Cpu))
        }
    }
}

/// Opens a session of one node. A provider that was asked for must take part or fail, so this is its true test.
pub(super) fn probe(environment: &Environment, provider: Provider, options: &RuntimeOptions) -> Result<(), ProviderError> {
    let open = || -> Result<Session, ort::Error> {
        let builder = Session::builder(environment)?;
        register(builder, provider, options.device, None)?.commit_from_memory(PROBE)
    };
    open().map(drop).map_err(|source| ProviderError::Unusable { provider, source })
}

/// Adds the provider to a session. `cache` is where TensorRT keeps engines.
pub(super) fn register(
    builder: SessionBuilder,
    provider: Provider,
    device: u32,
    cache: Option<&Path>,
) -> Result<SessionBuilder, ort::Error> {
    let device = i32::try_from(device).unwrap_or(i32::MAX);
    let cuda = || ep::CUDA::default().with_device_id(device).build().error_on_failure();
    let providers: Vec<ExecutionProviderDispatch> = match provider {
        Provider::Cpu => return Ok(builder),
        Provider::Cuda => vec![cuda()],
        Provider::TensorRt => vec![tensorrt(device, cache), cuda()],
    };
    Ok(builder.with_execution_providers(providers)?)
}

fn tensorrt(device: i32, cache: Option<&Path>) -> ExecutionProviderDispatch {
    let mut provider = ep::TensorRT::default().with_device_id(device);
    if let Some(cache) = cache {
        let cache = cache.display();
        provider = provider.with_engine_cache(true).with_engine_cache_path(&cache);
        provider = provider.with_timing_cache(true).with_timing_cache_path(&cache);
    }
    provider.build().error_on_failure()
}

impl Provider {
    /// Every provider that this engine knows.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Cuda, Self::TensorRt];
}

impl FromStr for ProviderChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Provider::ALL.into_iter().find(|provider| provider.to_string() == name);
        match (name, known) {
            ("auto", _) => Ok(Self::Auto),
            (_, Some(provider)) => Ok(Self::Only(provider)),
            _ => Err("auto, cpu, cuda and tensorrt are known".into()),
        }
    }
}

impl std::fmt::Display for Provider {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
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
