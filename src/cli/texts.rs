//! Texts about many pictures: as one ends, the next picture joins; lines come in the order in which pictures were named.

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::rc::Rc;

use super::Failure;
use super::args::{Model, Write};
use super::failures::{Failures, Sound, of_text, sift};
use super::output::{self, Printer};
use super::pictures::{Known, Looked, Pictures, Sources};
use super::progress::Progress;
use super::rerank::{self, Reranker};
use crate::bundle::{Bundle, TaskName};
use crate::engine::{Answer, Engine, Event, Generation, Request, RequestId, Sight};
use crate::error::Error;
use crate::prompt::{Task, check_template};

/// Pictures whose lines may wait for an earlier one, in batches.
const WINDOW: usize = 4;

/// What was typed, checked as far as facts go, with pictures on their way while graphs load.
pub(super) struct Job<'a> {
    model: &'a Model,
    write: &'a Write,
    bundle: Bundle,
    reranks_with: Option<Bundle>,
    generation: Generation,
    pictures: Pictures,
    batch: usize,
}

/// What is asked about a picture.
pub(super) struct Asked {
    pub task: Task,
    /// With its place, from 0, where it is a question.
    pub question: Option<(usize, String)>,
}

/// What is asked about all pictures.
pub(super) enum Asking<'a> {
    /// The same about each.
    Same(Rc<[Asked]>),
    /// The questions that stand beside it, as this makes tasks of them.
    Own(&'a dyn Fn(&Engine, &Generation, &str) -> Result<Task, Error>),
}

/// How lines are told apart.
#[derive(Clone, Copy)]
pub(super) struct Labels {
    pub pictures: bool,
    pub questions: bool,
}

/// Everything that is loaded.
pub(super) struct Texts<'a> {
    pub engine: Engine,
    pub generation: Generation,
    pub failures: Failures,
    reranker: Option<Reranker>,
    pictures: Pictures,
    batch: usize,
    printer: Printer<'a>,
    progress: Progress,
}

/// Pictures whose lines are not written yet, in their order.
#[derive(Default)]
struct Line {
    pending: VecDeque<Pending>,
    /// Pictures before the first of them.
    n_gone: usize,
    /// Picture and question of each text that is being written.
    running: HashMap<RequestId, (usize, usize)>,
}

struct Pending {
    picture: Known,
    failures: Vec<Failure>,
    asked: Rc<[Asked]>,
    answers: Vec<Option<Result<Answer, Error>>>,
}

impl<'a> Job<'a> {
    /// Checks what was typed, and begins to read pictures.
    pub fn new(task: TaskName, sources: Sources<'_>, write: &'a Write, model: &'a Model) -> Result<Self, Failure> {
        let bundle = model.bundle()?;
        bundle.require(task).map_err(Error::from)?;
        let generation = write.options()?.generation(&bundle, task)?;
        if let Some(template) = write.prompt.as_deref().filter(|_| task == TaskName::Ask) {
            check_template(&bundle, template).map_err(Error::from)?;
        }
        let (reranks_with, batch) = (rerank::bundle(write)?, model.batch(&bundle, sources.batch)?);
        let pictures = Pictures::start(sources, batch, &write.input, (&bundle, reranks_with.as_ref()))?;
        Ok(Self { model, write, bundle, reranks_with, generation, pictures, batch })
    }

    /// Loads the graphs.
    pub fn load(self) -> Result<Texts<'a>, Failure> {
        let Self { model, write, bundle, reranks_with, mut generation, pictures, batch } = self;
        let engine = model.load(bundle)?;
        for word in &write.search.bad_word {
            generation.processors.bad_words.extend(engine.context().spellings(word)?);
        }
        let reranker = reranks_with.map(|bundle| Reranker::load(bundle, model)).transpose()?;
        let (printer, progress) = (Printer::new(&write.show), Progress::new(pictures.count));
        Ok(Texts { engine, generation, failures: Failures::default(), reranker, pictures, batch, printer, progress })
    }
}

impl Texts<'_> {
    /// Whether there is or may be more than one picture.
    pub fn are_many(&self) -> bool {
        self.pictures.are_many()
    }

    /// Writes everything that is asked about every picture.
    pub fn write(mut self, asking: &Asking<'_>, labels: Labels) -> Result<(), Failure> {
        // Texts that are written side by side would run into each other on a terminal.
        self.printer.streams &= !self.pictures.are_many() && asking.n_of_each() == 1 && self.reranker.is_none();
        let mut line = Line::default();
        while self.take_in(asking, &mut line) {
            for event in self.engine.step() {
                self.printer.piece(&event.text)?;
                line.take(event);
            }
            while let Some(pending) = line.next() {
                self.show(pending, labels)?;
            }
        }
        self.failures.end()
    }

    /// Looks at pictures once half of the batch is free, as many as fill it; false when there is nothing left to do.
    fn take_in(&mut self, asking: &Asking<'_>, line: &mut Line) -> bool {
        let (n_running, is_idle) = (line.running.len(), line.running.is_empty());
        if !is_idle && (2 * n_running > self.batch || line.pending.len() >= WINDOW * self.batch) {
            return true;
        }
        let n_pictures = (self.batch.saturating_sub(n_running) / asking.n_of_each()).max(1);
        let looked = self.pictures.look(&mut self.engine, n_pictures, is_idle);
        if looked.is_empty() {
            return !is_idle;
        }
        self.join(looked, asking, line);
        true
    }

    fn join(&mut self, looked: Vec<Looked>, asking: &Asking<'_>, line: &mut Line) {
        let ask = |looked| asking.about(looked, &self.engine, &self.generation);
        let (sights, pending): (Vec<_>, Vec<_>) = looked.into_iter().map(ask).unzip();
        let seen = sights.iter().zip(&pending).filter_map(|(sight, pending)| Some((sight.as_ref()?, &pending.asked)));
        let asked = seen.flat_map(|(sight, asked)| asked.iter().map(move |asked| (sight, asked.task.clone())));
        let requests: Vec<_> = asked.map(|(sight, task)| Request { sight, task, generation: self.generation.clone() }).collect();
        let mut joined = self.engine.join_all(&requests).into_iter();
        for pending in pending {
            let n_asked = pending.asked.len();
            line.push(pending, joined.by_ref().take(n_asked));
        }
    }

    fn show(&mut self, pending: Pending, labels: Labels) -> Result<(), Failure> {
        let Pending { picture, failures, asked, answers } = pending;
        self.progress.clear();
        picture.warn();
        failures.into_iter().for_each(|failure| self.failures.note(failure));
        let (mut of, mut found) = (Vec::new(), Vec::new());
        for (asked, answer) in asked.iter().zip(answers.into_iter().flatten()) {
            match answer {
                Ok(answer) => {
                    of.push(asked);
                    found.push(answer);
                }
                Err(error) => self.failures.note(labels.failure(&picture.path, asked.failure(error))),
            }
        }
        if let (Some(reranker), Some(pixels)) = (&mut self.reranker, &picture.again)
            && let Err(error) = reranker.order(pixels, &mut found)
        {
            self.failures.note(labels.failure(&picture.path, error.into()));
            found.clear();
        }
        for (asked, answer) in of.into_iter().zip(found) {
            let question = asked.question.as_ref().map(|(_, question)| question.as_str());
            self.printer.finish(&labels.of(&picture.path, question), &output::Line::new(&picture.path, question, &answer))?;
        }
        self.progress.advance();
        Ok(())
    }
}

impl Asking<'_> {
    /// Of each picture, where that is known.
    fn n_of_each(&self) -> usize {
        if let Self::Same(asked) = self { asked.len() } else { 1 }
    }

    /// What is asked about a picture, if it was seen, and what of it cannot be.
    fn about(&self, looked: Looked, engine: &Engine, generation: &Generation) -> (Option<Sight>, Pending) {
        let Looked { picture, sight } = looked;
        let mut failures = Vec::new();
        let sight = sight.map_err(|failure| failures.push(failure)).ok();
        let asked = match self {
            _ if sight.is_none() => Rc::default(),
            Self::Same(asked) => asked.clone(),
            Self::Own(task) => {
                let own = picture.texts.as_deref().unwrap_or_default();
                let check = |text: &str| task(engine, generation, text);
                let sound = sift("question", own, check, |_, failure| failures.push(picture.about(failure)));
                sound.into_iter().map(Asked::question).collect()
            }
        };
        (sight, Pending { picture, failures, asked, answers: Vec::new() })
    }
}

impl Line {
    fn push(&mut self, pending: Pending, joined: impl Iterator<Item = Result<RequestId, Error>>) {
        let place = self.n_gone + self.pending.len();
        let running = &mut self.running;
        let answers = joined.enumerate().map(|(question, joined)| match joined {
            Ok(id) => running.insert(id, (place, question)).and(None),
            Err(error) => Some(Err(error)),
        });
        let answers = answers.collect();
        self.pending.push_back(Pending { answers, ..pending });
    }

    fn take(&mut self, event: Event) {
        let Some(end) = event.end else { return };
        let Some((place, question)) = self.running.remove(&event.id) else { return };
        self.pending[place - self.n_gone].answers[question] = Some(end);
    }

    /// The first, once all that is asked about it is answered.
    fn next(&mut self) -> Option<Pending> {
        let is_whole = self.pending.front()?.answers.iter().all(Option::is_some);
        self.n_gone += usize::from(is_whole);
        if is_whole { self.pending.pop_front() } else { None }
    }
}

impl Asked {
    /// One that can be asked.
    pub fn question(Sound { index, text, read }: Sound<'_, Task>) -> Self {
        Self { task: read, question: Some((index, text.to_owned())) }
    }

    fn failure(&self, error: Error) -> Failure {
        match &self.question {
            Some((index, question)) => of_text("question", *index, question, error),
            None => error.into(),
        }
    }
}

impl Labels {
    /// What stands in front of a text.
    pub fn of(self, path: &Path, question: Option<&str>) -> String {
        let picture = if self.pictures { format!("{}: ", path.display()) } else { String::new() };
        match question.filter(|_| self.questions) {
            Some(question) => format!("{picture}{question} "),
            None => picture,
        }
    }

    fn failure(self, path: &Path, failure: Failure) -> Failure {
        if self.pictures { Failure::About { path: path.to_path_buf(), source: Box::new(failure) } } else { failure }
    }
}
