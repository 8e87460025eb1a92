//! `blip2 ask IMAGE QUESTION...`

use super::Failure;
use super::args::Ask;
use super::failures::as_it_is;
use super::texts::{Asked, Job, Labels};
use crate::bundle::TaskName;
use crate::prompt::Task;

pub(super) fn run(command: &Ask) -> Result<(), Failure> {
    let Ask { first, rest, images, write, model } = command;
    let (pictures, questions) = images.sort(first, rest)?;
    let mut texts = Job::new(TaskName::Ask, (pictures, &images.many), write, model)?.load()?;
    let check = |question: &str| {
        let task = task(question, write.prompt.as_deref());
        write.read.accept(&texts.engine.context().check(&task, &texts.generation)?.warnings)?;
        Ok(task)
    };
    let sound = texts.failures.sift("question", &questions, check, as_it_is);
    if sound.is_empty() {
        return texts.failures.end();
    }
    let asked = sound.into_iter().map(|sound| Asked { task: sound.read, question: Some((sound.index, sound.text)) });
    let labels = Labels { pictures: texts.are_many(), questions: questions.len() > 1 };
    texts.write(&asked.collect::<Vec<_>>(), labels)
}

/// A question, in the bundle's prompt or in the user's own.
pub(super) fn task(question: &str, prompt: Option<&str>) -> Task {
    match prompt {
        Some(prompt) => Task::AskAs(question.into(), prompt.into()),
        None => Task::Ask(question.into()),
    }
}
