//! `blip2 embed image|text|pair ITEM...`

use std::io::{Write as _, stdout};
use std::path::Path;

use ndarray::{Array2, Array3, Axis, stack};
use serde::Serialize;

use super::Failure;
use super::args::{Embed, EmbedKind};
use super::output::{each, look, warn_of_cut};
use crate::bundle::TaskName;
use crate::engine::Engine;
use crate::error::Error;

/// One line of output. README.md documents the keys.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    /// One vector, or one a query.
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding: Option<Vec<f32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queries: Option<Vec<Vec<f32>>>,
}

pub(super) fn run(command: &Embed) -> Result<(), Failure> {
    let bundle = command.model.bundle()?;
    bundle.require(TaskName::Embed).map_err(Error::from)?;
    let mut embeddings = Embeddings { command, engine: command.model.load(bundle)?, found: Vec::new() };
    match command.kind {
        EmbedKind::Image => each(&command.items, |image| embeddings.image(image))?,
        EmbedKind::Text => embeddings.texts()?,
        EmbedKind::Pair => embeddings.pairs()?,
    }
    match &command.npy {
        Some(path) => write(path, embeddings.found, command.has_queries()),
        None => Ok(()),
    }
}

impl Embed {
    fn has_queries(&self) -> bool {
        self.kind == EmbedKind::Pair || (self.kind == EmbedKind::Image && self.per_query)
    }
}

struct Embeddings<'a> {
    command: &'a Embed,
    engine: Engine,
    /// `[vectors, width]` an item, for the file.
    found: Vec<Array2<f32>>,
}

impl Embeddings<'_> {
    fn image(&mut self, image: &str) -> Result<(), Failure> {
        let (_, sight) = look(&mut self.engine, Path::new(image), &self.command.input)?;
        let embedding = sight.embedding().expect("a bundle that embeds compares pictures");
        let vectors = if self.command.per_query { embedding.queries.clone() } else { one(embedding.pooled()) };
        self.show(Some(image), None, vectors)
    }

    fn texts(&mut self) -> Result<(), Failure> {
        let texts: Vec<&str> = self.command.items.iter().map(String::as_str).collect();
        for text in &texts {
            warn_of_cut(&self.engine, text)?;
        }
        for (text, embedding) in texts.iter().zip(self.engine.embed_texts(&texts)?) {
            self.show(None, Some(text), one(embedding.pooled))?;
        }
        Ok(())
    }

    fn pairs(&mut self) -> Result<(), Failure> {
        let Some((image, texts)) = self.command.items.split_first().filter(|(_, texts)| !texts.is_empty()) else {
            return Err(Failure::Usage("`embed pair` needs a picture and at least one text".into()));
        };
        for text in texts {
            warn_of_cut(&self.engine, text)?;
        }
        let (_, sight) = look(&mut self.engine, Path::new(image), &self.command.input)?;
        let pairs: Vec<_> = texts.iter().map(|text| (&sight, text.as_str())).collect();
        for (text, pair) in texts.iter().zip(self.engine.embed_pairs(&pairs)?) {
            self.show(Some(image), Some(text), pair.states)?;
        }
        Ok(())
    }

    fn show(&mut self, image: Option<&str>, text: Option<&str>, vectors: Array2<f32>) -> Result<(), Failure> {
        if self.command.npy.is_some() {
            self.found.push(vectors);
            return Ok(());
        }
        let has_queries = self.command.has_queries();
        let queries = has_queries.then(|| vectors.outer_iter().map(|vector| vector.to_vec()).collect());
        let embedding = (!has_queries).then(|| vectors.row(0).to_vec());
        let row = serde_json::to_string(&Row { image, text, embedding, queries }).map_err(std::io::Error::from)?;
        Ok(writeln!(stdout().lock(), "{row}")?)
    }
}

fn one(vector: Vec<f32>) -> Array2<f32> {
    Array2::from_shape_vec((1, vector.len()), vector).expect("one row has the length of its vector")
}

/// `[items, width]`, or `[items, queries, width]`.
fn write(path: &Path, found: Vec<Array2<f32>>, has_queries: bool) -> Result<(), Failure> {
    let views: Vec<_> = found.iter().map(|vectors| vectors.view()).collect();
    let all: Array3<f32> = stack(Axis(0), &views).expect("vectors of one bundle have one shape");
    let written = if has_queries {
        ndarray_npy::write_npy(path, &all)
    } else {
        ndarray_npy::write_npy(path, &all.index_axis_move(Axis(1), 0))
    };
    written.map_err(|source| Failure::File { path: path.to_path_buf(), source })
}
