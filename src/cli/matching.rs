//! `blip2 match IMAGE TEXT...`

use serde::Serialize;

use super::Failure;
use super::args;
use super::output::{Printer, look, warn_of_cut};
use crate::bundle::TaskName;
use crate::engine::Match;
use crate::error::Error;
use crate::timing::{Stage, Timings};

/// One line of `--json`. README.md documents the keys.
#[derive(Serialize)]
struct Row<'a> {
    image: String,
    text: &'a str,
    itm_probability: f32,
    itm_logit: f32,
    itc_similarity: f32,
    timings_ms: &'a Timings,
}

pub(super) fn run(command: &args::Match) -> Result<(), Failure> {
    let bundle = command.model.bundle()?;
    bundle.require(TaskName::Match).map_err(Error::from)?;
    let mut engine = command.model.load(bundle)?;
    for text in &command.texts {
        warn_of_cut(&engine, text)?;
    }
    let (_, sight) = look(&mut engine, &command.image, &command.input)?;
    let pairs: Vec<_> = command.texts.iter().map(|text| (&sight, text.as_str())).collect();
    let mut timings = sight.timings().clone();
    let found = timings.time(Stage::Match, || engine.match_texts(&pairs))?;
    let mut printer = Printer::new(&command.show);
    for (text, found) in command.texts.iter().zip(found) {
        let Match { itm_probability, itm_logit, itc_similarity } = found;
        let image = command.image.display().to_string();
        let row = Row { image, text, itm_probability, itm_logit, itc_similarity, timings_ms: &timings };
        printer.row(&row, &format!("{itm_probability:.4}  {itc_similarity:.4}  {text}"), &timings)?;
    }
    Ok(())
}
