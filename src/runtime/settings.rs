//! What a session tells its provider: which device, what to compute in, and a plugin's own options.

use std::collections::BTreeMap;
use std::str::FromStr;

use ort::memory::DeviceType;
use serde_json::{Map, Value, json};

use super::library::Loaded;
use super::plugin::Plugin;
use super::{Provider, ProviderError, RuntimeOptions};

/// What a provider computes in, where it can be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ComputeType {
    /// As the reference does.
    #[default]
    Float32,
    /// The range of float32 with 8 bits of precision.
    Bfloat16,
    /// 11 bits of precision, up to 65,504.
    Float16,
}

/// What every session of a runtime tells the provider.
#[derive(Debug, Default)]
pub(super) struct Settings {
    /// Which of its devices.
    pub device: u32,
    /// A plugin's options. Their keys carry the provider's name, or they would be dropped without a word.
    pub options: Vec<(String, String)>,
}

/// OpenVINO's option for what it hands to its own parts: an object of properties for each kind of device.
const LOAD_CONFIG: &str = "load_config";
const PRECISION_HINT: &str = "INFERENCE_PRECISION_HINT";
const N_THREADS: &str = "INFERENCE_NUM_THREADS";

impl Settings {
    /// What the user decides, as far as `provider` has use for it. A plugin must be registered.
    pub fn new(loaded: &Loaded, provider: Provider, options: &RuntimeOptions) -> Result<Self, ProviderError> {
        let device = options.device;
        let Provider::Plugin(plugin) = provider else {
            return Ok(Self { device, options: Vec::new() });
        };
        let found = plugin.devices(&loaded.environment).nth(device as usize);
        let count = || plugin.devices(&loaded.environment).count();
        let chosen = found.ok_or_else(|| ProviderError::NoDevice { plugin, device, found: count() })?;
        let mut own: BTreeMap<String, String> = options.ep_options.iter().cloned().collect();
        if plugin.has_precisions() {
            let config = load_config(plugin, chosen.hardware_device().ty(), own.get(LOAD_CONFIG), options)?;
            own.insert(LOAD_CONFIG.into(), config);
        }
        let prefix = chosen.ep().unwrap_or_default();
        Ok(Self { device, options: own.into_iter().map(|(key, value)| (format!("{prefix}.{key}"), value)).collect() })
    }
}

impl RuntimeOptions {
    /// Refuses what the provider has no use for, whether it works here or not.
    pub fn check(&self) -> Result<(), ProviderError> {
        let choice = self.provider;
        let Some(plugin) = choice.plugin() else {
            return match (self.ep_options.is_empty(), self.precision) {
                (false, _) => Err(ProviderError::NoPluginsOptions { choice }),
                (true, Some(_)) => Err(ProviderError::NoPrecisions { choice }),
                (true, None) => Ok(()),
            };
        };
        if self.precision.is_some() && !plugin.has_precisions() {
            return Err(ProviderError::NoPrecisions { choice });
        }
        let Some(known) = plugin.known.map(|known| known.options) else { return Ok(()) };
        let strange = self.ep_options.iter().find(|(option, _)| !known.contains(&option.as_str()));
        strange.map_or(Ok(()), |(option, _)| Err(ProviderError::NoSuchOption { plugin, option: option.clone(), known }))
    }
}

/// What the user gave, with what to compute in and on how many threads.
fn load_config(
    plugin: Plugin,
    device: DeviceType,
    given: Option<&String>,
    options: &RuntimeOptions,
) -> Result<String, ProviderError> {
    let malformed = |reason: String| ProviderError::Malformed { plugin, option: LOAD_CONFIG, reason };
    let given = given.map_or("{}", String::as_str);
    let parsed: Result<BTreeMap<String, Map<String, Value>>, _> = serde_json::from_str(given);
    let mut config =
        parsed.map_err(|error| malformed(format!("{error}; it is JSON such as {{\"CPU\":{{\"NUM_STREAMS\":\"1\"}}}}")))?;
    if config.values().any(|properties| properties.contains_key(PRECISION_HINT)) {
        return Err(malformed(format!("--precision takes the place of {PRECISION_HINT}")));
    }
    let precision = options.precision.unwrap_or_default();
    if device == DeviceType::CPU && !precision.has_instructions() {
        return Err(ProviderError::NoInstructions { plugin, precision });
    }
    let name = match device {
        DeviceType::CPU => "CPU",
        DeviceType::NPU => "NPU",
        DeviceType::GPU | DeviceType::FPGA => "GPU",
    };
    let properties = config.entry(name.into()).or_default();
    properties.insert(PRECISION_HINT.into(), precision.hint().into());
    if let Some(threads) = options.threads.filter(|_| device == DeviceType::CPU) {
        properties.entry(N_THREADS).or_insert_with(|| threads.to_string().into());
    }
    Ok(json!(config).to_string())
}

impl ComputeType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Float32, Self::Bfloat16, Self::Float16];

    /// As OpenVINO calls it.
    fn hint(self) -> &'static str {
        match self {
            Self::Float32 => "f32",
            Self::Bfloat16 => "bf16",
            Self::Float16 => "f16",
        }
    }

    /// Whether this processor multiplies such numbers. OpenVINO computes in float32 where it does not, and says nothing.
    fn has_instructions(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        match self {
            Self::Float32 => true,
            Self::Bfloat16 => super::Processor::detect().has_bfloat16(),
            Self::Float16 => std::arch::is_x86_feature_detected!("avx512fp16"),
        }
        #[cfg(not(target_arch = "x86_64"))]
        matches!(self, Self::Float32)
    }
}

impl FromStr for ComputeType {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|precision| precision.to_string() == name);
        known.ok_or_else(|| format!("{} are known", Self::ALL.map(|precision| precision.to_string()).join(", ")))
    }
}

impl std::fmt::Display for ComputeType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::ProviderChoice;

    fn options(provider: &str, given: &[(&str, &str)]) -> RuntimeOptions {
        let ep_options = given.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        RuntimeOptions { provider: provider.parse().unwrap(), ep_options, ..RuntimeOptions::default() }
    }

    fn config(device: DeviceType, given: Option<&str>, options: &RuntimeOptions) -> Result<Value, String> {
        let config = load_config(Plugin::named("openvino"), device, given.map(str::to_owned).as_ref(), options);
        config.map(|config| serde_json::from_str(&config).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn openvino_is_always_told_what_to_compute_in() {
        let plain = RuntimeOptions::default();
        let threads = RuntimeOptions { threads: std::num::NonZeroUsize::new(3), ..RuntimeOptions::default() };
        let narrow = RuntimeOptions { precision: Some(ComputeType::Float16), ..threads.clone() };
        let own = Some(r#"{"CPU":{"INFERENCE_NUM_THREADS":"1","NUM_STREAMS":"2"},"AUTO":{}}"#);
        let hint = |hint: &str| json!({ PRECISION_HINT: hint });
        let cases = [
            (config(DeviceType::CPU, None, &plain), json!({ "CPU": hint("f32") })),
            (config(DeviceType::CPU, None, &threads), json!({ "CPU": { PRECISION_HINT: "f32", N_THREADS: "3" } })),
            (
                config(DeviceType::CPU, own, &threads),
                json!({ "CPU": { PRECISION_HINT: "f32", N_THREADS: "1", "NUM_STREAMS": "2" }, "AUTO": {} }),
            ),
            (config(DeviceType::GPU, None, &narrow), json!({ "GPU": hint("f16") })),
            (config(DeviceType::NPU, None, &narrow), json!({ "NPU": hint("f16") })),
        ];
        for (found, wanted) in cases {
            assert_eq!(found.unwrap(), wanted);
        }
        let refused = |given| config(DeviceType::CPU, Some(given), &plain).unwrap_err();
        assert!(refused(r#"{"CPU":{"INFERENCE_PRECISION_HINT":"bf16"}}"#).contains("--precision takes the place"));
        assert!(refused(r#"{"CPU":1}"#).contains("expected a map") && refused("ov.json").contains("it is JSON such as"));
    }

    #[test]
    fn what_the_processor_does_not_compute_in_is_refused() {
        for precision in ComputeType::ALL {
            let options = RuntimeOptions { precision: Some(precision), ..RuntimeOptions::default() };
            let found = config(DeviceType::CPU, None, &options);
            assert_eq!(found.is_ok(), precision.has_instructions(), "{precision}: {found:?}");
            assert_eq!(precision.to_string().parse(), Ok(precision));
        }
    }

    #[test]
    fn options_without_a_use_are_refused() {
        let said = |options: RuntimeOptions| options.check().map_err(|error| error.to_string());
        let precise = |provider| RuntimeOptions { precision: Some(ComputeType::Float32), ..options(provider, &[]) };
        for provider in ["auto", "cpu", "cuda", "tensorrt"] {
            assert!(said(options(provider, &[("a", "b")])).unwrap_err().contains("takes no --ep-option"), "{provider}");
        }
        for provider in ["auto", "cpu", "cuda", "tensorrt", "webgpu", "tensorrt-rtx", "plugin:mine"] {
            assert!(said(precise(provider)).unwrap_err().contains("--precision is for openvino"), "{provider}");
            assert_eq!(said(options(provider, &[])), Ok(()));
        }
        assert!(
            said(options("webgpu", &[("load_config", "{}")])).unwrap_err().contains("has no option `load_config`; it takes dawn")
        );
        assert_eq!(said(precise("openvino")), Ok(()));
        for (provider, option) in [("openvino", "load_config"), ("plugin:openvino", "reshape_input"), ("plugin:mine", "whatever")] {
            assert_eq!(said(options(provider, &[(option, "x")])), Ok(()));
        }
        assert_eq!("plugin:openvino".parse::<ProviderChoice>().unwrap(), "openvino".parse().unwrap());
    }
}
