//! Why a folder is not a usable bundle.

use std::path::PathBuf;

use super::{FACTS, FORMAT_VERSION, TaskName};

/// Why a folder is not a usable bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The folder or its facts are not there.
    #[error("{}: no bundle there ({FACTS} cannot be read); `python -m blip2_export convert` makes one", .folder.display())]
    Missing {
        /// Where the bundle was expected.
        folder: PathBuf,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// Not JSON, or a field is missing, unknown or of another type.
    #[error("{}: {FACTS} is not valid: {reason}", .folder.display())]
    Invalid {
        /// The bundle.
        folder: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// Written for another engine.
    #[error("{}: bundle format version {found}, this engine reads version {FORMAT_VERSION}; convert the checkpoint again", .folder.display())]
    Version {
        /// The bundle.
        folder: PathBuf,
        /// The version it declares.
        found: String,
    },
    /// The facts contradict each other.
    #[error("{}: {FACTS} says {said}, {but}", .folder.display())]
    Inconsistent {
        /// The bundle.
        folder: PathBuf,
        /// One fact.
        said: String,
        /// What it does not go with.
        but: String,
    },
    /// A file is not there or cannot be read.
    #[error("{}: {file} is missing or cannot be read", .folder.display())]
    File {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// A file lies elsewhere.
    #[error("{}: {file} is a link that leaves the bundle, to {}; put the file itself there", .folder.display(), .path.display())]
    Outside {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// Where it leads to.
        path: PathBuf,
    },
    /// A folder, a pipe or a device.
    #[error("{}: {file} is not a file", .folder.display())]
    NotAFile {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
    },
    /// More than is read into memory.
    #[error("{}: {file} has {found} bytes, at most {limit} are read", .folder.display())]
    TooLarge {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// Its size, or how much of it was read.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// A file has another size.
    #[error("{}: {file} has {found} bytes, {FACTS} says {expected}; copy the bundle again", .folder.display())]
    Size {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// Size on disk.
        found: u64,
        /// Size in `bundle.json`.
        expected: u64,
    },
    /// A file has other content.
    #[error("{}: {file} has SHA-256 {found}, {FACTS} says {expected}; copy the bundle again", .folder.display())]
    Hash {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// Hash of the content.
        found: String,
        /// Hash in `bundle.json`.
        expected: String,
    },
    /// A graph is not what the facts say.
    #[error("{}: {graph}: {what} is {found}, {FACTS} says {expected}", .folder.display())]
    Graph {
        /// The bundle.
        folder: PathBuf,
        /// Name of the graph.
        graph: String,
        /// Which input or output.
        what: String,
        /// What the graph has.
        found: String,
        /// What the facts promise.
        expected: String,
    },
    /// The runtime refuses a graph.
    #[error("{}: {graph} cannot be loaded: {reason}", .folder.display())]
    Unloadable {
        /// The bundle.
        folder: PathBuf,
        /// Name of the graph.
        graph: String,
        /// What ONNX Runtime says.
        reason: String,
    },
    /// The provider that was asked for does not run all of a graph.
    #[error(
        "{}: {graph} does not fit provider {provider}: {reason}; convert the checkpoint for it, choose another, or give --allow-fallback",
        .folder.display()
    )]
    Unfit {
        /// The bundle.
        folder: PathBuf,
        /// Name of the graph.
        graph: String,
        /// Name of the provider.
        provider: String,
        /// What it does not run.
        reason: String,
    },
    /// TensorRT's engines of it are not there, or are for something else.
    #[error(
        "{}: its TensorRT engines are not built for this machine: {reason}; `blip2 build --model {}` builds them",
        .folder.display(),
        .folder.display()
    )]
    NotBuilt {
        /// The bundle.
        folder: PathBuf,
        /// What was found in their place.
        reason: String,
    },
    /// The processor would compute something else than the graph says.
    #[error(
        "{}: {graph} multiplies 8-bit numbers, and ONNX Runtime {version} gets their sums wrong on this processor ({processor}); \
         choose a bundle in float32, or another version",
        .folder.display()
    )]
    Inexact {
        /// The bundle.
        folder: PathBuf,
        /// Name of the graph.
        graph: String,
        /// ONNX Runtime's version.
        version: String,
        /// What the processor has.
        processor: String,
    },
    /// The tokenizer file is not understood.
    #[error("{}: {file} is not a tokenizer: {reason}", .folder.display())]
    Tokenizer {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// What the tokenizers library says.
        reason: String,
    },
    /// The content of a file cannot be used.
    #[error("{}: {file}: {reason}", .folder.display())]
    Refused {
        /// The bundle.
        folder: PathBuf,
        /// Path inside the bundle.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A task that the bundle has no graphs for.
    #[error("{}: this bundle cannot {asked}; it can {can}", .folder.display())]
    Task {
        /// The bundle.
        folder: PathBuf,
        /// What was asked for.
        asked: TaskName,
        /// What it offers.
        can: String,
    },
}
