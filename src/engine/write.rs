//! The half that writes: prefixes → texts, many at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::answer::{Answer, Candidate, Generation, TokenLogProb};
use super::context::Context;
use super::writing::{Writing, stop_at};
use crate::decode::{self, Ends, Forced, Model, RequestId, Room, Search, StepLoop, StrategyError, TokenId};
use crate::error::Error;
use crate::language::{LanguageModel, Prefix, Sizes};
use crate::runtime::{Cancel, RuntimeError};
use crate::text::Warning;
use crate::timing::{Stage, Timings};

/// The language model with all requests that it works on. It belongs to one thread.
pub struct Writer {
    context: Arc<Context>,
    decoding: StepLoop<LanguageModel>,
    running: HashMap<RequestId, Running>,
}

/// What a request wants of the language model.
#[derive(Clone, Debug)]
pub struct Order {
    /// What the text starts from, and the room behind it.
    pub prefix: Prefix,
    /// What is done there.
    pub work: Work,
    /// What there is to say about the prompt.
    pub warnings: Vec<Warning>,
    /// The stages on the way here.
    pub timings: Timings,
}

/// What is done behind a prefix.
#[derive(Clone, Debug)]
pub enum Work {
    /// Texts are written.
    Write(Box<Generation>),
    /// Given texts, end tokens included, are read to find how probable they are: the score of each candidate.
    Read(Vec<Vec<TokenId>>),
}

/// What a step did for one request.
#[derive(Debug)]
pub struct Event {
    /// The request.
    pub id: RequestId,
    /// Text that became settled; of several texts that of the first.
    pub text: String,
    /// Tokens that became settled.
    pub tokens: Vec<TokenId>,
    /// How probable they are, where that was asked for.
    pub log_probs: Vec<TokenLogProb>,
    /// In the request's last event: what came of it.
    pub end: Option<Result<Answer, Error>>,
}

struct Running {
    writing: Writing,
    n_return: usize,
    warnings: Vec<Warning>,
    timings: Timings,
    joined: Instant,
    /// When the prompt was read.
    read: Option<Instant>,
    /// When tokens settled last.
    last: Option<Instant>,
    first_token: Option<Duration>,
    gaps: Vec<Duration>,
}

impl Work {
    /// Rows that it runs side by side.
    fn n_rows(&self) -> usize {
        match self {
            Self::Write(generation) => generation.strategy.n_rows(),
            Self::Read(texts) => Forced::new(texts.clone()).n_rows(),
        }
    }
}

impl Writer {
    pub(super) fn new(context: Arc<Context>, model: LanguageModel) -> Self {
        Self { context, decoding: StepLoop::new(model), running: HashMap::new() }
    }

    /// What is known of the bundle.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// One without requests on the same language model, whatever state they left it in.
    pub fn renewed(self) -> Self {
        let mut model = self.decoding.into_model();
        decode::Model::keep(&mut model, &[]);
        Self::new(self.context, model)
    }

    /// Puts a request in line; an error if it is larger than the memory can ever hold. It is taken in by a later [`step`](Self::step), in
    /// the order of coming, once there is room beside those that are live.
    pub fn join(&mut self, order: Order) -> Result<RequestId, Error> {
        let joined = Instant::now();
        let Order { prefix, work, warnings, timings } = order;
        let search = self.search(&prefix, &work)?;
        let n_rows = work.n_rows();
        let eos = &self.context.bundle.language().token_ids.eos;
        let text = self.context.text.clone().expect("a bundle that writes has a tokenizer");
        let (stop, n_return) = match &work {
            Work::Write(generation) => (generation.stop.as_slice(), generation.strategy.n_return()),
            Work::Read(texts) => (&[][..], texts.len()),
        };
        let writing = Writing::new(text, eos, stop);
        let id = self.decoding.join(prefix, search, n_rows);
        let (read, last, first_token, gaps) = (None, None, None, Vec::new());
        let running = Running { writing, n_return, warnings, timings, joined, read, last, first_token, gaps };
        self.running.insert(id, running);
        Ok(id)
    }

    /// Gives up a request; what was written of it is its answer. Nothing if there is no such request, or no more.
    pub fn leave(&mut self, id: RequestId) -> Option<Answer> {
        self.decoding.leave(id);
        let running = self.running.remove(&id)?;
        let so_far = running.writing.so_far();
        Some(running.answer(vec![so_far]))
    }

    /// One run of the language model for all live requests; what it settles is handed out. Without requests it does nothing.
    pub fn step(&mut self) -> Vec<Event> {
        let start = Instant::now();
        let events = self.decoding.step();
        let times = (start, Instant::now());
        events.into_iter().filter_map(|event| self.take(event, times)).collect()
    }

    /// Whether nothing is live or in line.
    pub fn is_idle(&self) -> bool {
        self.decoding.is_idle()
    }

    /// Requests that are in line.
    pub fn n_waiting(&self) -> usize {
        self.decoding.n_waiting()
    }

    /// Requests that are being written.
    pub fn n_live(&self) -> usize {
        self.decoding.n_live()
    }

    /// Lets `cancel` stop every later run, within the node that it is in: the requests of that run fail. One request alone is given up with
    /// [`leave`](Self::leave), between two steps.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.decoding.model().set_cancel(cancel);
    }

    /// Makes room for so many rows at once, before any request comes, and keeps it: requests that fit then join and leave without another
    /// allocation. An error if the memory does not hold it.
    pub fn reserve(&mut self, room: Room) -> Result<(), Error> {
        match self.decoding.model().hold(room)? {
            true => Ok(()),
            false => Err(self.decoding.model().too_large(room).into()),
        }
    }

    /// What texts take, for those who ask before anything is looked at.
    pub fn sizes(&mut self) -> Sizes {
        self.decoding.model().sizes()
    }

    /// Bytes that so many rows of so many positions take.
    pub fn bytes(&mut self, room: Room) -> u64 {
        self.decoding.model().bytes(room)
    }

    pub(crate) fn model(&mut self) -> &mut LanguageModel {
        self.decoding.model()
    }

    fn search(&mut self, prefix: &Prefix, work: &Work) -> Result<Box<dyn Search + Send>, Error> {
        let context = self.context.clone();
        let language = context.bundle.language();
        if let Work::Write(generation) = work {
            generation.check(language)?;
        }
        // Before anything is made for as many rows.
        self.check_room(prefix, work.n_rows())?;
        let generation = match work {
            Work::Read(texts) => return Ok(Box::new(Forced::new(texts.clone()))),
            Work::Write(generation) => generation,
        };
        let (text, eos) = (context.text.as_ref().expect("a bundle that writes has a tokenizer"), &language.token_ids.eos);
        let stop = stop_at(&generation.stop, text, eos);
        let ends = Ends { max_new_tokens: prefix.max_new_tokens, end: eos.clone(), stop };
        let history = self.decoding.model().history(prefix);
        Ok(generation.strategy.search(&history, &generation.processors, &ends, generation.log_probs))
    }

    fn check_room(&mut self, prefix: &Prefix, n_rows: usize) -> Result<(), StrategyError> {
        let model = self.decoding.model();
        model.check(Room { rows: n_rows, ..model.room(prefix) })
    }

    fn take(&mut self, event: decode::Event<RuntimeError>, times: (Instant, Instant)) -> Option<Event> {
        let decode::Event { id, is_first, tokens, log_probs, end } = event;
        let running = self.running.get_mut(&id)?;
        running.note(is_first, !tokens.is_empty(), times);
        let log_probs: Vec<_> = log_probs.iter().map(|log_prob| running.writing.token(log_prob)).collect();
        let mut text = running.writing.push(&tokens, &log_probs);
        let end = match end {
            None if text.is_empty() && tokens.is_empty() => return None,
            None => None,
            Some(end) => {
                let mut running = self.running.remove(&id)?;
                Some(end.map_err(Error::from).map(|ended| {
                    let (texts, rest) = running.writing.end(&ended);
                    text.push_str(&rest);
                    running.answer(texts)
                }))
            }
        };
        Some(Event { id, text, tokens, log_probs, end })
    }
}

impl Running {
    /// Times of a step that read the prompt or settled tokens.
    fn note(&mut self, is_first: bool, has_tokens: bool, (start, end): (Instant, Instant)) {
        if is_first {
            self.timings.add(Stage::Waiting, self.joined, start.saturating_duration_since(self.joined));
            self.timings.add(Stage::Prefill, start, end - start);
            self.read = Some(end);
        }
        if has_tokens {
            match self.last.replace(end) {
                Some(last) => self.gaps.push(end - last),
                None => self.first_token = Some(end - self.joined),
            }
        }
    }

    fn answer(mut self, texts: Vec<(Candidate, Vec<TokenLogProb>)>) -> Answer {
        if let Some(read) = self.read {
            self.timings.add(Stage::Decode, read, read.elapsed());
        }
        let (mut candidates, mut log_probs): (Vec<Candidate>, Vec<_>) = texts.into_iter().take(self.n_return).unzip();
        let Candidate { text, tokens, finish, score, .. } = candidates.first().cloned().unwrap_or_default();
        if self.n_return == 1 {
            candidates.clear();
        }
        let log_probs = if log_probs.is_empty() { Vec::new() } else { log_probs.swap_remove(0) };
        let Self { warnings, timings, first_token, gaps, .. } = self;
        Answer { text, tokens, finish, score, candidates, log_probs, warnings, timings, first_token, gaps }
    }
}
