//! `blip2 match IMAGE TEXT...`

use std::path::Path;
use std::rc::Rc;

use serde::Serialize;

use super::Failure;
use super::args;
use super::failures::{Failures, sift};
use super::output::Printer;
use super::pictures::{Known, Looked, Pictures, Sources};
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
    let args::Match { first, rest, pairs, images, show, read, input, model } = command;
    let bundle = model.bundle()?;
    bundle.require(TaskName::Match).map_err(Error::from)?;
    let (named, typed) = images.sort(first.as_deref(), rest)?;
    let sources = Sources::new(named, &images.many).with_pairs(pairs.as_ref(), "text");
    let batch = model.batch(&bundle, sources.batch)?;
    let mut pictures = Pictures::start(sources, batch, input, (&bundle, None))?;
    let mut engine = model.load(bundle)?;
    let mut failures = Failures::default();
    let shared =
        if pairs.is_some() { None } else { Some(Texts::read(&mut engine, &typed, read, |failure| failures.note(failure))?) };
    if shared.as_ref().is_some_and(|texts| texts.read.is_empty()) {
        return failures.end();
    }
    let (many, progress) = (pictures.are_many(), Progress::new(pictures.count));
    let mut matches = Matches { shared: shared.map(Rc::new), how: read, failures, progress, printer: Printer::new(show), many };
    loop {
        let looked = pictures.look(&mut engine, batch, true);
        if looked.is_empty() {
            return matches.failures.end();
        }
        matches.show(&mut engine, looked)?;
    }
}

/// Texts that a picture is compared with.
#[derive(Default)]
struct Texts {
    checked: Vec<(String, Vec<Warning>)>,
    /// What the engine made of each.
    read: Vec<ReadText>,
}

impl Texts {
    /// Those that can be read; `failed` hears of the others.
    fn read(engine: &mut Engine, texts: &[String], how: &args::Read, mut failed: impl FnMut(Failure)) -> Result<Self, Error> {
        let check = |text: &str| {
            let reading = engine.context().reading(text)?;
            how.accept(&reading.warnings)?;
            Ok(reading.warnings)
        };
        let sound = sift("text", texts, check, |_, failure| failed(failure));
        let checked: Vec<_> = sound.into_iter().map(|sound| (sound.text.to_owned(), sound.read)).collect();
        let read = engine.seer().read_texts(&checked.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>())?;
        Ok(Self { checked, read })
    }
}

/// A picture that was seen, if it was, and what it is compared with.
struct Seen {
    picture: Known,
    failures: Vec<Failure>,
    sight: Option<Sight>,
    texts: Rc<Texts>,
}

struct Matches<'a> {
    /// The texts of every picture, unless each has its own.
    shared: Option<Rc<Texts>>,
    how: &'a args::Read,
    failures: Failures,
    progress: Progress,
    printer: Printer<'a>,
    /// Whether lines name their picture.
    many: bool,
}

impl Matches<'_> {
    /// Compares pictures that were looked at with their texts, and writes a line a pair.
    fn show(&mut self, engine: &mut Engine, looked: Vec<Looked>) -> Result<(), Failure> {
        let seen: Vec<Seen> = looked.into_iter().map(|looked| self.with_texts(engine, looked)).collect();
        let pairs: Vec<_> = seen.iter().filter_map(|seen| Some((seen.sight.as_ref()?, &*seen.texts))).collect();
        let mut time = Timings::default();
        let mut found = time.time(Stage::Match, || compare(engine, &pairs)).into_iter();
        for Seen { picture, failures, sight, texts } in seen {
            self.progress.clear();
            picture.warn();
            failures.into_iter().for_each(|failure| self.failures.note(failure));
            if let Some(mut sight) = sight {
                sight.add_timings(&time);
                match found.next().expect("every picture that was seen was compared") {
                    Ok(found) => self.rows(&picture.path, (&texts, &found), sight.timings())?,
                    Err(error) => self.failures.note(picture.about(error.into())),
                }
            }
            self.progress.advance();
        }
        Ok(())
    }

    fn with_texts(&self, engine: &mut Engine, Looked { picture, sight }: Looked) -> Seen {
        let mut failures = Vec::new();
        let sight = sight.map_err(|failure| failures.push(failure)).ok();
        let texts = match &self.shared {
            _ if sight.is_none() => Rc::default(),
            Some(texts) => texts.clone(),
            None => {
                let own = picture.texts.as_deref().unwrap_or_default();
                let read = Texts::read(engine, own, self.how, |failure| failures.push(picture.about(failure)));
                Rc::new(read.map_err(|error| failures.push(picture.about(error.into()))).unwrap_or_default())
            }
        };
        Seen { picture, failures, sight, texts }
    }

    fn rows(&mut self, path: &Path, (texts, found): (&Texts, &[Match]), timings_ms: &Timings) -> Result<(), Failure> {
        let image = path.to_string_lossy();
        let label = if self.many { format!("{image}: ") } else { String::new() };
        for ((text, warnings), found) in texts.checked.iter().zip(found) {
            let Match { itm_probability, itm_logit, itc_similarity } = *found;
            let row = Row { image: &image, text, itm_probability, itm_logit, itc_similarity, warnings, timings_ms };
            self.printer.row(&row, &format!("{label}{itm_probability:.4}  {itc_similarity:.4}  {text}"), timings_ms)?;
            self.printer.warn(warnings);
        }
        Ok(())
    }
}

/// Every picture with its texts, together if that goes well; if not, picture by picture, so that none fails for another.
fn compare(engine: &mut Engine, pictures: &[(&Sight, &Texts)]) -> Vec<Result<Vec<Match>, Error>> {
    let pairs = pictures.iter().flat_map(|(sight, texts)| texts.read.iter().map(move |text| (*sight, text)));
    match engine.seer().match_read(&pairs.collect::<Vec<_>>()) {
        Ok(found) => {
            let mut found = found.into_iter();
            pictures.iter().map(|(_, texts)| Ok(found.by_ref().take(texts.read.len()).collect())).collect()
        }
        Err(error) if pictures.len() == 1 => vec![Err(error)],
        Err(_) => pictures.iter().flat_map(|picture| compare(engine, &[*picture])).collect(),
    }
}
