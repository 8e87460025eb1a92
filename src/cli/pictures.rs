//! Pictures that were named one by one, in a list or beside texts: read, decoded and resized on other threads, ahead of the graphs.

use std::io::stdin;
use std::path::{Path, PathBuf};

use super::Failure;
use super::ahead::{Ahead, Reach};
use super::args::{Input, Many};
use super::lists::{self, Named};
use super::plain::plain;
use crate::bundle::Bundle;
use crate::engine::{Engine, Sight};
use crate::error::Error;
use crate::pixels::{Alpha, Limits, Picture, PictureWarning, Pixels, PixelsError, Preprocess};
use crate::runtime::default_threads;
use crate::timing::{Stage, Timings};

/// Where pictures come from.
pub(super) struct Sources<'a> {
    named: Vec<PathBuf>,
    listed: Option<&'a Path>,
    /// With the key of their texts.
    pairs: Option<(&'a Path, &'static str)>,
    /// How many are worked on together, if anybody said.
    pub batch: Option<usize>,
}

/// Pictures on their way to the graphs, in the order in which they were named.
pub(super) struct Pictures {
    ahead: Ahead<Prepared>,
    /// How many there are, where that is known before the end.
    pub count: Option<usize>,
}

/// A picture that was looked at, or why it was not.
pub(super) struct Looked {
    pub picture: Known,
    pub sight: Result<Sight, Failure>,
}

/// What there is to say about a picture.
pub(super) struct Known {
    pub path: PathBuf,
    /// That stood beside it.
    pub texts: Option<Vec<String>>,
    /// As a second bundle wants it, where there is one.
    pub again: Option<Pixels>,
    warnings: Vec<PictureWarning>,
    timings: Timings,
}

/// How every picture is read.
struct Reader {
    limits: Limits,
    alpha: Option<Alpha>,
    /// Of the bundle that looks, and of the one that looks again.
    how: (Preprocess, Option<Preprocess>),
}

struct Prepared {
    picture: Known,
    pixels: Result<Pixels, Failure>,
}

impl<'a> Sources<'a> {
    /// Those that were typed, and those in a list.
    pub fn new(named: Vec<PathBuf>, many: &'a Many) -> Self {
        Self { named, listed: many.images_from.as_deref(), pairs: None, batch: many.batch }
    }

    /// And those in a file with texts beside them.
    pub fn with_pairs(self, file: Option<&'a PathBuf>, key: &'static str) -> Self {
        Self { pairs: file.map(|file| (file.as_path(), key)), ..self }
    }

    /// How many there are, where that is known before the end.
    fn count(&self) -> Option<usize> {
        (self.listed.is_none() && self.pairs.is_none()).then_some(self.named.len())
    }

    fn read(self) -> Result<impl Iterator<Item = Named> + Send + use<>, Failure> {
        if self.listed.is_some_and(is_input) && self.named.iter().any(|path| is_input(path)) {
            return Err(Failure::Usage("standard input holds a picture or a list of them; `-` is given as both".into()));
        }
        let listed = self.listed.map(lists::paths).transpose()?;
        let pairs = self.pairs.map(|(file, key)| lists::pairs(file, key)).transpose()?;
        Ok(self.named.into_iter().map(Named::alone).chain(listed.into_iter().flatten()).chain(pairs.into_iter().flatten()))
    }
}

impl Pictures {
    /// Begins to read, before any graph is loaded, no more than a batch ahead; a second bundle will look at the same pictures.
    pub fn start(sources: Sources<'_>, batch: usize, input: &Input, bundles: (&Bundle, Option<&Bundle>)) -> Result<Self, Failure> {
        let (reader, count) = (Reader::new(input, bundles), sources.count());
        let n_threads = default_threads().get().min(count.unwrap_or(usize::MAX));
        let ahead = Ahead::new(sources.read()?, Reach { n_threads, depth: batch }, move |named| reader.prepare(named));
        Ok(Self { ahead, count })
    }

    /// Whether there is or may be more than one.
    pub fn are_many(&self) -> bool {
        self.count != Some(1)
    }

    /// Looks at those that are ready, at most `n` or with as many texts of their own, in one batch; if `waits`, at one at least. Nothing
    /// comes back when there are no more.
    pub fn look(&mut self, engine: &mut Engine, n: usize, waits: bool) -> Vec<Looked> {
        let mut prepared = Vec::with_capacity(n);
        prepared.extend(if waits { self.ahead.wait() } else { self.ahead.ready() });
        while !prepared.is_empty() && prepared.iter().map(Prepared::n_texts).sum::<usize>() < n {
            let Some(next) = self.ahead.ready() else { break };
            prepared.push(next);
        }
        look_at(engine, prepared)
    }
}

/// Looks at one picture.
pub(super) fn look(engine: &mut Engine, path: &Path, input: &Input) -> Result<Sight, Failure> {
    let prepared = Reader::new(input, (engine.bundle(), None)).prepare(Named::alone(path.to_path_buf()));
    let looked = look_at(engine, vec![prepared]).remove(0);
    looked.picture.warn();
    looked.sight
}

fn look_at(engine: &mut Engine, prepared: Vec<Prepared>) -> Vec<Looked> {
    let pixels: Vec<&Pixels> = prepared.iter().filter_map(|prepared| prepared.pixels.as_ref().ok()).collect();
    let mut seen = engine.seer().see_each(&pixels).into_iter();
    prepared.into_iter().map(|prepared| prepared.looked(&mut seen)).collect()
}

fn is_input(path: &Path) -> bool {
    path == Path::new("-")
}

impl Prepared {
    /// Those that stand beside it, or that which is asked about all.
    fn n_texts(&self) -> usize {
        self.picture.texts.as_ref().map_or(1, |texts| texts.len().max(1))
    }

    /// With the next of what was seen, if it was looked at.
    fn looked(self, seen: &mut impl Iterator<Item = Result<Sight, Error>>) -> Looked {
        let Self { picture, pixels } = self;
        let path = picture.path.clone();
        let sight = match pixels.map(|_| seen.next().expect("every picture that was made ready was looked at")) {
            Ok(Ok(mut sight)) => {
                sight.add_timings(&picture.timings);
                Ok(sight)
            }
            Ok(Err(error)) => Err(Failure::About { path, source: Box::new(error.into()) }),
            Err(failure) => Err(failure),
        };
        Looked { picture, sight }
    }
}

impl Known {
    /// A failure with the picture's name.
    pub fn about(&self, failure: Failure) -> Failure {
        Failure::About { path: self.path.clone(), source: Box::new(failure) }
    }

    /// Says what is wrong with a picture that is whole.
    pub fn warn(&self) {
        for warning in &self.warnings {
            eprintln!("blip2: {}: {warning}", plain(&self.path.to_string_lossy()));
        }
    }
}

impl Reader {
    fn new(input: &Input, (own, again): (&Bundle, Option<&Bundle>)) -> Self {
        let image = |bundle: &Bundle| bundle.facts().image.clone();
        Self { limits: input.into(), alpha: input.alpha, how: (image(own), again.map(image)) }
    }

    fn prepare(&self, Named { path, texts, failure }: Named) -> Prepared {
        let mut picture = Known { path, texts, again: None, warnings: Vec::new(), timings: Timings::default() };
        let make = || self.make(&mut picture).map_err(|source| Failure::Picture { path: picture.path.clone(), source });
        let pixels = failure.map_or_else(make, Err);
        Prepared { picture, pixels }
    }

    fn make(&self, Known { path, again, warnings, timings, .. }: &mut Known) -> Result<Pixels, PixelsError> {
        let picture = timings.time(Stage::DecodeImage, || match is_input(path) {
            true => Picture::read(stdin().lock(), &self.limits),
            false => Picture::open(path, &self.limits),
        })?;
        warnings.extend_from_slice(picture.warnings());
        let picture = if let Some(alpha) = self.alpha { picture.without_alpha(alpha) } else { picture };
        let pixels = |how| Pixels::from_pictures(&[&picture], how);
        *again = self.how.1.as_ref().map(pixels).transpose()?;
        timings.time(Stage::Preprocess, || pixels(&self.how.0))
    }
}
