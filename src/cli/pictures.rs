//! Pictures that were named one by one or in a list: read, decoded and resized on other threads, ahead of the graphs.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, stdin};
use std::path::{Path, PathBuf};

use super::Failure;
use super::ahead::{Ahead, Reach};
use super::args::{Input, Many};
use super::plain::plain;
use crate::bundle::Bundle;
use crate::engine::{Engine, Sight};
use crate::error::Error;
use crate::pixels::{Alpha, Limits, Picture, PictureWarning, Pixels, PixelsError, Preprocess};
use crate::runtime::default_threads;
use crate::timing::{Stage, Timings};

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
    pixels: Result<Pixels, PixelsError>,
}

/// A path, or why a list of them cannot be read further.
type Named = (PathBuf, Option<std::io::Error>);

impl Pictures {
    /// Begins to read, before any graph is loaded, no more than a batch ahead; a second bundle will look at the same pictures.
    pub fn start(
        named: Vec<PathBuf>,
        (many, batch): (&Many, usize),
        input: &Input,
        bundles: (&Bundle, Option<&Bundle>),
    ) -> Result<Self, Failure> {
        let reader = Reader::new(input, bundles);
        let is_input = |path: &PathBuf| path == Path::new("-");
        if many.images_from.as_ref().is_some_and(is_input) && named.iter().any(is_input) {
            return Err(Failure::Usage("standard input holds a picture or a list of them; `-` is given as both".into()));
        }
        let count = many.images_from.is_none().then_some(named.len());
        let listed = many.images_from.as_deref().map(list).transpose()?;
        let n_threads = default_threads().get().min(count.unwrap_or(usize::MAX));
        let named = named.into_iter().map(|path| (path, None)).chain(listed.into_iter().flatten());
        let ahead = Ahead::new(named, Reach { n_threads, depth: batch }, move |named| reader.prepare(named));
        Ok(Self { ahead, count })
    }

    /// Whether there is or may be more than one.
    pub fn are_many(&self) -> bool {
        self.count != Some(1)
    }

    /// Looks at those that are ready, at most `n`, in one batch; if `waits`, at one at least. Nothing comes back when there are no more.
    pub fn look(&mut self, engine: &mut Engine, n: usize, waits: bool) -> Vec<Looked> {
        let mut prepared = Vec::with_capacity(n);
        prepared.extend(if waits { self.ahead.wait() } else { self.ahead.ready() });
        while let Some(next) = (!prepared.is_empty() && prepared.len() < n).then(|| self.ahead.ready()).flatten() {
            prepared.push(next);
        }
        look_at(engine, prepared)
    }
}

/// Looks at one picture.
pub(super) fn look(engine: &mut Engine, path: &Path, input: &Input) -> Result<Sight, Failure> {
    let prepared = Reader::new(input, (engine.bundle(), None)).prepare((path.to_path_buf(), None));
    let looked = look_at(engine, vec![prepared]).remove(0);
    looked.picture.warn();
    looked.sight
}

fn look_at(engine: &mut Engine, prepared: Vec<Prepared>) -> Vec<Looked> {
    let pixels: Vec<&Pixels> = prepared.iter().filter_map(|prepared| prepared.pixels.as_ref().ok()).collect();
    let mut seen = engine.seer().see_each(&pixels).into_iter();
    prepared.into_iter().map(|prepared| prepared.looked(&mut seen)).collect()
}

impl Prepared {
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
            Err(source) => Err(Failure::Picture { path, source }),
        };
        Looked { picture, sight }
    }
}

impl Known {
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

    fn prepare(&self, (path, error): Named) -> Prepared {
        let mut picture = Known { path, again: None, warnings: Vec::new(), timings: Timings::default() };
        let pixels = error.map_or_else(|| self.make(&mut picture), |error| Err(PixelsError::Io(error)));
        Prepared { picture, pixels }
    }

    fn make(&self, Known { path, again, warnings, timings }: &mut Known) -> Result<Pixels, PixelsError> {
        let picture = timings.time(Stage::DecodeImage, || match path.as_path() == Path::new("-") {
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

/// The paths in a file, one a line. They are read as they are needed, so a pipe may bring them one by one.
fn list(file: &Path) -> Result<impl Iterator<Item = Named> + Send + use<>, Failure> {
    let lines: Box<dyn Read + Send> = match file == Path::new("-") {
        true => Box::new(stdin()),
        false => match File::open(file) {
            Ok(file) => Box::new(file),
            Err(error) => return Err(Failure::Picture { path: file.to_path_buf(), source: PixelsError::Io(error) }),
        },
    };
    let file = file.to_path_buf();
    let mut is_broken = false;
    let lines = BufReader::new(lines).split(b'\n').take_while(move |line| !std::mem::replace(&mut is_broken, line.is_err()));
    Ok(lines.filter(|line| line.as_ref().map_or(true, |line| !line.is_empty())).map(move |line| match line {
        Ok(line) => (listed(line), None),
        Err(error) => (file.clone(), Some(error)),
    }))
}

/// In a list, `-` is a file like others.
fn listed(line: Vec<u8>) -> PathBuf {
    #[cfg(unix)]
    let path = PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(line));
    #[cfg(not(unix))]
    let path = PathBuf::from(String::from_utf8_lossy(&line).trim_end_matches('\r'));
    if path == Path::new("-") { Path::new(".").join(path) } else { path }
}
