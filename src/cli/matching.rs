//! `blip2 match IMAGE TEXT...`

use serde::Serialize;

use super::Failure;
use super::args;
use super::failures::{Failures, as_it_is};
use super::output::{Printer, look};
use crate::bundle::TaskName;
use crate::engine::Match;
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
    let bundle = command.model.bundle()?;
    bundle.require(TaskName::Match).map_err(Error::from)?;
    let mut engine = command.model.load(bundle)?;
    let mut failures = Failures::default();
    let check = |text: &str| {
        let reading = engine.context().reading(text)?;
        command.read.accept(&reading.warnings)?;
        Ok(reading.warnings)
    };
    let texts = failures.sift("text", &command.texts, check, as_it_is);
    if texts.is_empty() {
        return failures.end();
    }
    let (_, sight) = look(&mut engine, &command.image, &command.input)?;
    let pairs: Vec<_> = texts.iter().map(|text| (&sight, text.text)).collect();
    let mut timings = sight.timings().clone();
    let found = timings.time(Stage::Match, || engine.seer().match_texts(&pairs))?;
    let mut printer = Printer::new(&command.show);
    let image = command.image.to_string_lossy();
    for (sound, found) in texts.iter().zip(found) {
        let Match { itm_probability, itm_logit, itc_similarity } = found;
        let (text, warnings) = (sound.text, sound.read.as_slice());
        let row = Row { image: &image, text, itm_probability, itm_logit, itc_similarity, warnings, timings_ms: &timings };
        printer.row(&row, &format!("{itm_probability:.4}  {itc_similarity:.4}  {text}"), &timings)?;
        printer.warn(warnings);
    }
    failures.end()
}
