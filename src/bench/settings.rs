//! Settings that were found to be best on a machine, in a file that other commands take as defaults.

use std::num::NonZeroUsize;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::BenchError;
use super::document;
use super::environment::Machine;
use super::statistics::Ratio;
use super::sweep::{self, Sweep};

/// The name in every file.
pub const SCHEMA: &str = "blip2-settings";
/// It grows when a field changes its meaning or goes; new fields may come without that.
pub const VERSION: u32 = 1;

/// What was found, and where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// [`SCHEMA`].
    pub schema: String,
    /// [`VERSION`].
    pub version: u32,
    /// Seconds since 1970, when it was measured.
    pub measured: u64,
    /// What they are best for.
    pub goal: Goal,
    /// Where.
    pub machine: Machine,
    /// The bundle.
    pub model: String,
    /// SHA-256 over the hashes of its files.
    pub model_sha256: String,
    /// The execution provider that it ran on.
    pub provider: String,
    /// Threads inside an operator; none where nothing is surely better than the default.
    pub threads: Option<NonZeroUsize>,
    /// Pictures that are looked at, and texts that are written, together; none as above, and for latency.
    pub batch: Option<NonZeroUsize>,
    /// What was measured to find them.
    pub tried: Vec<Sweep>,
}

/// What settings are best for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// One query at a time, soon.
    Latency,
    /// Many in a second.
    Throughput,
}

impl Settings {
    /// Of a file that this program, or one like it, wrote.
    pub fn read(path: &Path) -> Result<Self, BenchError> {
        let none = |why: String| BenchError::NoSettings { path: path.to_owned(), why };
        document::read(path, (SCHEMA, VERSION), "it holds no settings; `blip2 bench tune` writes some", none)
    }

    /// Why they may be wrong here; nothing if they were found for this. A provider that nobody named is taken for theirs.
    pub fn doubts(&self, machine: &Machine, model_sha256: &str, provider: Option<&str>) -> Option<String> {
        let of = |machine: &Machine| {
            let processor = machine.processor.as_deref().unwrap_or("an unknown processor");
            format!("{processor} ({}), {} processors", machine.instruction_set, machine.usable_processors)
        };
        let (there, here) = (of(&self.machine), of(machine));
        let machine = (there != here).then(|| format!("on {there}; this is {here}"));
        let bundle = (self.model_sha256 != model_sha256).then(|| format!("for another bundle, {}", self.model));
        let provider = provider.filter(|named| *named != self.provider).map(|_| format!("with {}", self.provider));
        let doubts: Vec<String> = [bundle, provider, machine].into_iter().flatten().collect();
        (!doubts.is_empty()).then(|| format!("they were found {}", doubts.join(", and ")))
    }
}

/// The setting that is best: the first, which is the default, unless another is surely better, and by more than turns of one setting
/// differ among themselves.
pub fn best(sweep: &Sweep, goal: Goal) -> usize {
    let gain = |ratio: &Ratio| match goal {
        Goal::Latency => 1.0 / ratio.value,
        Goal::Throughput => ratio.value,
    };
    let noise = match goal {
        Goal::Latency => sweep.noise,
        Goal::Throughput => sweep.noise_of_images,
    };
    let noise = noise.unwrap_or(f64::INFINITY);
    let gains = sweep.settings.iter().enumerate().filter_map(|(i, setting)| {
        let ratio = match goal {
            Goal::Latency => setting.latency,
            Goal::Throughput => setting.images,
        }?;
        (sweep::is_sure(&ratio) && gain(&ratio) > 1.0 + noise).then(|| (i, gain(&ratio)))
    });
    gains.max_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::super::sweep::tests::sweep;
    use super::*;

    fn settings() -> Settings {
        Settings {
            schema: SCHEMA.into(),
            version: VERSION,
            measured: 1_800_000_000,
            goal: Goal::Throughput,
            machine: Machine { processor: Some("EPYC".into()), usable_processors: 8, ..Machine::default() },
            model: "demo".into(),
            model_sha256: "ab".into(),
            provider: "cpu".into(),
            threads: NonZeroUsize::new(4),
            batch: None,
            tried: vec![sweep(&[("a", &[1.0, 1.1])])],
        }
    }

    #[test]
    fn the_default_stays_unless_another_is_surely_better() {
        for (medians, best_is) in [
            (&[("default", &[100.0, 101.0, 99.0][..]), ("faster", &[80.0, 81.0, 79.0]), ("slower", &[150.0, 151.0, 149.0])][..], 1),
            (&[("default", &[100.0, 101.0, 99.0]), ("faster", &[80.0, 81.0, 79.0]), ("fastest", &[50.0, 51.0, 50.0])], 2),
            // Sure, and yet less than turns differ among themselves.
            (&[("default", &[100.0, 110.0, 100.0]), ("a little", &[98.0, 108.0, 98.0])], 0),
            (&[("default", &[100.0, 101.0, 99.0]), ("unsure", &[70.0, 120.0, 80.0])], 0),
            (&[("default", &[100.0]), ("once", &[50.0])], 0),
        ] {
            let found = sweep(medians);
            assert_eq!((best(&found, Goal::Latency), best(&found, Goal::Throughput)), (best_is, best_is), "{medians:?}");
        }
    }

    #[test]
    fn doubts_name_what_differs() {
        let (found, here) = (settings(), settings().machine);
        assert_eq!((found.doubts(&here, "ab", None), found.doubts(&here, "ab", Some("cpu"))), (None, None));
        assert_eq!(found.doubts(&here, "ab", Some("cuda")).as_deref(), Some("they were found with cpu"));
        let elsewhere = found.doubts(&Machine { usable_processors: 2, ..here.clone() }, "ab", None).expect("a doubt");
        assert!(elsewhere.contains("8 processors; this is") && !elsewhere.contains("bundle"), "{elsewhere}");
        assert!(found.doubts(&here, "cd", None).expect("a doubt").contains("another bundle, demo"));
    }

    #[test]
    fn settings_come_back_from_their_file_and_nothing_else_does() {
        let path = std::env::temp_dir().join(format!("blip2-settings-{}.json", std::process::id()));
        let write = |content: &str| std::fs::write(&path, content).expect("a temporary file");
        write(&serde_json::to_string(&settings()).expect("it is JSON"));
        let read = Settings::read(&path).expect("it was written here");
        assert_eq!((read.threads, read.batch, read.goal), (settings().threads, None, Goal::Throughput));
        for (content, part) in [
            ("{}", "holds no settings"),
            (r#"{"schema":"blip2-settings","version":9}"#, "version 9"),
            (r#"{"schema":"blip2-bench","version":1}"#, "blip2-bench version 1"),
            (r#"{"schema":"blip2-settings","version":1}"#, "missing field"),
        ] {
            write(content);
            let error = Settings::read(&path).expect_err("it is none").to_string();
            assert!(error.contains(part), "{error}");
        }
        std::fs::remove_file(&path).expect("it was written");
        assert!(Settings::read(&path).expect_err("it is gone").to_string().contains("cannot be read"));
    }
}
