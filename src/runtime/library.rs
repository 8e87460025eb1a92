//! Finds ONNX Runtime's shared library and loads it.
//!
//! Order: the path given by the caller, `ORT_DYLIB_PATH`, beside the executable, the active virtual environment (`VIRTUAL_ENV`), a `.venv`
//! in a folder above the executable. The working directory is not searched: a library from a folder of pictures must not be run.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ort::environment::Environment;
use ort::logging::LogLevel;

use super::threads::Threads;

/// A library that was loaded.
#[derive(Clone, Debug)]
pub struct Library {
    /// Where it lies.
    pub path: PathBuf,
    /// How it was found.
    pub source: Source,
    /// Its version, such as `1.31.1`.
    pub version: String,
}

/// How a library was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Named by the caller.
    Option,
    /// `ORT_DYLIB_PATH`.
    Environment,
    /// In the folder of the executable.
    BesideExecutable,
    /// In the active virtual environment.
    ActiveVirtualEnvironment,
    /// In a `.venv` above the executable.
    ProjectVirtualEnvironment,
}

/// Why there is no ONNX Runtime.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// Nothing was found anywhere.
    #[error(
        "ONNX Runtime is not found; install it with `make setup` or `pip install onnxruntime`, or name the library with --onnxruntime or ORT_DYLIB_PATH"
    )]
    NotFound,
    /// The place that was named holds no library.
    #[error("{named}: no ONNX Runtime library at {}", .path.display())]
    NotThere {
        /// Who named it.
        named: Source,
        /// The place.
        path: PathBuf,
    },
    /// The file is not a library that this engine can use.
    #[error("ONNX Runtime cannot be loaded")]
    Unloadable(#[source] ort::LoadDynamicError),
    /// A process can hold only one.
    #[error("{} cannot be loaded beside {}, which this process already uses", .path.display(), .loaded.display())]
    Another {
        /// What was asked for now.
        path: PathBuf,
        /// What was loaded before.
        loaded: PathBuf,
    },
    /// The library was loaded but does not start.
    #[error("ONNX Runtime does not start")]
    Environment(#[source] ort::Error),
}

/// A process has one ONNX Runtime with one environment, shared by every engine in it.
#[derive(Clone, Debug)]
pub(super) struct Loaded {
    pub library: Library,
    pub environment: Environment,
    /// The environment's own, for every session that asks for the same.
    pub threads: Threads,
}

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// Loads the library, or hands out what is loaded; `threads` are those of the first to come.
pub(super) fn load(named: Option<&Path>, threads: Threads) -> Result<Loaded, LibraryError> {
    let (path, source) = find(named)?;
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(loaded) = loaded.as_ref() {
        return match loaded.library.path == path {
            true => Ok(loaded.clone()),
            false => Err(LibraryError::Another { path, loaded: loaded.library.path.clone() }),
        };
    }
    // On Windows this is enough; elsewhere only ORT_DISABLE_TELEMETRY in the environment is, which the program sees to.
    let builder = ort::init_from(&path).map_err(LibraryError::Unloadable)?.with_name("blip2").with_telemetry(false);
    let environment = threads.pool().and_then(|pool| builder.with_global_thread_pool(pool).build());
    let environment = environment.map_err(LibraryError::Environment)?;
    // Every error comes back as one; ONNX Runtime would print it a second time, with its stack.
    environment.set_log_level(LogLevel::Fatal);
    let library = Library { version: loaded_version(&path), path, source };
    Ok(loaded.insert(Loaded { library, environment, threads }).clone())
}

fn find(named: Option<&Path>) -> Result<(PathBuf, Source), LibraryError> {
    if let Some(path) = named {
        return at(path).map(|found| (found, Source::Option)).ok_or_else(|| not_there(Source::Option, path));
    }
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from).filter(|path| !path.as_os_str().is_empty()) {
        return at(&path).map(|found| (found, Source::Environment)).ok_or_else(|| not_there(Source::Environment, &path));
    }
    let executable = std::env::current_exe().and_then(std::fs::canonicalize).unwrap_or_default();
    let above = || executable.ancestors().skip(1);
    let beside = above().next().and_then(in_folder).map(|found| (found, Source::BesideExecutable));
    let active = || std::env::var_os("VIRTUAL_ENV").and_then(|root| in_virtual_environment(Path::new(&root)));
    let project = || above().find_map(|folder| in_virtual_environment(&folder.join(".venv")));
    beside
        .or_else(|| active().map(|found| (found, Source::ActiveVirtualEnvironment)))
        .or_else(|| project().map(|found| (found, Source::ProjectVirtualEnvironment)))
        .ok_or(LibraryError::NotFound)
}

fn not_there(named: Source, path: &Path) -> LibraryError {
    LibraryError::NotThere { named, path: path.to_path_buf() }
}

fn at(path: &Path) -> Option<PathBuf> {
    if path.is_file() { std::path::absolute(path).ok() } else { in_folder(path) }
}

/// Where Python packages lie in the active virtual environment and in those above the executable.
pub(super) fn site_packages() -> Vec<PathBuf> {
    let active = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let executable = std::env::current_exe().and_then(std::fs::canonicalize).unwrap_or_default();
    let above = executable.ancestors().skip(1).map(|folder| folder.join(".venv"));
    active.into_iter().chain(above).flat_map(|root| packages_of(&root)).collect()
}

fn in_virtual_environment(root: &Path) -> Option<PathBuf> {
    packages_of(root).into_iter().find_map(|packages| in_folder(&packages.join("onnxruntime").join("capi")))
}

fn packages_of(root: &Path) -> Vec<PathBuf> {
    let pythons = std::fs::read_dir(root.join("lib")).into_iter().flatten().flatten().map(|entry| entry.path());
    pythons.map(|python| python.join("site-packages")).chain([root.join("Lib").join("site-packages")]).collect()
}

/// The wheel has only the versioned name, other packages the plain one.
fn in_folder(folder: &Path) -> Option<PathBuf> {
    let is_library = |name: &str| {
        let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
        let rest = name.strip_prefix(prefix).and_then(|name| name.strip_prefix("onnxruntime"));
        rest.is_some_and(|rest| rest == suffix || (rest.starts_with('.') && rest.contains(suffix)))
    };
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(is_library))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    std::path::absolute(found.pop()?).ok()
}

/// The wheel's file name carries the full version; otherwise the library's build information or its symbols do, if anything does.
fn loaded_version(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let named = || name.find(|char: char| char.is_ascii_digit()).and_then(|at| leading_version(&name.as_bytes()[at..]));
    let branch = || leading_version(ort::info().split("git-branch=rel-").nth(1)?.as_bytes());
    named().or_else(branch).or_else(|| symbol_version(path)).unwrap_or_else(|| "unknown".into())
}

/// What stands behind `VERS_` in the version of every symbol that a library for Linux exports.
fn symbol_version(path: &Path) -> Option<String> {
    const MARK: &[u8] = b"VERS_";
    let content = std::fs::read(path).ok()?;
    content
        .windows(MARK.len())
        .enumerate()
        .filter(|(_, found)| *found == MARK)
        .find_map(|(at, _)| leading_version(&content[at + MARK.len()..]))
}

/// A version such as `1.31.1` at the beginning of what may go on otherwise.
fn leading_version(text: &[u8]) -> Option<String> {
    let end = text.iter().position(|byte| !byte.is_ascii_digit() && *byte != b'.').unwrap_or(text.len());
    let version = std::str::from_utf8(&text[..end]).ok()?.trim_end_matches('.');
    version.contains('.').then(|| version.to_owned())
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Option => "--onnxruntime",
            Self::Environment => "ORT_DYLIB_PATH",
            Self::BesideExecutable => "beside the executable",
            Self::ActiveVirtualEnvironment => "the active virtual environment",
            Self::ProjectVirtualEnvironment => "the project's .venv",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_of_any_name_tells_its_version() {
        let folder = std::env::temp_dir().join(format!("blip2-library-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (plain, symbols) = (folder.join("libonnxruntime.so"), b"VERS_ GLIBC_2.17\0VERS_1.31.1\0".as_slice());
        std::fs::write(&plain, symbols).unwrap();
        assert_eq!(symbol_version(&plain).as_deref(), Some("1.31.1"));
        std::fs::write(&plain, &symbols[..20]).unwrap();
        assert_eq!(symbol_version(&plain), None);
        for name in ["libonnxruntime.so.1.32.0", "libonnxruntime.1.32.0.dylib"] {
            assert_eq!(loaded_version(&folder.join(name)), "1.32.0");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
