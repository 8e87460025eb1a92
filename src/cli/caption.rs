//! `blip2 caption IMAGE...`

use std::path::Path;

use super::Failure;
use super::args::Caption;
use super::output::{Line, Printer, each, options, picture};
use crate::bundle::TaskName;
use crate::engine::{Engine, Generation, Request};
use crate::pixels::Limits;
use crate::prompt::Task;

pub(super) fn run(command: &Caption) -> Result<(), Failure> {
    let (generation, limits) = options(&command.write)?;
    let task = command.write.prompt.clone().map_or(Task::Caption, |prompt| Task::Raw(TaskName::Caption, prompt));
    let mut engine = command.model.open()?;
    engine.prompt(&task)?;
    let mut captions = Captions { engine: &mut engine, task, generation, limits, many: command.images.len() > 1 };
    let mut printer = Printer::new(&command.write);
    each(&command.images, |image| captions.one(image, &mut printer))
}

struct Captions<'a> {
    engine: &'a mut Engine,
    task: Task,
    generation: Generation,
    limits: Limits,
    many: bool,
}

impl Captions<'_> {
    fn one(&mut self, image: &Path, printer: &mut Printer<'_>) -> Result<(), Failure> {
        let (picture, timings) = picture(image, &self.limits)?;
        let mut sight = self.engine.see(&[&picture])?.remove(0);
        sight.add_timings(&timings);
        let label = if self.many { format!("{}: ", image.display()) } else { String::new() };
        let request = Request { sight: &sight, task: self.task.clone(), generation: self.generation.clone() };
        let mut printed = if printer.streams { printer.begin(&label) } else { Ok(()) };
        let answer = self.engine.ask(&[request], |_, piece| {
            if printer.streams && printed.is_ok() {
                printed = printer.piece(piece);
            }
        })?;
        printed?;
        Ok(printer.finish(&label, &Line::new(image, None, &answer[0]))?)
    }
}
