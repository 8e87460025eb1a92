//! `blip2 ask IMAGE QUESTION...`

use super::Failure;
use super::args::Ask;
use super::output::{Line, Printer, look, warn_of_cut, writer};
use super::rerank::Reranker;
use crate::bundle::TaskName;
use crate::engine::Request;
use crate::prompt::Task;

pub(super) fn run(command: &Ask) -> Result<(), Failure> {
    let write = &command.write;
    let (mut engine, generation) = writer(&command.model, write, TaskName::Ask)?;
    let tasks: Vec<Task> = command.questions.iter().map(|question| task(question, write.prompt.as_deref())).collect();
    for task in &tasks {
        let prompt = engine.prompt(task)?;
        if let Some(facts) = &engine.bundle().facts().qformer.text {
            warn_of_cut(&engine, prompt.read_by_qformer(facts))?;
        }
    }
    let mut reranker = Reranker::open(write, &command.model)?;
    let (picture, sight) = look(&mut engine, &command.image, &write.input)?;

    let requests: Vec<Request<'_>> =
        tasks.into_iter().map(|task| Request { sight: &sight, task, generation: generation.clone() }).collect();
    let mut printer = Printer::new(&write.show);
    // Several answers are written side by side; on a terminal they would run into each other.
    printer.streams &= requests.len() == 1 && reranker.is_none();
    let mut printed = Ok(());
    let mut answers = engine.ask(&requests, |_, piece| {
        if printer.streams && printed.is_ok() {
            printed = printer.piece(piece);
        }
    })?;
    printed?;
    if let Some(reranker) = &mut reranker {
        reranker.order(&picture, &mut answers)?;
    }
    for (question, answer) in command.questions.iter().zip(&answers) {
        let label = if answers.len() > 1 { format!("{question} ") } else { String::new() };
        printer.finish(&label, &Line::new(&command.image, Some(question), answer))?;
    }
    Ok(())
}

/// A question, in the bundle's prompt or in the user's own.
pub(super) fn task(question: &str, prompt: Option<&str>) -> Task {
    match prompt {
        Some(prompt) => Task::AskAs(question.into(), prompt.into()),
        None => Task::Ask(question.into()),
    }
}
