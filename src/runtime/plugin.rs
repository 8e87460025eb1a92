//! Execution providers that come as a library of their own: which are known, where the library is found, what it offers.
//!
//! Order: the path given by the caller, beside ONNX Runtime's library, the Python package beside ONNX Runtime's, that in the active virtual
//! environment and in a `.venv` above the executable. Of a plugin that is not known the path must be given.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ort::device::Device;
use ort::environment::Environment;

use super::ProviderError;
use super::library::{self, Library, Loaded};
use super::provider::in_a_sentence;

/// A provider in a library of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plugin {
    /// What users call it.
    pub name: &'static str,
    /// What is known of it beforehand.
    pub known: Option<&'static Known>,
}

/// What ONNX Runtime does not tell of a plugin.
#[derive(Debug, PartialEq, Eq)]
pub struct Known {
    /// The package of the Python Package Index that has the library.
    pub package: &'static str,
    /// What it runs on.
    pub hardware: &'static str,
    /// Whether tensors lie in memory of its own.
    pub has_memory: bool,
    /// Whether it can be told what to compute in. If so, it always is: its own choice may be another than the graph's.
    pub has_precisions: bool,
    /// Options that it takes and that this engine can work with. Others would be accepted and dropped without a word.
    pub options: &'static [&'static str],
    /// What ONNX Runtime calls it.
    provider: &'static str,
    /// The library's file name without prefix and suffix.
    library: &'static str,
    /// How the names of libraries begin that lie beside its own and that the dynamic linker would not find there.
    companions: &'static [&'static str],
    /// Whether its sessions must take turns: the library fails where two threads use it at once.
    takes_turns: bool,
    /// The option that lets it record runs and repeat them whole.
    capture: Option<&'static str>,
}

/// What a plugin's library brings.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Where it lies.
    pub path: PathBuf,
    /// The version of its package, where it lies in one.
    pub version: Option<String>,
    /// Its devices in their order, such as `CPU of Intel (OpenVINOExecutionProvider)`.
    pub devices: Vec<String>,
}

/// Every plugin that is known by name. To add one is to add it here.
pub static PLUGINS: [Plugin; 3] = [
    Plugin { name: "openvino", known: Some(&OPENVINO) },
    Plugin { name: "webgpu", known: Some(&WEBGPU) },
    Plugin { name: "tensorrt-rtx", known: Some(&TENSORRT_RTX) },
];

// `hint_enable_gqa` is not among the options: with it the decoder's caches grow, and ours are written in place.
static OPENVINO: Known = Known {
    package: "onnxruntime-ep-openvino",
    hardware: "processors, GPUs and NPUs of Intel",
    has_memory: false,
    has_precisions: true,
    options: &["load_config", "reshape_input"],
    provider: "OpenVINOExecutionProvider",
    library: "onnxruntime_providers_openvino_plugin",
    companions: &[],
    takes_turns: false,
    capture: None,
};

static WEBGPU: Known = Known {
    package: "onnxruntime-ep-webgpu",
    hardware: "GPUs of any maker",
    has_memory: true,
    has_precisions: false,
    options: &[
        "dawnBackendType",
        "enableRobustness",
        "forceCpuNodeNames",
        "maxNumPendingDispatches",
        "maxStorageBufferBindingSize",
        "powerPreference",
        "preferredLayout",
        "storageBufferCacheMode",
        "uniformBufferCacheMode",
        "validationMode",
    ],
    provider: "WebGpuExecutionProvider",
    library: "onnxruntime_providers_webgpu",
    companions: &[],
    takes_turns: true,
    capture: Some("enableGraphCapture"),
};

static TENSORRT_RTX: Known = Known {
    package: "onnxruntime-ep-nv-tensorrt-rtx",
    hardware: "RTX GPUs of NVIDIA",
    has_memory: false,
    has_precisions: false,
    options: &[
        "nv_detailed_build_log",
        "nv_max_shared_mem_size",
        "nv_max_workspace_size",
        "nv_op_types_to_exclude",
        "nv_persistent_context_memory",
        "nv_profile_max_shapes",
        "nv_profile_min_shapes",
        "nv_profile_opt_shapes",
        "nv_runtime_cache_path",
        "nv_use_sync_gpu_allocator",
        "nv_weight_streaming_budget",
    ],
    provider: "NvTensorRTRTXExecutionProvider",
    library: "onnxruntime_providers_nv_tensorrt_rtx",
    companions: &["libcudart.so.", "libtensorrt_rtx.so.", "libtensorrt_onnxparser_rtx.so."],
    takes_turns: true,
    capture: None,
};

static TURN: Mutex<()> = Mutex::new(());

/// A library that the process has registered; each can be once.
struct Registered {
    plugin: Plugin,
    path: PathBuf,
    /// The providers that came with it.
    providers: Vec<String>,
}

static REGISTERED: Mutex<Vec<Registered>> = Mutex::new(Vec::new());

fn registry() -> MutexGuard<'static, Vec<Registered>> {
    REGISTERED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Plugin {
    /// The plugin of this name, known or not. A name that is not known stays in memory, as a provider does that was used once.
    pub fn named(name: &str) -> Self {
        let known = PLUGINS.iter().find(|plugin| plugin.name == name);
        known.copied().unwrap_or_else(|| Self { name: name.to_owned().leak(), known: None })
    }

    /// Whether tensors lie in memory of its own. Where nothing is known, they pass through the processor's.
    pub(super) fn has_memory(self) -> bool {
        self.known.is_some_and(|known| known.has_memory)
    }

    /// Whether it can be told what to compute in.
    pub fn has_precisions(self) -> bool {
        self.known.is_some_and(|known| known.has_precisions)
    }

    /// The option that lets it record runs, by its whole name.
    pub(super) fn capture(self) -> Option<String> {
        self.known.and_then(|known| Some(format!("{}.{}", known.provider, known.capture?)))
    }

    /// Waits until nobody else uses the library, where that is needed or not known.
    pub(super) fn turn(self) -> Option<MutexGuard<'static, ()>> {
        let takes_turns = self.known.is_none_or(|known| known.takes_turns);
        takes_turns.then(|| TURN.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets ONNX Runtime load the library, if it has not done so yet.
    pub(super) fn register(self, loaded: &Loaded, named: Option<&Path>) -> Result<(), ProviderError> {
        let mut registered = registry();
        let before = registered.iter().find(|registered| registered.plugin == self).map(|registered| &registered.path);
        let path = match before {
            Some(before) if named.is_none() => before.clone(),
            _ => self.find(&loaded.library, named)?,
        };
        match before {
            Some(before) if *before == path => return Ok(()),
            Some(before) => return Err(ProviderError::Another { plugin: self, path, loaded: before.clone() }),
            None => {}
        }
        let same = registered.iter().find(|registered| registered.path == path);
        let providers = match same {
            Some(same) => same.providers.clone(),
            None => self.load(&loaded.environment, &path)?,
        };
        registered.push(Registered { plugin: self, path, providers });
        Ok(())
    }

    /// The names of the providers that the library brings.
    fn load(self, environment: &Environment, path: &Path) -> Result<Vec<String>, ProviderError> {
        let companions = self.known.map_or(&[][..], |known| known.companions);
        for companion in companions.iter().filter_map(|start| companion(path.parent()?, start)) {
            // One that does not load is missed, and named, by the plugin's library itself.
            let _ = ort::util::preload_dylib(companion);
        }
        let before = providers(environment);
        let unloadable = |error: ort::Error| {
            let source = in_a_sentence(&error);
            ProviderError::Unloadable { plugin: self, path: path.to_path_buf(), source }
        };
        environment.register_ep_library(path.to_string_lossy(), path).map_err(unloadable)?;
        Ok(providers(environment).into_iter().filter(|provider| !before.contains(provider)).collect())
    }

    /// The devices that it offers.
    pub(super) fn devices(self, environment: &Environment) -> impl Iterator<Item = Device<'_>> {
        let registered = registry();
        let own = registered.iter().find(|registered| registered.plugin == self);
        let mut providers = own.map(|own| own.providers.clone()).unwrap_or_default();
        // A library may bring other providers beside the one that is meant.
        providers.retain(|provider| self.known.is_none_or(|known| known.provider == provider));
        environment.devices().filter(move |device| device.ep().is_ok_and(|name| providers.iter().any(|own| own == name)))
    }

    /// What its library brings, once it is registered.
    pub(super) fn offer(self, environment: &Environment) -> Option<Offer> {
        let of_library = |registered: &Registered| registered.path.clone();
        let path = registry().iter().find(|registered| registered.plugin == self).map(of_library)?;
        let devices = self.devices(environment).map(|device| describe(&device)).collect();
        Some(Offer { version: self.known.and_then(|known| known.version(&path)), path, devices })
    }

    /// Whether a path that a user names is that of its library.
    pub fn is_at(self, path: &Path) -> bool {
        self.known.is_some_and(|known| path.ends_with(known.file()) || path.join(known.file()).is_file())
    }

    fn find(self, runtime: &Library, named: Option<&Path>) -> Result<PathBuf, ProviderError> {
        let missing = || match named {
            Some(path) => ProviderError::NoLibrary { plugin: self, path: path.to_path_buf() },
            None => ProviderError::NoPlugin { plugin: self },
        };
        let found = match named {
            Some(path) if path.is_file() => Some(path.to_path_buf()),
            _ => self.known.and_then(|known| known.find(&runtime.path, named)),
        };
        found.and_then(|path| std::path::absolute(path).ok()).ok_or_else(missing)
    }
}

impl Known {
    /// The library's file name.
    pub fn file(&self) -> String {
        format!("{}{}{}", std::env::consts::DLL_PREFIX, self.library, std::env::consts::DLL_SUFFIX)
    }

    /// The package's version, where the library lies in one.
    pub fn version(&self, library: &Path) -> Option<String> {
        let packages = library.parent()?.parent()?;
        let module = self.module();
        std::fs::read_dir(packages).ok()?.flatten().find_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let (package, version) = name.strip_suffix(".dist-info")?.rsplit_once('-')?;
            package.starts_with(&module).then(|| version.to_owned())
        })
    }

    fn module(&self) -> String {
        self.package.replace('-', "_")
    }

    fn find(&self, runtime: &Path, named: Option<&Path>) -> Option<PathBuf> {
        let in_folder = |folder: &Path| Some(folder.join(self.file())).filter(|path| path.is_file());
        if let Some(named) = named {
            return in_folder(named);
        }
        let beside = runtime.parent().into_iter().map(Path::to_path_buf);
        let packages = runtime.ancestors().nth(3).map(Path::to_path_buf);
        let packages = packages.into_iter().chain(library::site_packages()).map(|packages| packages.join(self.module()));
        beside.chain(packages).find_map(|folder| in_folder(&folder))
    }
}

fn describe(device: &Device<'_>) -> String {
    let hardware = device.hardware_device();
    let vendor = hardware.vendor().ok().filter(|vendor| !vendor.is_empty()).unwrap_or("an unknown maker");
    format!("{:?} of {vendor} ({})", hardware.ty(), device.ep().unwrap_or_default())
}

fn providers(environment: &Environment) -> Vec<String> {
    environment.devices().filter_map(|device| device.ep().ok().map(str::to_owned)).collect()
}

/// The file in `folder` whose name begins so.
fn companion(folder: &Path, start: &str) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.flatten();
    files.map(|entry| entry.path()).find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start)))
}

/// `plugin:NAME`, or the name alone where it is known.
impl std::fmt::Display for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.known.is_some() { "" } else { "plugin:" })?;
        f.write_str(self.name)
    }
}
