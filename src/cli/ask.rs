//! `blip2 ask IMAGE QUESTION...`

use super::Failure;
use super::args::Ask;
use super::failures::{Failures, as_it_is};
use super::output::{Line, Printer, look, writer};
use super::rerank::Reranker;
use crate::bundle::TaskName;
use crate::engine::Request;
use crate::prompt::Task;

pub(super) fn run(command: &Ask) -> Result<(), Failure> {
    let write = &command.write;
    let (mut engine, generation) = writer(&command.model, write, TaskName::Ask)?;
    let mut failures = Failures::default();
    let check = |question: &str| {
        let task = task(question, write.prompt.as_deref());
        write.read.accept(&engine.context().check(&task, &generation)?.warnings)?;
        Ok(task)
    };
    let asked = failures.sift("question", &command.questions, check, as_it_is);
    if asked.is_empty() {
        return failures.end();
    }
    let mut reranker = Reranker::open(write, &command.model)?;
    let (picture, sight) = look(&mut engine, &command.image, &write.input)?;

    let request = |task: &Task| Request { sight: &sight, task: task.clone(), generation: generation.clone() };
    let requests: Vec<Request<'_>> = asked.iter().map(|question| request(&question.read)).collect();
    let mut printer = Printer::new(&write.show);
    // Several answers are written side by side; on a terminal they would run into each other.
    printer.streams &= command.questions.len() == 1 && reranker.is_none();
    let mut printed = Ok(());
    let found = engine.ask(&requests, |_, piece| printer.stream(&mut printed, piece));
    printed?;
    let (asked, mut answers) = failures.keep("question", asked, found);
    if let Some(reranker) = &mut reranker {
        reranker.order(&picture, &mut answers)?;
    }
    for (question, answer) in asked.iter().zip(&answers) {
        let label = if command.questions.len() > 1 { format!("{} ", question.text) } else { String::new() };
        printer.finish(&label, &Line::new(&command.image, Some(question.text), answer))?;
    }
    failures.end()
}

/// A question, in the bundle's prompt or in the user's own.
pub(super) fn task(question: &str, prompt: Option<&str>) -> Task {
    match prompt {
        Some(prompt) => Task::AskAs(question.into(), prompt.into()),
        None => Task::Ask(question.into()),
    }
}
