//! One array of float32 in a file.

use std::ffi::OsString;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use ndarray::{Array3, Axis};
use ndarray_npy::{WriteNpyError, WriteNpyExt};

use super::Failure;

/// A file that is written aside and renamed when it is complete, so that a place where nothing can be written is known before any work,
/// and an old array stays until there is a new one.
pub(super) struct Npy {
    path: PathBuf,
    /// None for pipes and devices, which are written to as they are.
    aside: Option<PathBuf>,
}

impl Npy {
    pub fn create(path: &Path) -> Result<Self, Failure> {
        let mut npy = Self { path: path.to_path_buf(), aside: None };
        let is_special = path.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir());
        if path.is_dir() {
            return Err(npy.failed(std::io::Error::from(std::io::ErrorKind::IsADirectory).into()));
        }
        if !is_special {
            let aside = PathBuf::from([path.as_os_str(), ".part".as_ref()].into_iter().collect::<OsString>());
            File::create(&aside).map_err(|error| npy.failed(error.into()))?;
            npy.aside = Some(aside);
        }
        Ok(npy)
    }

    /// `[items, vectors, width]`; where an item has one vector by its nature, that axis goes.
    pub fn write(mut self, all: &Array3<f32>, has_vectors: bool) -> Result<(), Failure> {
        self.write_to(self.aside.as_deref().unwrap_or(&self.path), all, has_vectors).map_err(|error| self.failed(error))?;
        if let Some(aside) = &self.aside {
            std::fs::rename(aside, &self.path).map_err(|error| self.failed(error.into()))?;
        }
        self.aside = None;
        Ok(())
    }

    fn write_to(&self, path: &Path, all: &Array3<f32>, has_vectors: bool) -> Result<(), WriteNpyError> {
        let mut file = BufWriter::new(File::create(path)?);
        if has_vectors {
            all.write_npy(&mut file)?
        } else {
            all.index_axis(Axis(1), 0).write_npy(&mut file)?
        }
        file.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        Ok(())
    }

    fn failed(&self, source: WriteNpyError) -> Failure {
        Failure::File { path: self.path.clone(), source }
    }
}

impl Drop for Npy {
    fn drop(&mut self) {
        if let Some(aside) = &self.aside {
            let _ = std::fs::remove_file(aside);
        }
    }
}
