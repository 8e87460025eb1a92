//! `blip2 rank IMAGE QUESTION ANSWER...`

use serde::Serialize;

use super::Failure;
use super::args::Rank;
use super::ask::task;
use super::output::{Printer, look};
use crate::bundle::TaskName;
use crate::engine::Ranked;
use crate::error::Error;
use crate::timing::{Stage, Timings};

/// One line of `--json`. README.md documents the keys.
#[derive(Serialize)]
struct Row<'a> {
    image: String,
    question: &'a str,
    text: &'a str,
    log_likelihood: f32,
    log_likelihood_per_token: f32,
    n_tokens: usize,
    timings_ms: &'a Timings,
}

pub(super) fn run(command: &Rank) -> Result<(), Failure> {
    let bundle = command.model.bundle()?;
    bundle.require(TaskName::Ask).map_err(Error::from)?;
    let mut engine = command.model.load(bundle)?;
    let task = task(&command.question, command.prompt.as_deref());
    engine.prompt(&task)?;
    let (_, sight) = look(&mut engine, &command.image, &command.input)?;
    let answers: Vec<&str> = command.answers.iter().map(String::as_str).collect();
    let mut timings = sight.timings().clone();
    let mut ranked = timings.time(Stage::Decode, || engine.rank(&sight, &task, &answers))?;
    let value = |ranked: &Ranked| if command.normalize { ranked.per_token() } else { ranked.log_likelihood };
    ranked.sort_by(|a, b| value(b).total_cmp(&value(a)));
    let mut printer = Printer::new(&command.show);
    for found in &ranked {
        let row = Row {
            image: command.image.display().to_string(),
            question: &command.question,
            text: &found.text,
            log_likelihood: found.log_likelihood,
            log_likelihood_per_token: found.per_token(),
            n_tokens: found.n_tokens,
            timings_ms: &timings,
        };
        printer.row(&row, &format!("{:9.4}  {}", value(found), found.text), &timings)?;
    }
    Ok(())
}
