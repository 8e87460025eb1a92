//! `blip2 ask IMAGE QUESTION...`

use super::Failure;
use super::args::{Ask, Write};
use super::failures::as_it_is;
use super::pictures::Sources;
use super::texts::{Asked, Asking, Job, Labels};
use crate::bundle::TaskName;
use crate::engine::{Engine, Generation};
use crate::error::Error;
use crate::prompt::Task;

pub(super) fn run(command: &Ask) -> Result<(), Failure> {
    let Ask { first, rest, pairs, images, write, model } = command;
    let (named, questions) = images.sort(first.as_deref(), rest)?;
    let sources = Sources::new(named, &images.many).with_pairs(pairs.as_ref(), "question");
    let mut texts = Job::new(TaskName::Ask, sources, write, model)?.load()?;
    let check = |engine: &Engine, generation: &Generation, question: &str| checked(engine, generation, (question, write));
    if pairs.is_some() {
        return texts.write(&Asking::Own(&check), Labels { pictures: true, questions: true });
    }
    let check = |question: &str| check(&texts.engine, &texts.generation, question);
    let sound = texts.failures.sift("question", &questions, check, as_it_is);
    if sound.is_empty() {
        return texts.failures.end();
    }
    let asked = sound.into_iter().map(Asked::question);
    let labels = Labels { pictures: texts.are_many(), questions: questions.len() > 1 };
    texts.write(&Asking::Same(asked.collect()), labels)
}

/// The task of a question that can be asked.
fn checked(engine: &Engine, generation: &Generation, (question, write): (&str, &Write)) -> Result<Task, Error> {
    let task = task(question, write.prompt.as_deref());
    write.read.accept(&engine.context().check(&task, generation)?.warnings)?;
    Ok(task)
}

/// A question, in the bundle's prompt or in the user's own.
pub(super) fn task(question: &str, prompt: Option<&str>) -> Task {
    match prompt {
        Some(prompt) => Task::AskAs(question.into(), prompt.into()),
        None => Task::Ask(question.into()),
    }
}
