//! Files of a bundle: nothing outside its folder is read, nothing larger than it may be, and only true files.

use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Bundle, BundleError, FACTS};

/// Largest `bundle.json`.
pub const MAX_FACTS_BYTES: u64 = 4 << 20;
/// Largest `.onnx` file; weights lie beside it.
pub const MAX_GRAPH_BYTES: u64 = 8 << 20;
/// Largest tokenizer file.
pub const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Largest `golden.json`.
pub const MAX_GOLDEN_BYTES: u64 = 16 << 20;

impl Bundle {
    /// The whole content of a file of at most `limit` bytes.
    pub fn read(&self, file: &str, limit: u64) -> Result<Vec<u8>, BundleError> {
        read(&self.folder, file, limit)
    }

    /// Reads every file and compares its hash. `each` is called before a file is read, with its name and size.
    pub fn check_hashes(&self, mut each: impl FnMut(&str, u64)) -> Result<(), BundleError> {
        for (file, facts) in &self.facts.files {
            each(file, facts.bytes);
            let found = sha256(&self.path(file)).map_err(|source| unreadable(&self.folder, file, source))?;
            if found != facts.sha256 {
                let expected = facts.sha256.clone();
                return Err(BundleError::Hash { folder: self.folder.clone(), file: file.clone(), found, expected });
            }
        }
        Ok(())
    }

    /// One hash of what all files are called and hold: the same for the same bundle wherever it lies.
    pub fn hash(&self) -> String {
        let mut hasher = Sha256::new();
        for (file, facts) in &self.facts.files {
            hasher.update(format!("{file} {}\n", facts.sha256));
        }
        hexadecimal(hasher.finalize())
    }

    /// Files in the folder that the facts do not list; nothing reads them.
    pub fn unlisted(&self) -> Vec<String> {
        let (mut folders, mut found) = (vec![PathBuf::new()], Vec::new());
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(self.folder.join(&folder)).into_iter().flatten().flatten() {
                let inside = folder.join(entry.file_name());
                let name = inside.to_string_lossy().replace('\\', "/");
                match entry.file_type() {
                    _ if name == FACTS => {}
                    Ok(kind) if kind.is_dir() => folders.push(inside),
                    _ if self.facts.files.contains_key(&name) => {}
                    _ => found.push(name),
                }
            }
        }
        found.sort();
        found
    }

    pub(super) fn check_sizes(&self) -> Result<(), BundleError> {
        for (file, facts) in &self.facts.files {
            let found = locate(&self.folder, file)?.1.len();
            if found != facts.bytes {
                let (folder, file, expected) = (self.folder.clone(), file.clone(), facts.bytes);
                return Err(BundleError::Size { folder, file, found, expected });
            }
        }
        Ok(())
    }
}

/// Whether a name stays inside the folder and means the same to every system and library that reads it.
pub(super) fn is_plain(file: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+ /".contains(&byte);
    let ends = file.is_empty() || file.ends_with('/');
    !ends && file.bytes().all(plain) && Path::new(file).components().all(|part| matches!(part, Component::Normal(_)))
}

/// As [`Bundle::read`], before there is a bundle.
pub(super) fn read(folder: &Path, file: &str, limit: u64) -> Result<Vec<u8>, BundleError> {
    let (path, metadata) = locate(folder, file)?;
    let too_large = |found| BundleError::TooLarge { folder: folder.to_path_buf(), file: file.into(), found, limit };
    if metadata.len() > limit {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|opened| opened.take(limit + 1).read_to_end(&mut bytes));
    read.map_err(|source| unreadable(folder, file, source))?;
    if bytes.len() as u64 > limit { Err(too_large(bytes.len() as u64)) } else { Ok(bytes) }
}

/// Where a file truly lies. Links may lead about in the bundle, never out of it; pipes and devices have no end.
fn locate(folder: &Path, file: &str) -> Result<(PathBuf, Metadata), BundleError> {
    let lies = || -> Result<(PathBuf, PathBuf, Metadata), std::io::Error> {
        let path = std::fs::canonicalize(folder.join(file))?;
        let metadata = std::fs::metadata(&path)?;
        Ok((std::fs::canonicalize(folder)?, path, metadata))
    };
    let (root, path, metadata) = lies().map_err(|source| unreadable(folder, file, source))?;
    if !path.starts_with(&root) {
        return Err(BundleError::Outside { folder: folder.to_path_buf(), file: file.into(), path });
    }
    if !metadata.is_file() {
        return Err(BundleError::NotAFile { folder: folder.to_path_buf(), file: file.into() });
    }
    Ok((path, metadata))
}

fn unreadable(folder: &Path, file: &str, source: std::io::Error) -> BundleError {
    BundleError::File { folder: folder.to_path_buf(), file: file.into(), source }
}

/// Two digits a byte.
pub(crate) fn hexadecimal(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(path: &Path) -> Result<String, std::io::Error> {
    let mut file = File::open(path)?;
    let (mut digest, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let n_read = file.read(&mut buffer)?;
        if n_read == 0 {
            return Ok(hexadecimal(digest.finalize()));
        }
        digest.update(&buffer[..n_read]);
    }
}
