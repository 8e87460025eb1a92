//! `blip2 embed image|text|pair ITEM...`

use std::io::{Write as _, stdout};
use std::path::Path;

use ndarray::{Array2, Array3, Axis};
use serde::Serialize;

use super::Failure;
use super::args::{Embed, EmbedKind};
use super::failures::{Failures, Sound};
use super::npy::Npy;
use super::output::{look, warn};
use crate::bundle::{Facts, TaskName};
use crate::engine::Engine;
use crate::error::Error;
use crate::text::Warning;

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
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    warnings: &'a [Warning],
}

pub(super) fn run(command: &Embed) -> Result<(), Failure> {
    if command.kind == EmbedKind::Text && command.per_query {
        return Err(Failure::Usage("--per-query is for pictures: a text has one vector".into()));
    }
    if command.kind == EmbedKind::Pair && command.items.len() < 2 {
        return Err(Failure::Usage("`embed pair` needs a picture and at least one text".into()));
    }
    let bundle = command.model.bundle()?;
    bundle.require(TaskName::Embed).map_err(Error::from)?;
    let npy = command.npy.as_deref().map(Npy::create).transpose()?;
    let rows = if npy.is_some() { command.rows(bundle.facts()) } else { Array3::zeros((0, 0, 0)) };
    let engine = command.model.load(bundle)?;
    let mut embeddings = Embeddings { command, engine, rows, failures: Failures::default() };
    match command.kind {
        EmbedKind::Image => embeddings.images()?,
        EmbedKind::Text => embeddings.texts()?,
        EmbedKind::Pair => embeddings.pairs()?,
    }
    if let Some(npy) = npy {
        npy.write(&embeddings.rows, command.has_queries())?;
    }
    embeddings.failures.end()
}

impl Embed {
    fn has_queries(&self) -> bool {
        self.kind == EmbedKind::Pair || (self.kind == EmbedKind::Image && self.per_query)
    }

    /// The whole array, `[items, vectors, width]`, before anything is known.
    fn rows(&self, facts: &Facts) -> Array3<f32> {
        let n_vectors = if self.has_queries() { facts.qformer.n_queries } else { 1 };
        let (n_items, width) = match self.kind {
            EmbedKind::Pair => (self.items.len() - 1, facts.qformer.hidden),
            EmbedKind::Image | EmbedKind::Text => (self.items.len(), facts.qformer.joint.unwrap_or(0)),
        };
        Array3::from_elem((n_items, n_vectors, width), f32::NAN)
    }

    /// What is said of an item without vectors.
    fn failed(&self, row: usize, failure: Failure) -> Failure {
        match &self.npy {
            Some(path) => Failure::Row { row, path: path.clone(), source: Box::new(failure) },
            None => failure,
        }
    }
}

struct Embeddings<'a> {
    command: &'a Embed,
    engine: Engine,
    /// For the file.
    rows: Array3<f32>,
    failures: Failures,
}

/// Whose vectors they are.
struct Item<'a> {
    index: usize,
    image: Option<&'a str>,
    text: Option<&'a str>,
    warnings: &'a [Warning],
}

impl Embeddings<'_> {
    fn images(&mut self) -> Result<(), Failure> {
        for (index, image) in self.command.items.iter().enumerate() {
            let sight = match look(&mut self.engine, Path::new(image), &self.command.input) {
                Ok((_, sight)) => sight,
                Err(failure) => {
                    self.failures.note(self.command.failed(index, failure));
                    continue;
                }
            };
            let embedding = sight.embedding().expect("a bundle that embeds compares pictures");
            let vectors = if self.command.per_query { embedding.queries.clone() } else { one(embedding.pooled()) };
            self.show(&Item { index, image: Some(image), text: None, warnings: &[] }, vectors)?;
        }
        Ok(())
    }

    fn texts(&mut self) -> Result<(), Failure> {
        let command = self.command;
        let sound = self.sift(&command.items);
        let texts: Vec<&str> = sound.iter().map(|sound| sound.text).collect();
        for (sound, embedding) in sound.iter().zip(self.engine.seer().embed_texts(&texts)?) {
            self.show(&Item::of(sound, None), one(embedding.pooled))?;
        }
        Ok(())
    }

    fn pairs(&mut self) -> Result<(), Failure> {
        let (image, texts) = self.command.items.split_first().expect("there is a picture, checked above");
        let sound = self.sift(texts);
        if sound.is_empty() {
            return Ok(());
        }
        let (_, sight) = look(&mut self.engine, Path::new(image), &self.command.input)?;
        let pairs: Vec<_> = sound.iter().map(|sound| (&sight, sound.text)).collect();
        for (sound, pair) in sound.iter().zip(self.engine.seer().embed_pairs(&pairs)?) {
            self.show(&Item::of(sound, Some(image)), pair.states)?;
        }
        Ok(())
    }

    fn sift<'t>(&mut self, texts: &'t [String]) -> Vec<Sound<'t, Vec<Warning>>> {
        let (command, engine) = (self.command, &self.engine);
        let check = |text: &str| {
            let reading = engine.context().reading(text)?;
            command.read.accept(&reading.warnings)?;
            Ok(reading.warnings)
        };
        self.failures.sift("text", texts, check, |row, failure| command.failed(row, failure))
    }

    fn show(&mut self, item: &Item<'_>, vectors: Array2<f32>) -> Result<(), Failure> {
        warn(item.warnings);
        if self.command.npy.is_some() {
            self.rows.index_axis_mut(Axis(0), item.index).assign(&vectors);
            return Ok(());
        }
        let has_queries = self.command.has_queries();
        let queries = has_queries.then(|| vectors.outer_iter().map(|vector| vector.to_vec()).collect());
        let embedding = (!has_queries).then(|| vectors.row(0).to_vec());
        let Item { image, text, warnings, .. } = *item;
        let row = Row { image, text, embedding, queries, warnings };
        let row = serde_json::to_string(&row).map_err(std::io::Error::from)?;
        Ok(writeln!(stdout().lock(), "{row}")?)
    }
}

impl<'a> Item<'a> {
    fn of(sound: &'a Sound<'_, Vec<Warning>>, image: Option<&'a str>) -> Self {
        Self { index: sound.index, image, text: Some(sound.text), warnings: &sound.read }
    }
}

fn one(vector: Vec<f32>) -> Array2<f32> {
    Array2::from_shape_vec((1, vector.len()), vector).expect("one row has the length of its vector")
}
