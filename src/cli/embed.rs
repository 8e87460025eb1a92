//! `blip2 embed image|text|pair ITEM...`

use std::io::{Write as _, stdout};
use std::path::{Path, PathBuf};

use ndarray::{Array2, Array3};
use serde::Serialize;

use super::Failure;
use super::args::{Embed, EmbedKind};
use super::failures::{Failures, Sound};
use super::npy::Npy;
use super::output::warn;
use super::pictures::{Pictures, Sources, look};
use super::progress::Progress;
use crate::bundle::{Bundle, Facts, TaskName};
use crate::engine::{Engine, Sight};
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
    if command.kind != EmbedKind::Image && command.many.images_from.is_some() {
        return Err(Failure::Usage("--images-from is for `embed image`".into()));
    }
    let bundle = command.model.bundle()?;
    bundle.require(TaskName::Embed).map_err(Error::from)?;
    let npy = command.npy.as_deref().map(Npy::create).transpose()?;
    let rows = Rows::new(command, bundle.facts());
    let batch = command.model.batch(&bundle, command.many.batch)?;
    let pictures = command.pictures(&bundle, batch)?;
    let engine = command.model.load(bundle)?;
    let mut embeddings = Embeddings { command, engine, batch, rows, failures: Failures::default() };
    match (command.kind, pictures) {
        (_, Some(pictures)) => embeddings.images(pictures)?,
        (EmbedKind::Pair, None) => embeddings.pairs()?,
        (_, None) => embeddings.texts()?,
    }
    if let Some(npy) = npy {
        npy.write(&embeddings.rows.finish(), command.has_queries())?;
    }
    embeddings.failures.end()
}

impl Embed {
    fn has_queries(&self) -> bool {
        self.kind == EmbedKind::Pair || (self.kind == EmbedKind::Image && self.per_query)
    }

    /// Pictures on their way, where they are what is embedded.
    fn pictures(&self, bundle: &Bundle, batch: usize) -> Result<Option<Pictures>, Failure> {
        let start = || {
            let named = self.items.iter().map(PathBuf::from).collect();
            Pictures::start(Sources::new(named, &self.many), batch, &self.input, (bundle, None))
        };
        (self.kind == EmbedKind::Image).then(start).transpose()
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
    batch: usize,
    rows: Rows,
    failures: Failures,
}

/// What goes into the file: `[items, vectors, width]`, NaN for items that have none.
struct Rows {
    values: Vec<f32>,
    n_items: usize,
    n_vectors: usize,
    width: usize,
}

impl Rows {
    fn new(command: &Embed, facts: &Facts) -> Self {
        let n_vectors = if command.has_queries() { facts.qformer.n_queries } else { 1 };
        let (n_items, width) = match command.kind {
            EmbedKind::Pair => (command.items.len() - 1, facts.qformer.hidden),
            EmbedKind::Image | EmbedKind::Text => (command.items.len(), facts.qformer.joint.unwrap_or(0)),
        };
        Self { values: Vec::new(), n_items, n_vectors, width }
    }

    /// Those of an item behind all before.
    fn push(&mut self, index: usize, vectors: &Array2<f32>) {
        self.count(index);
        self.fill(index);
        self.values.extend(vectors);
    }

    /// There is such an item, with vectors or without.
    fn count(&mut self, index: usize) {
        self.n_items = self.n_items.max(index + 1);
    }

    fn fill(&mut self, n_items: usize) {
        self.values.resize(n_items * self.n_vectors * self.width, f32::NAN);
    }

    fn finish(&mut self) -> Array3<f32> {
        self.fill(self.n_items);
        let shape = (self.n_items, self.n_vectors, self.width);
        Array3::from_shape_vec(shape, std::mem::take(&mut self.values)).expect("an item has as many values as its shape says")
    }
}

/// Whose vectors they are.
struct Item<'a> {
    index: usize,
    image: Option<&'a str>,
    text: Option<&'a str>,
    warnings: &'a [Warning],
}

impl Embeddings<'_> {
    fn images(&mut self, mut pictures: Pictures) -> Result<(), Failure> {
        let (mut progress, mut index) = (Progress::new(pictures.count), 0);
        loop {
            let looked = pictures.look(&mut self.engine, self.batch, true);
            if looked.is_empty() {
                return Ok(());
            }
            for looked in looked {
                progress.clear();
                looked.picture.warn();
                match looked.sight {
                    Ok(sight) => self.picture(index, &looked.picture.path, &sight)?,
                    Err(failure) => {
                        self.failures.note(self.command.failed(index, failure));
                        self.rows.count(index);
                    }
                }
                progress.advance();
                index += 1;
            }
        }
    }

    fn picture(&mut self, index: usize, path: &Path, sight: &Sight) -> Result<(), Failure> {
        let embedding = sight.embedding().expect("a bundle that embeds compares pictures");
        let vectors = if self.command.per_query { embedding.queries.clone() } else { one(embedding.pooled()) };
        self.show(&Item { index, image: Some(&path.to_string_lossy()), text: None, warnings: &[] }, vectors)
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
        let sight = look(&mut self.engine, Path::new(image), &self.command.input)?;
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
            self.rows.push(item.index, &vectors);
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
