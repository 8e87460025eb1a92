//! Rows of the token embedding table, read straight from the bundle's weights.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use crate::bundle::{Bundle, BundleError, EmbeddingFacts};
use crate::decode::TokenId;
use crate::qformer::Queries;
use crate::runtime::{RuntimeError, f32_from};

/// `[vocabulary, hidden]` on disk; the operating system keeps the rows in use in memory.
#[derive(Debug)]
pub struct Embedding {
    file: File,
    path: PathBuf,
    facts: EmbeddingFacts,
    row: Vec<u8>,
}

impl Embedding {
    /// Opens the file that holds the table.
    pub fn open(bundle: &Bundle) -> Result<Self, BundleError> {
        let facts = bundle.language().embedding.clone();
        let path = bundle.path(&facts.file);
        let file = File::open(&path).map_err(|source| BundleError::File {
            folder: bundle.folder().to_path_buf(),
            file: facts.file.clone(),
            source,
        })?;
        let row = vec![0; facts.shape[1] * facts.dtype.size()];
        Ok(Self { file, path, facts, row })
    }

    /// Writes query tokens and the embeddings of the prompt behind them to the beginning of `into`, `[positions, hidden]`.
    pub fn write(&mut self, queries: Option<&Queries>, prompt: &[TokenId], into: &mut [f32]) -> Result<(), RuntimeError> {
        let mut positions = into.chunks_exact_mut(self.facts.shape[1]);
        if let Some(queries) = queries {
            let reading = |source: crate::runtime::GraphError| RuntimeError::Failed {
                graph: "decoder".into(),
                doing: "reading queries",
                source: source.into(),
            };
            let values = queries.0.f32().map_err(reading)?;
            for (query, into) in values.chunks_exact(self.facts.shape[1]).zip(&mut positions) {
                into.copy_from_slice(query);
            }
        }
        for (&token, into) in prompt.iter().zip(&mut positions) {
            self.read(token, into)?;
        }
        Ok(())
    }

    /// Copies the embedding of `token` to `into`, `[hidden]`.
    pub fn read(&mut self, token: TokenId, into: &mut [f32]) -> Result<(), RuntimeError> {
        let at = self.facts.offset + u64::from(token) * self.row.len() as u64;
        let read = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.read_exact(&mut self.row));
        read.map_err(|source| RuntimeError::Embedding { path: self.path.clone(), source: source.into() })?;
        f32_from(&self.row, self.facts.dtype, into);
        Ok(())
    }
}
