//! `blip2 match IMAGE TEXT...`

use std::path::Path;

use serde::Serialize;

use super::Failure;
use super::args;
use super::failures::{Failures, Sound, as_it_is};
use super::output::Printer;
use super::pictures::{Looked, Pictures};
use super::progress::Progress;
use crate::bundle::TaskName;
use crate::engine::{Engine, Match, ReadText, Sight};
use crate::error::Error;
use crate::text::Warning;
use crate::timing::{Stage, Timings};

/// One line of `--json`. README.md documents the keys.
#[derive(Serialize)]
struct Row<'a> {
    image: &'a str,
    text: &'a str,
    itm_probability: f32,
    itm_logit: f32,
    itc_similarity: f32,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    warnings: &'a [Warning],
    timings_ms: &'a Timings,
}

pub(super) fn run(command: &args::Match) -> Result<(), Failure> {
    let args::Match { first, rest, images, show, read, input, model } = command;
    let bundle = model.bundle()?;
    bundle.require(TaskName::Match).map_err(Error::from)?;
    let (named, texts) = images.sort(first, rest)?;
    let batch = model.batch(&bundle, images.many.batch)?;
    let mut pictures = Pictures::start(named, (&images.many, batch), input, (&bundle, None))?;
    let mut engine = model.load(bundle)?;
    let mut failures = Failures::default();
    let check = |text: &str| {
        let reading = engine.context().reading(text)?;
        read.accept(&reading.warnings)?;
        Ok(reading.warnings)
    };
    let texts = failures.sift("text", &texts, check, as_it_is);
    if texts.is_empty() {
        return failures.end();
    }
    let read = engine.seer().read_texts(&texts.iter().map(|text| text.text).collect::<Vec<_>>())?;
    let (many, progress) = (pictures.are_many(), Progress::new(pictures.count));
    let mut matches = Matches { texts, read, failures, progress, printer: Printer::new(show), many };
    loop {
        let looked = pictures.look(&mut engine, batch, true);
        if looked.is_empty() {
            return matches.failures.end();
        }
        matches.show(&mut engine, looked)?;
    }
}

/// Texts that are compared with every picture.
struct Matches<'a> {
    texts: Vec<Sound<'a, Vec<Warning>>>,
    /// What the engine made of each.
    read: Vec<ReadText>,
    failures: Failures,
    progress: Progress,
    printer: Printer<'a>,
    /// Whether lines name their picture.
    many: bool,
}

impl Matches<'_> {
    /// Compares pictures that were looked at with the texts, and writes a line a pair.
    fn show(&mut self, engine: &mut Engine, looked: Vec<Looked>) -> Result<(), Failure> {
        let sights: Vec<&Sight> = looked.iter().filter_map(|looked| looked.sight.as_ref().ok()).collect();
        let mut time = Timings::default();
        let mut found = time.time(Stage::Match, || self.compare(engine, &sights)).into_iter();
        for Looked { picture, sight } in looked {
            self.progress.clear();
            picture.warn();
            let found = sight.map(|mut sight| {
                sight.add_timings(&time);
                (sight, found.next().expect("every picture that was seen was compared"))
            });
            match found {
                Ok((sight, Ok(found))) => self.rows(&picture.path, &found, sight.timings())?,
                Ok((_, Err(error))) => self.failures.note(Failure::About { path: picture.path, source: Box::new(error.into()) }),
                Err(failure) => self.failures.note(failure),
            }
            self.progress.advance();
        }
        Ok(())
    }

    /// Every picture with all texts, together if that goes well; if not, picture by picture, so that none fails for another.
    fn compare(&self, engine: &mut Engine, sights: &[&Sight]) -> Vec<Result<Vec<Match>, Error>> {
        let pairs = sights.iter().flat_map(|sight| self.read.iter().map(move |text| (*sight, text)));
        match engine.seer().match_read(&pairs.collect::<Vec<_>>()) {
            Ok(found) => found.chunks(self.read.len()).map(|found| Ok(found.to_vec())).collect(),
            Err(error) if sights.len() == 1 => vec![Err(error)],
            Err(_) => sights.iter().flat_map(|sight| self.compare(engine, &[sight])).collect(),
        }
    }

    fn rows(&mut self, path: &Path, found: &[Match], timings_ms: &Timings) -> Result<(), Failure> {
        let image = path.to_string_lossy();
        let label = if self.many { format!("{image}: ") } else { String::new() };
        for (sound, found) in self.texts.iter().zip(found) {
            let Match { itm_probability, itm_logit, itc_similarity } = *found;
            let (text, warnings) = (sound.text, sound.read.as_slice());
            let row = Row { image: &image, text, itm_probability, itm_logit, itc_similarity, warnings, timings_ms };
            self.printer.row(&row, &format!("{label}{itm_probability:.4}  {itc_similarity:.4}  {text}"), timings_ms)?;
            self.printer.warn(warnings);
        }
        Ok(())
    }
}
