//! Pictures and tasks → texts. Everything above (command line, servers, benchmarks) talks to this.

use std::path::Path;
use std::time::Instant;

use crate::bundle::{Bundle, BundleError};
use crate::decode::{Ends, Event, Finish, Processors, RequestId, StepLoop, Strategy, TokenId};
use crate::error::Error;
use crate::language::{DecoderOnly, Prefix};
use crate::pixels::{Picture, Pixels};
use crate::prompt::{Prompt, Task};
use crate::qformer::{Qformer, Queries};
use crate::runtime::{Runtime, RuntimeError, RuntimeOptions};
use crate::text::Text;
use crate::timing::{Stage, Timings};
use crate::vision::Vision;

/// One loaded bundle. It belongs to one thread.
pub struct Engine {
    bundle: Bundle,
    runtime: Runtime,
    pub(crate) vision: Vision,
    pub(crate) qformer: Qformer,
    pub(crate) decoding: StepLoop<DecoderOnly>,
    text: Text,
}

/// A picture that was looked at once and can be asked about many times.
#[derive(Clone, Debug)]
pub struct Sight {
    queries: Queries,
    timings: Timings,
}

/// One text that is wanted.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The picture.
    pub sight: &'a Sight,
    /// What is asked of it.
    pub task: Task,
    /// How to write it.
    pub generation: Generation,
}

/// How a text is written. Whatever is absent comes from the bundle.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// Tokens to write at most. The model's positions limit it further.
    pub max_new_tokens: Option<usize>,
    /// What changes scores before a token is chosen.
    pub processors: Processors,
    /// How tokens are chosen.
    pub strategy: Strategy,
}

/// A finished text.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The text, trimmed.
    pub text: String,
    /// Its tokens, the end token included.
    pub tokens: Vec<TokenId>,
    /// Why it ended.
    pub finish: Finish,
    /// Sum of log-probabilities / length ^ penalty, where beam search found the text.
    pub score: Option<f32>,
    /// Where several texts were wanted, all of them, this one first.
    pub candidates: Vec<Candidate>,
    /// Every stage on the way, those that the picture took included. Requests that ran together share their time in full.
    pub timings: Timings,
}

/// One of several texts.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Candidate {
    /// The text, trimmed.
    pub text: String,
    /// Its tokens, the end token included.
    pub tokens: Vec<TokenId>,
    /// As [`Answer::score`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
}

impl Engine {
    /// Opens a bundle on the runtime that `options` describe.
    pub fn open(folder: &Path, options: &RuntimeOptions) -> Result<Self, Error> {
        let bundle = Bundle::open(folder)?;
        Self::load(bundle, Runtime::load(options)?)
    }

    /// Loads a bundle's graphs side by side: most of the time goes into preparing weights, one thread a graph.
    pub fn load(bundle: Bundle, runtime: Runtime) -> Result<Self, Error> {
        runtime.require(&bundle.facts().requires.onnxruntime)?;
        let (vision, qformer, language) = std::thread::scope(|threads| {
            let language = threads.spawn(|| DecoderOnly::open(&runtime, &bundle));
            let qformer = threads.spawn(|| Qformer::open(&runtime, &bundle));
            (Vision::open(&runtime, &bundle), finished(qformer), finished(language))
        });
        let (vision, qformer, decoding) = (vision?, qformer?, StepLoop::new(language?));
        let text = Text::open(&bundle)?;
        check_tokenizer(&bundle, &text)?;
        Ok(Self { bundle, runtime, vision, qformer, decoding, text })
    }

    /// The bundle in use.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// The runtime in use.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Looks at pictures, all in one batch.
    pub fn see(&mut self, pictures: &[&Picture]) -> Result<Vec<Sight>, Error> {
        if pictures.is_empty() {
            return Ok(Vec::new());
        }
        let mut timings = Timings::default();
        let pixels = timings.time(Stage::Preprocess, || Pixels::from_pictures(pictures, &self.bundle.facts().image));
        let features = timings.time(Stage::Vision, || self.vision.encode(pixels))?;
        let queries = timings.time(Stage::Qformer, || self.qformer.read(&features))?;
        Ok(queries.into_iter().map(|queries| Sight { queries, timings: timings.clone() }).collect())
    }

    /// The prompt that a task becomes; an error if this bundle or its tokenizer cannot take it.
    pub fn prompt(&self, task: &Task) -> Result<Prompt, Error> {
        self.bundle.require(task.name())?;
        Ok(task.prompt(&self.bundle, &self.text)?)
    }

    /// Writes the texts of all requests together. `on_text` gets each piece of text as soon as it is settled, with the request's index;
    /// of several texts for one request it gets the first.
    pub fn ask(&mut self, requests: &[Request<'_>], mut on_text: impl FnMut(usize, &str)) -> Result<Vec<Answer>, Error> {
        let prefixes = requests.iter().map(|request| self.prefix(request)).collect::<Result<Vec<_>, _>>()?;
        let Self { decoding, text, bundle, .. } = self;
        let token_ids = &bundle.facts().language.token_ids;
        let mut running: Vec<Running<'_>> = Vec::with_capacity(requests.len());
        for (request, (prefix, n_tokens)) in requests.iter().zip(&prefixes) {
            let ends = Ends { max_new_tokens: *n_tokens, end: token_ids.eos.clone() };
            let Generation { strategy, processors, .. } = &request.generation;
            let searches = strategy.searches(&prefix.history(token_ids.image), processors, &ends);
            let texts = searches.into_iter().map(|search| Writing::new(decoding.join(prefix.clone(), search), text)).collect();
            running.push(Running { texts, timings: request.sight.timings.clone() });
        }
        let start = Instant::now();
        decoding.admit()?;
        let prefill = start.elapsed();
        let start = Instant::now();
        while !decoding.is_idle() {
            for event in decoding.step()? {
                for (index, running) in running.iter_mut().enumerate() {
                    let Some(place) = running.texts.iter().position(|writing| writing.id == event.id) else { continue };
                    let mut say = |piece: &str| {
                        if place == 0 {
                            on_text(index, piece)
                        }
                    };
                    running.texts[place].take(&event, text, &token_ids.eos, &mut say);
                    if running.texts.iter().all(|writing| writing.is_finished) {
                        running.timings.add(Stage::Prefill, prefill);
                        running.timings.add(Stage::Decode, start.elapsed());
                    }
                    break;
                }
            }
        }
        let n_return = requests.iter().map(|request| request.generation.strategy.n_return());
        Ok(running.into_iter().zip(n_return).map(|(running, n_return)| running.answer(n_return)).collect())
    }

    /// Looks at one picture and writes one text.
    pub fn answer(&mut self, picture: &Picture, task: Task, generation: Generation) -> Result<Answer, Error> {
        self.prompt(&task)?;
        let sights = self.see(&[picture])?;
        let request = Request { sight: &sights[0], task, generation };
        Ok(self.ask(&[request], |_, _| ())?.remove(0))
    }

    /// The prefix of a request, and how many tokens it may write.
    fn prefix(&self, request: &Request<'_>) -> Result<(Prefix, usize), Error> {
        let Generation { max_new_tokens, processors, strategy } = &request.generation;
        strategy.check(processors)?;
        let prompt = self.prompt(&request.task)?;
        let facts = self.bundle.facts();
        let default = facts.generation.get(&request.task.name()).map_or(1, |generation| generation.max_new_tokens);
        let n_positions = facts.qformer.n_queries + prompt.ids.len();
        // The last token that is written needs no position: nothing is computed from it.
        let room = facts.language.max_positions + 1 - n_positions;
        let max_new_tokens = max_new_tokens.unwrap_or(default).min(room);
        Ok((Prefix { queries: request.sight.queries.clone(), prompt: prompt.ids, max_new_tokens }, max_new_tokens))
    }
}

impl Sight {
    /// `[queries, hidden]`, what the Q-Former made of the picture.
    pub fn queries(&self) -> &Queries {
        &self.queries
    }

    /// Adds time that was spent on the picture before the engine saw it.
    pub fn add_timings(&mut self, timings: &Timings) {
        self.timings.merge(timings);
    }
}

struct Running<'a> {
    texts: Vec<Writing<'a>>,
    timings: Timings,
}

/// A text on its way out of the step loop.
struct Writing<'a> {
    id: RequestId,
    stream: crate::text::TextStream<'a>,
    /// All pieces so far.
    said: String,
    is_finished: bool,
    finish: Finish,
    candidates: Vec<Candidate>,
    tokens: Vec<TokenId>,
}

impl<'a> Writing<'a> {
    fn new(id: RequestId, text: &'a Text) -> Self {
        let (stream, said, candidates, tokens) = (text.stream(), String::new(), Vec::new(), Vec::new());
        Self { id, stream, said, is_finished: false, finish: Finish::Length, candidates, tokens }
    }

    fn take(&mut self, event: &Event, text: &Text, end: &[TokenId], say: &mut impl FnMut(&str)) {
        for token in &event.tokens {
            self.tokens.push(*token);
            if !end.contains(token) {
                let piece = self.stream.push(*token);
                self.say(&piece, say);
            }
        }
        let Some(finish) = event.finish else { return };
        (self.is_finished, self.finish) = (true, finish);
        let candidate = |tokens: &[TokenId], score| {
            let written: Vec<TokenId> = tokens.iter().copied().filter(|token| !end.contains(token)).collect();
            Candidate { text: text.decode(&written), tokens: tokens.to_vec(), score }
        };
        self.candidates = match event.hypotheses.as_slice() {
            [] => vec![candidate(&self.tokens, None)],
            several => several.iter().map(|hypothesis| candidate(&hypothesis.tokens, Some(hypothesis.score))).collect(),
        };
        // What ends in the middle of a character was held back until now.
        let rest = self.candidates[0].text.strip_prefix(&self.said).unwrap_or_default().to_owned();
        self.say(&rest, say);
    }

    fn say(&mut self, piece: &str, say: &mut impl FnMut(&str)) {
        if !piece.is_empty() {
            self.said.push_str(piece);
            say(piece);
        }
    }
}

impl Running<'_> {
    fn answer(self, n_return: usize) -> Answer {
        let finish = self.texts.first().map_or(Finish::Length, |first| first.finish);
        let mut candidates: Vec<Candidate> = self.texts.into_iter().flat_map(|writing| writing.candidates).take(n_return).collect();
        let Candidate { text, tokens, score } = candidates.first().cloned().unwrap_or_default();
        if n_return == 1 {
            candidates.clear();
        }
        Answer { text, tokens, finish, score, candidates, timings: self.timings }
    }
}

fn finished<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn check_tokenizer(bundle: &Bundle, text: &Text) -> Result<(), BundleError> {
    let (found, room) = (text.n_tokens(), bundle.facts().language.vocab_size);
    if found <= room {
        return Ok(());
    }
    Err(BundleError::Inconsistent {
        folder: bundle.folder().to_path_buf(),
        said: format!("a vocabulary of {room}"),
        but: format!("its tokenizer has {found} tokens"),
    })
}

/// What `verify` needs to look at one stage at a time.
impl Engine {
    pub(crate) fn first_logits(&mut self, queries: Queries, prompt: Vec<TokenId>) -> Result<Vec<f32>, RuntimeError> {
        use crate::decode::Model;
        let mut scores = Vec::new();
        let model = self.decoding.model();
        model.prefill(&[Prefix { queries, prompt, max_new_tokens: 1 }], &mut scores)?;
        model.clear();
        Ok(scores)
    }

    pub(crate) fn text(&self) -> &Text {
        &self.text
    }
}
