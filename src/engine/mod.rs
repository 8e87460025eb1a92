//! Pictures and tasks → texts, probabilities and vectors. Everything above (command line, servers, benchmarks) talks to this.
//!
//! An engine has two halves with an owner each: the [`Seer`] looks at pictures, the [`Writer`] writes texts. [`Engine`] composes them on
//! one thread; [`Engine::split`] hands them out, so that looking at a picture does not keep texts waiting.

mod answer;
mod compare;
mod context;
mod limits;
mod options;
mod rank;
mod see;
mod vocabulary;
mod write;
mod writing;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use crate::bundle::{Bundle, Load};
use crate::error::Error;
use crate::language::LanguageModel;
use crate::pixels::Picture;
use crate::prompt::{PromptError, Task};
use crate::runtime::{Cancel, Processor, Provider, Runtime, RuntimeOptions};
use crate::vision::Vision;

pub use crate::decode::RequestId;
pub use answer::{Alternative, Answer, Candidate, Generation, Request, TokenLogProb};
pub use compare::{Match, ReadText};
use context::Texts;
pub use context::{Answered, Context, Reading};
pub use options::GenerationOptions;
pub use rank::{AT_ONCE as RANKED_AT_ONCE, Ranked};
pub(crate) use see::Reader;
pub use see::{Seer, Sight};
pub use write::{Event, Order, Work, Writer};

/// One loaded bundle. It belongs to one thread.
pub struct Engine {
    context: Arc<Context>,
    runtime: Runtime,
    pub(crate) seer: Seer,
    writer: Option<Writer>,
    /// Events of requests that went on while others were asked.
    held: Vec<Event>,
}

/// What is asked to go on; [`ControlFlow::Break`] gives up the request.
pub type Flow = ControlFlow<()>;

impl Engine {
    /// Opens a bundle on the runtime that `options` describe.
    pub fn open(folder: &Path, options: &RuntimeOptions) -> Result<Self, Error> {
        let bundle = Bundle::open(folder)?;
        Self::load(bundle, Runtime::load(options)?)
    }

    /// Loads a bundle's graphs and tokenizers side by side: most of the time goes into preparing weights, one thread a graph.
    pub fn load(bundle: Bundle, runtime: Runtime) -> Result<Self, Error> {
        runtime.require(&bundle.facts().requires.onnxruntime)?;
        runtime.require_memory(bundle.folder(), &bundle.memory(Load::LEAST)?)?;
        let writes = bundle.facts().language.is_some();
        let (vision, reader, language, texts) = std::thread::scope(|threads| {
            let language = writes.then(|| threads.spawn(|| LanguageModel::open(&runtime, &bundle)));
            let reader = threads.spawn(|| Reader::open(&runtime, &bundle));
            let texts = threads.spawn(|| Texts::open(&bundle));
            (Vision::open(&runtime, &bundle), finished(reader), language.map(finished), finished(texts))
        });
        let (vision, reader, language) = (vision?, reader?, language.transpose()?);
        let context = Arc::new(Context::new(bundle, texts?));
        let writer = language.map(|language| Writer::new(context.clone(), language));
        Ok(Self { seer: Seer { context: context.clone(), vision, reader }, writer, context, runtime, held: Vec::new() })
    }

    /// The half that looks and the half that writes, if the bundle writes: each may have a thread of its own.
    pub fn split(self) -> (Seer, Option<Writer>) {
        (self.seer, self.writer)
    }

    /// The bundle with its tokenizers.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The bundle in use.
    pub fn bundle(&self) -> &Bundle {
        self.context.bundle()
    }

    /// The runtime in use.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// What users should know of where the bundle runs, a sentence each: what runs elsewhere than they asked for, and what is slow.
    pub fn notices(&self) -> Vec<String> {
        let on_processor = self.runtime.provider() == Provider::Cpu;
        let slow = if on_processor { Processor::detect().notices(self.bundle()) } else { Vec::new() };
        [self.runtime.notices(), slow].concat()
    }

    /// The half that looks.
    pub fn seer(&mut self) -> &mut Seer {
        &mut self.seer
    }

    /// Lets `cancel` stop every later run of either half, within the node that it is in.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.seer.set_cancel(cancel.clone());
        if let Some(writer) = &mut self.writer {
            writer.set_cancel(cancel);
        }
    }

    /// As [`Seer::see`].
    pub fn see(&mut self, pictures: &[&Picture]) -> Result<Vec<Sight>, Error> {
        self.seer.see(pictures)
    }

    /// Looks at one picture and writes one text.
    pub fn answer(&mut self, picture: &Picture, task: Task, generation: Generation) -> Result<Answer, Error> {
        self.context.check(&task, &generation)?;
        let sights = self.see(&[picture])?;
        let request = Request { sight: &sights[0], task, generation };
        self.ask(&[request], |_, _| ControlFlow::Continue(())).remove(0)
    }

    /// Writes the texts of all requests together: each gets its answer, or why there is none. `on_text` gets each piece of text as soon as
    /// it is settled, with the request's index, and may give the request up; of several texts for one request it gets the first.
    pub fn ask(&mut self, requests: &[Request<'_>], on_text: impl FnMut(usize, &str) -> Flow) -> Vec<Result<Answer, Error>> {
        let orders = self.seer.orders(requests);
        self.finish(orders, on_text)
    }

    /// Puts a request in line; the events of later steps tell what comes of it.
    pub fn join(&mut self, request: &Request<'_>) -> Result<RequestId, Error> {
        self.join_all(std::slice::from_ref(request)).remove(0)
    }

    /// Puts requests in line; questions that the Q-Former reads are read together.
    pub fn join_all(&mut self, requests: &[Request<'_>]) -> Vec<Result<RequestId, Error>> {
        let orders = self.seer.orders(requests);
        orders.into_iter().map(|order| self.writer()?.join(order?)).collect()
    }

    /// As [`Writer::step`].
    pub fn step(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.held);
        events.extend(self.writer.iter_mut().flat_map(Writer::step));
        events
    }

    /// As [`Writer::leave`]; an error if there is no such request, or no more.
    pub fn leave(&mut self, id: RequestId) -> Result<Answer, Error> {
        self.writer.as_mut().and_then(|writer| writer.leave(id)).ok_or(Error::NoSuchRequest(id))
    }

    /// Whether nothing is live or in line.
    pub fn is_idle(&self) -> bool {
        self.held.is_empty() && self.writer.as_ref().is_none_or(Writer::is_idle)
    }

    /// The half that writes; an error in a bundle that does not.
    pub fn writer(&mut self) -> Result<&mut Writer, Error> {
        self.writer.as_mut().ok_or(PromptError::NotWriting(crate::bundle::TaskName::Caption).into())
    }

    /// Steps until all orders are done.
    fn finish(
        &mut self,
        orders: Vec<Result<Order, Error>>,
        mut on_text: impl FnMut(usize, &str) -> Flow,
    ) -> Vec<Result<Answer, Error>> {
        let Some(writer) = &mut self.writer else {
            let not_writing = || PromptError::NotWriting(crate::bundle::TaskName::Caption).into();
            return orders.into_iter().map(|order| order.and_then(|_| Err(not_writing()))).collect();
        };
        let mut ids: Vec<Option<RequestId>> = Vec::with_capacity(orders.len());
        let mut found: Vec<Option<Result<Answer, Error>>> = Vec::with_capacity(orders.len());
        for joined in orders.into_iter().map(|order| writer.join(order?)) {
            ids.push(joined.as_ref().ok().copied());
            found.push(joined.err().map(Err));
        }
        while found.iter().any(Option::is_none) {
            for event in writer.step() {
                let Some(index) = ids.iter().position(|id| *id == Some(event.id)) else {
                    self.held.push(event);
                    continue;
                };
                let flow = if event.text.is_empty() { ControlFlow::Continue(()) } else { on_text(index, &event.text) };
                found[index] = match flow {
                    ControlFlow::Continue(()) => event.end,
                    ControlFlow::Break(()) => event.end.or_else(|| writer.leave(event.id).map(Ok)),
                };
            }
        }
        found.into_iter().flatten().collect()
    }

    /// The language model by itself, whose rows are those of no request; an error in a bundle that does not write.
    pub(crate) fn language(&mut self) -> Result<&mut LanguageModel, Error> {
        if !self.is_idle() {
            return Err(Error::Busy);
        }
        Ok(self.writer()?.model())
    }
}

fn finished<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
