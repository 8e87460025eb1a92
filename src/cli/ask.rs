//! `blip2 ask IMAGE QUESTION...`

use super::Failure;
use super::args::Ask;
use super::output::{Line, Printer, options, picture};
use crate::bundle::TaskName;
use crate::engine::Request;
use crate::prompt::Task;

pub(super) fn run(command: &Ask) -> Result<(), Failure> {
    let (generation, limits) = options(&command.write)?;
    let mut engine = command.model.open()?;
    let tasks: Vec<Task> = command.questions.iter().map(|question| task(question, command.write.prompt.as_deref())).collect();
    for task in &tasks {
        engine.prompt(task)?;
    }
    let (picture, timings) = picture(&command.image, &limits)?;
    let mut sight = engine.see(&[&picture])?.remove(0);
    sight.add_timings(&timings);

    let requests: Vec<Request<'_>> =
        tasks.into_iter().map(|task| Request { sight: &sight, task, generation: generation.clone() }).collect();
    let mut printer = Printer::new(&command.write);
    // Several answers are written side by side; on a terminal they would run into each other.
    printer.streams &= requests.len() == 1;
    let mut printed = Ok(());
    let answers = engine.ask(&requests, |_, piece| {
        if printer.streams && printed.is_ok() {
            printed = printer.piece(piece);
        }
    })?;
    printed?;
    for (question, answer) in command.questions.iter().zip(&answers) {
        let label = if answers.len() > 1 { format!("{question} ") } else { String::new() };
        printer.finish(&label, &Line::new(&command.image, Some(question), answer))?;
    }
    Ok(())
}

fn task(question: &str, prompt: Option<&str>) -> Task {
    match prompt {
        // An empty question is left to the engine, which refuses it.
        Some(prompt) if !question.trim().is_empty() => Task::Raw(TaskName::Ask, prompt.replace("{}", question.trim())),
        _ => Task::Ask(question.into()),
    }
}
