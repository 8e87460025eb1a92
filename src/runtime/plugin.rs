//! Execution providers that come as a library of their own, and where to find it.
//!
//! Order: the path given by the caller, beside ONNX Runtime's library, the Python package beside ONNX Runtime's, that in the active virtual
//! environment and in a `.venv` above the executable.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ort::device::Device;
use ort::environment::Environment;

use super::library::{self, Library};
use super::{Provider, ProviderError};

/// A provider in a library of its own. To add one is to add a line to [`PLUGINS`].
#[derive(Debug, PartialEq, Eq)]
pub struct Plugin {
    /// What users call it.
    pub name: &'static str,
    /// The package of the Python Package Index that has the library.
    pub package: &'static str,
    /// What ONNX Runtime calls it.
    pub(super) provider: &'static str,
    /// The library's file name without prefix and suffix.
    library: &'static str,
    /// Whether tensors lie in memory of its own.
    pub(super) has_memory: bool,
    /// Whether its sessions must take turns: the library fails where two threads use it at once.
    takes_turns: bool,
    /// Its options. Precision is always named: a provider's own choice may be another than the graph's.
    pub(super) options: &'static [(&'static str, &'static str)],
}

/// Every plugin that this engine knows.
pub static PLUGINS: [Plugin; 2] = [
    Plugin {
        name: "webgpu",
        package: "onnxruntime-ep-webgpu",
        provider: "WebGpuExecutionProvider",
        library: "onnxruntime_providers_webgpu",
        has_memory: true,
        takes_turns: true,
        options: &[],
    },
    Plugin {
        name: "openvino",
        package: "onnxruntime-ep-openvino",
        provider: "OpenVINOExecutionProvider",
        library: "onnxruntime_providers_openvino_plugin",
        has_memory: false,
        takes_turns: false,
        options: &[("load_config", r#"{"CPU":{"INFERENCE_PRECISION_HINT":"f32"},"GPU":{"INFERENCE_PRECISION_HINT":"f32"}}"#)],
    },
];

static TURN: Mutex<()> = Mutex::new(());

/// Libraries that the process has registered; each can be once.
static REGISTERED: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

impl Plugin {
    /// Waits until nobody else uses the library, where that is needed.
    pub(super) fn turn(&self) -> Option<MutexGuard<'static, ()>> {
        self.takes_turns.then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets ONNX Runtime load the library, if it has not done so yet.
    pub(super) fn register(
        &'static self,
        environment: &Environment,
        runtime: &Library,
        named: Option<&Path>,
    ) -> Result<(), ProviderError> {
        let mut registered = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
        if registered.contains(&self.name) {
            return Ok(());
        }
        let path = self.find(&runtime.path, named).ok_or(ProviderError::NoPlugin { plugin: self })?;
        let unusable = |source: ort::Error| ProviderError::Unusable { provider: Provider::Plugin(self), source };
        environment.register_ep_library(self.name, path).map_err(unusable)?;
        registered.push(self.name);
        Ok(())
    }

    /// The devices that it offers.
    pub(super) fn devices<'e>(&self, environment: &'e Environment) -> impl Iterator<Item = Device<'e>> {
        environment.devices().filter(|device| device.ep().is_ok_and(|name| name == self.provider))
    }

    fn find(&self, runtime: &Path, named: Option<&Path>) -> Option<PathBuf> {
        let file = format!("{}{}{}", std::env::consts::DLL_PREFIX, self.library, std::env::consts::DLL_SUFFIX);
        let in_folder = |folder: &Path| Some(folder.join(&file)).filter(|path| path.is_file());
        if let Some(named) = named {
            let is_it = |name: &OsStr| name.to_string_lossy().contains(self.library);
            let file = Some(named).filter(|path| path.is_file() && path.file_name().is_some_and(is_it));
            return file.map(Path::to_path_buf).or_else(|| in_folder(named));
        }
        let module = self.package.replace('-', "_");
        let beside = runtime.parent().into_iter().map(Path::to_path_buf);
        let packages = runtime.ancestors().nth(3).map(Path::to_path_buf);
        let packages = packages.into_iter().chain(library::site_packages()).map(|packages| packages.join(&module));
        beside.chain(packages).find_map(|folder| in_folder(&folder))
    }
}
