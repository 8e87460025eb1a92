//! TensorRT's engines: built by a command of their own, kept in a folder that says what they were built for, and used for that alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::bundle::{Bundle, Dimension, GraphFacts, Precision, hexadecimal};

/// What the folder says of itself.
const LABEL: &str = "engines.json";

/// Everything that an engine depends on.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Purpose {
    /// Hash of the bundle's files.
    pub bundle: String,
    /// Sizes of every graph's inputs.
    pub sizes: BTreeMap<String, [String; 3]>,
    /// Version of ONNX Runtime.
    pub onnxruntime: String,
    /// The library of TensorRT.
    pub tensorrt: String,
    /// The GPUs of the machine, and which of them.
    pub device: String,
}

/// What is in a folder of engines.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Label {
    purpose: Purpose,
    /// Bytes of each file.
    files: BTreeMap<String, u64>,
}

/// What a session of one graph is told about its engine.
#[derive(Clone, Debug, Default)]
pub(super) struct Engine {
    /// Where it lies, or shall lie.
    pub folder: PathBuf,
    /// What its files begin with.
    pub prefix: String,
    /// Least, best and largest sizes of the inputs.
    pub sizes: [String; 3],
    /// What the graph computes in.
    pub precision: Option<Precision>,
}

impl Purpose {
    /// Of a bundle's engines on a device.
    pub fn new(bundle: &Bundle, onnxruntime: &str, device: u32) -> Self {
        let graphs = bundle.facts().graphs.iter().filter(|(_, graph)| !graph.profile.is_empty());
        Self {
            bundle: bundle.hash(),
            sizes: graphs.map(|(name, graph)| (name.clone(), sizes(graph))).collect(),
            onnxruntime: onnxruntime.into(),
            tensorrt: tensorrt(),
            device: gpus(device),
        }
    }

    /// Where engines for it lie under `root`.
    pub fn folder(&self, root: &Path) -> PathBuf {
        root.join(&self.bundle).join(self.digest())
    }

    /// The engines under `root`, or why they cannot be used.
    pub fn find(&self, root: &Path) -> Result<PathBuf, String> {
        let folder = self.folder(root);
        if let Some(label) = Label::read(&folder) {
            return match label.fault(&folder, self) {
                None => Ok(folder),
                Some(fault) => Err(format!("{} {fault}", folder.display())),
            };
        }
        let others = fs::read_dir(root.join(&self.bundle)).into_iter().flatten().flatten();
        let other = others.map(|entry| entry.path()).find_map(|path| Some((Label::read(&path)?.purpose, path)));
        Err(match other {
            Some((purpose, path)) => format!("{} was built for {}", path.display(), purpose.unlike(self)),
            None => format!("{} does not hold them", folder.display()),
        })
    }

    /// Makes what `folder` holds, which lies beside, the engines under `root`.
    pub fn keep(&self, folder: &Path, root: &Path) -> std::io::Result<PathBuf> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            files.insert(entry.file_name().to_string_lossy().into_owned(), entry.metadata()?.len());
        }
        let label = serde_json::to_vec_pretty(&Label { purpose: self.clone(), files })?;
        fs::write(folder.join(LABEL), label)?;
        let home = self.folder(root);
        if home.exists() {
            fs::remove_dir_all(&home)?;
        }
        fs::rename(folder, &home)?;
        Ok(home)
    }

    /// What of it is not as in `wanted`, and what is wanted.
    fn unlike(&self, wanted: &Self) -> String {
        let pairs = [
            ("ONNX Runtime", &self.onnxruntime, &wanted.onnxruntime),
            ("TensorRT", &self.tensorrt, &wanted.tensorrt),
            ("device", &self.device, &wanted.device),
        ];
        let unlike = pairs.iter().filter(|(_, found, wanted)| found != wanted);
        let said: Vec<String> = unlike.map(|(what, found, wanted)| format!("{what} `{found}`, here is `{wanted}`")).collect();
        if said.is_empty() { "inputs of other sizes".into() } else { said.join("; ") }
    }

    fn digest(&self) -> String {
        let text = serde_json::to_vec(self).expect("strings are JSON");
        hexadecimal(&Sha256::digest(text)[..16])
    }
}

impl Label {
    fn read(folder: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(folder.join(LABEL)).ok()?).ok()
    }

    fn fault(&self, folder: &Path, wanted: &Purpose) -> Option<String> {
        let is_there = |(file, bytes): (&String, &u64)| fs::metadata(folder.join(file)).is_ok_and(|found| found.len() == *bytes);
        if self.purpose != *wanted {
            return Some(format!("was built for {}", self.purpose.unlike(wanted)));
        }
        let missing = self.files.iter().find(|file| !is_there(*file));
        missing.map(|(file, bytes)| format!("lacks {file} of {bytes} bytes"))
    }
}

impl Engine {
    /// The engine of a graph whose sizes have ranges.
    pub fn new(folder: PathBuf, name: &str, graph: &GraphFacts) -> Self {
        Self { folder, prefix: name.into(), sizes: sizes(graph), precision: Some(graph.precision) }
    }
}

/// Least, best and largest sizes of a graph's inputs, such as `pixel_values:1x3x224x224`.
fn sizes(graph: &GraphFacts) -> [String; 3] {
    [0, 1, 2].map(|end| {
        let size = |dimension: &Dimension| match dimension {
            Dimension::Fixed(size) => size.to_string(),
            Dimension::Dynamic(axis) => graph.profile[axis][end].to_string(),
        };
        let shape = |shape: &[Dimension]| shape.iter().map(size).collect::<Vec<_>>().join("x");
        graph.inputs.iter().map(|input| format!("{}:{}", input.name, shape(&input.shape))).collect::<Vec<_>>().join(",")
    })
}

/// The library as the process has loaded it; its version is in its name, or at least its size is its own.
fn tensorrt() -> String {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = maps.lines().filter_map(|line| line.split_once('/')).map(|(_, path)| PathBuf::from(format!("/{path}")));
    let library = path.filter_map(|path| fs::canonicalize(path).ok()).find(|path| file_name(path).starts_with("libnvinfer.so"));
    library.map_or("none".into(), |path| format!("{}, {} bytes", file_name(&path), fs::metadata(&path).map_or(0, |m| m.len())))
}

/// Models of all GPUs in the order of their buses: which of them has which number is CUDA's affair.
fn gpus(device: u32) -> String {
    let folders = fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut folders: Vec<PathBuf> = folders.collect();
    folders.sort();
    let model = |folder: &PathBuf| {
        let text = fs::read_to_string(folder.join("information")).ok()?;
        Some(text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_owned())
    };
    let models: Vec<String> = folders.iter().filter_map(model).collect();
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").map_or(String::new(), |visible| format!(" of {visible}"));
    format!("{} (device {device}{visible})", if models.is_empty() { "unknown".into() } else { models.join(", ") })
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn purpose() -> Purpose {
        Purpose {
            bundle: "b".repeat(64),
            sizes: BTreeMap::from([("vision".into(), ["x:1x3".into(), "x:1x3".into(), "x:16x3".into()])]),
            onnxruntime: "1.31.1".into(),
            tensorrt: "libnvinfer.so.10, 7 bytes".into(),
            device: "H100 (device 0)".into(),
        }
    }

    fn built(name: &str) -> (PathBuf, PathBuf) {
        let root = std::env::temp_dir().join(format!("blip2-engines-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        let aside = root.join(purpose().bundle).join(".part");
        fs::create_dir_all(&aside).unwrap();
        fs::write(aside.join("vision.engine"), b"engine").unwrap();
        let folder = purpose().keep(&aside, &root).unwrap();
        (root, folder)
    }

    #[test]
    fn engines_are_found_by_what_they_were_built_for_and_never_taken_for_others() {
        let (root, folder) = built("found");
        assert_eq!(purpose().find(&root).unwrap(), folder);
        let newer = Purpose { tensorrt: "libnvinfer.so.11, 8 bytes".into(), ..purpose() };
        let said = newer.find(&root).unwrap_err();
        assert!(said.contains(&folder.display().to_string()), "{said}");
        assert!(said.contains("TensorRT `libnvinfer.so.10, 7 bytes`, here is `libnvinfer.so.11, 8 bytes`"), "{said}");
        assert!(!said.contains("device"), "{said}");
        let wider = Purpose { sizes: BTreeMap::new(), ..purpose() };
        assert!(wider.find(&root).unwrap_err().contains("inputs of other sizes"));
        let other = Purpose { bundle: "c".repeat(64), ..purpose() };
        assert!(other.find(&root).unwrap_err().contains("does not hold them"));
    }

    #[test]
    fn sizes_are_told_as_tensorrt_wants_them() {
        let graph = serde_json::json!({
            "file": "qformer.onnx", "precision": "float16", "outputs": [],
            "inputs": [
                {"name": "image_features", "dtype": "float32", "shape": ["batch", 257, 1408]},
                {"name": "question_ids", "dtype": "int64", "shape": ["batch", "question"]},
            ],
            "profile": {"batch": [1, 2, 16], "question": [1, 8, 64]},
        });
        let found = sizes(&serde_json::from_value(graph).unwrap());
        assert_eq!(found[0], "image_features:1x257x1408,question_ids:1x1");
        assert_eq!(found[1], "image_features:2x257x1408,question_ids:2x8");
        assert_eq!(found[2], "image_features:16x257x1408,question_ids:16x64");
    }

    #[test]
    fn a_folder_that_was_damaged_or_moved_is_named_and_not_used() {
        let (root, folder) = built("damaged");
        fs::write(folder.join("vision.engine"), b"half").unwrap();
        assert!(purpose().find(&root).unwrap_err().contains("lacks vision.engine of 6 bytes"));
        let (root, folder) = built("moved");
        let elsewhere = Purpose { device: "A10 (device 0)".into(), ..purpose() };
        fs::rename(&folder, elsewhere.folder(&root)).unwrap();
        assert!(elsewhere.find(&root).unwrap_err().contains("was built for device `H100 (device 0)`, here is `A10 (device 0)`"));
    }

    #[test]
    fn engines_that_are_built_again_take_the_place_of_the_old_ones() {
        let (root, folder) = built("again");
        let aside = root.join(purpose().bundle).join(".again");
        fs::create_dir_all(&aside).unwrap();
        fs::write(aside.join("qformer.engine"), b"other").unwrap();
        assert_eq!(purpose().keep(&aside, &root).unwrap(), folder);
        assert!(!folder.join("vision.engine").exists() && purpose().find(&root).is_ok());
    }
}
