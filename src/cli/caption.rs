//! `blip2 caption IMAGE...`

use super::Failure;
use super::args::Caption;
use super::pictures::Sources;
use super::texts::{Asked, Asking, Job, Labels};
use crate::bundle::TaskName;
use crate::error::Error;
use crate::prompt::Task;

pub(super) fn run(command: &Caption) -> Result<(), Failure> {
    let Caption { images, many, write, model } = command;
    let texts = Job::new(TaskName::Caption, Sources::new(images.clone(), many), write, model)?.load()?;
    let task = write.prompt.clone().map_or(Task::Caption, |prompt| Task::Raw(TaskName::Caption, prompt));
    let prompt = texts.engine.context().check(&task, &texts.generation)?;
    write.read.accept(&prompt.warnings).map_err(Error::from)?;
    let labels = Labels { pictures: texts.are_many(), questions: false };
    texts.write(&Asking::Same([Asked { task, question: None }].into()), labels)
}
