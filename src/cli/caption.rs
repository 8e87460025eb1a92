//! `blip2 caption IMAGE...`

use std::path::Path;

use super::Failure;
use super::args::{Caption, Input};
use super::failures::each;
use super::output::{Line, Printer, look, writer};
use super::rerank::Reranker;
use crate::bundle::TaskName;
use crate::engine::{Engine, Generation, Request};
use crate::error::Error;
use crate::prompt::Task;

pub(super) fn run(command: &Caption) -> Result<(), Failure> {
    let write = &command.write;
    let (mut engine, generation) = writer(&command.model, write, TaskName::Caption)?;
    let task = write.prompt.clone().map_or(Task::Caption, |prompt| Task::Raw(TaskName::Caption, prompt));
    write.read.accept(&engine.context().check(&task, &generation)?.warnings).map_err(Error::from)?;
    let (reranker, many) = (Reranker::open(write, &command.model)?, command.images.len() > 1);
    let mut captions = Captions { engine: &mut engine, reranker, task, generation, input: &write.input, many };
    let mut printer = Printer::new(&write.show);
    printer.streams &= captions.reranker.is_none();
    each(&command.images, |image| captions.one(image, &mut printer))
}

struct Captions<'a> {
    engine: &'a mut Engine,
    reranker: Option<Reranker>,
    task: Task,
    generation: Generation,
    input: &'a Input,
    many: bool,
}

impl Captions<'_> {
    fn one(&mut self, image: &Path, printer: &mut Printer<'_>) -> Result<(), Failure> {
        let (picture, sight) = look(self.engine, image, self.input)?;
        let label = if self.many { format!("{}: ", image.display()) } else { String::new() };
        let request = Request { sight: &sight, task: self.task.clone(), generation: self.generation.clone() };
        let mut printed = if printer.streams { printer.begin(&label) } else { Ok(()) };
        let found = self.engine.ask(&[request], |_, piece| printer.stream(&mut printed, piece)).remove(0);
        printed?;
        let mut answer = found?;
        if let Some(reranker) = &mut self.reranker {
            reranker.order(&picture, std::slice::from_mut(&mut answer))?;
        }
        Ok(printer.finish(&label, &Line::new(image, None, &answer))?)
    }
}
