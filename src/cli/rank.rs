//! `blip2 rank IMAGE QUESTION ANSWER...`

use serde::Serialize;

use super::Failure;
use super::args::Rank;
use super::ask::task;
use super::failures::{Failures, as_it_is};
use super::output::Printer;
use super::pictures::look;
use crate::bundle::TaskName;
use crate::engine::{Engine, Ranked};
use crate::error::Error;
use crate::prompt::check_template;
use crate::text::Warning;
use crate::timing::{Stage, Timings};

/// One line of `--json`. README.md documents the keys.
#[derive(Serialize)]
struct Row<'a> {
    image: &'a str,
    question: &'a str,
    text: &'a str,
    log_likelihood: f32,
    log_likelihood_per_token: f32,
    n_tokens: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<Warning>,
    timings_ms: &'a Timings,
}

pub(super) fn run(command: &Rank) -> Result<(), Failure> {
    let mut engine = load(command)?;
    let task = task(&command.question, command.prompt.as_deref());
    let prompt = engine.context().prompt(&task)?;
    command.read.accept(&prompt.warnings).map_err(Error::from)?;
    let mut failures = Failures::default();
    let check = |answer: &str| {
        let candidate = engine.context().candidate(&prompt, answer)?;
        command.read.accept(&candidate.warnings)?;
        Ok(candidate.warnings)
    };
    let answers = failures.sift("answer", &command.answers, check, as_it_is);
    if answers.is_empty() {
        return failures.end();
    }
    let sight = look(&mut engine, &command.image, &command.input)?;
    let texts: Vec<&str> = answers.iter().map(|answer| answer.text).collect();
    let mut timings = sight.timings().clone();
    let mut ranked = timings.time(Stage::Decode, || engine.rank(&sight, &task, &texts))?;
    let value = |ranked: &Ranked| if command.normalize { ranked.per_token() } else { ranked.log_likelihood };
    ranked.sort_by(|a, b| value(b).total_cmp(&value(a)));
    let mut printer = Printer::new(&command.show);
    let image = command.image.to_string_lossy();
    for found in &ranked {
        let row = Row {
            image: &image,
            question: &command.question,
            text: &found.text,
            log_likelihood: found.log_likelihood,
            log_likelihood_per_token: found.per_token(),
            n_tokens: found.n_tokens,
            warnings: [prompt.warnings.as_slice(), &answers[found.index].read].concat(),
            timings_ms: &timings,
        };
        printer.row(&row, &format!("{:9.4}  {}", value(found), found.text), &timings)?;
        printer.warn(&row.warnings);
    }
    failures.end()
}

/// What was typed is checked before graphs are loaded.
fn load(command: &Rank) -> Result<Engine, Failure> {
    let bundle = command.model.bundle()?;
    bundle.require(TaskName::Ask).map_err(Error::from)?;
    if let Some(template) = &command.prompt {
        check_template(&bundle, template).map_err(Error::from)?;
    }
    Ok(command.model.load(bundle)?)
}
