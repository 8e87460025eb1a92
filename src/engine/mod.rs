//! Pictures and tasks → texts, probabilities and vectors. Everything above (command line, servers, benchmarks) talks to this.

mod compare;
mod limits;
mod rank;
mod vocabulary;
mod write;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;

use crate::bundle::{Bundle, BundleError, Family, TaskName};
use crate::decode::{StepLoop, TokenId};
use crate::error::Error;
use crate::language::{LanguageModel, Seen};
use crate::pixels::{Picture, Pixels};
use crate::prompt::{Prompt, PromptError, Task, Tokenizers};
use crate::qformer::{Qformer, Queries, QueryCache};
use crate::runtime::{Runtime, RuntimeError, RuntimeOptions};
use crate::stage1::{ImageEmbedding, Stage1};
use crate::text::{Text, Warning};
use crate::timing::{Stage, Timings};
use crate::vision::{ImageFeatures, PictureFeatures, Vision};

pub use compare::{Match, Reading};
pub use rank::{Answered, Ranked};
pub use write::{Alternative, Answer, Candidate, Generation, Request, TokenLogProb};

/// One loaded bundle. It belongs to one thread.
pub struct Engine {
    bundle: Bundle,
    runtime: Runtime,
    pub(crate) vision: Vision,
    pub(crate) reader: Reader,
    decoding: Option<StepLoop<LanguageModel>>,
    /// The tokenizer of what writes.
    text: Option<Arc<Text>>,
    /// The tokenizer of what the Q-Former reads.
    qformer_text: Option<Text>,
    fingerprint: u64,
}

/// What reads image features.
pub(crate) enum Reader {
    /// For a language model.
    Queries(Qformer),
    /// For comparing pictures with texts.
    Stage1(Box<Stage1>),
}

/// A picture that was looked at once and can be asked about many times.
#[derive(Clone, Debug)]
pub struct Sight {
    read: Read,
    /// [`fingerprint`] of the bundle that looked.
    seen_by: u64,
    timings: Timings,
}

/// What was made of the picture before anything was asked.
#[derive(Clone, Debug)]
enum Read {
    /// Everything a language model needs.
    Queries(Queries),
    /// Features, for a Q-Former that reads questions too.
    Features(PictureFeatures),
    /// Everything that stage 1 compares and continues.
    Stage1 { features: PictureFeatures, embedding: Arc<ImageEmbedding>, cached: Option<QueryCache> },
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
        let writes = bundle.facts().language.is_some();
        let (vision, reader, language) = std::thread::scope(|threads| {
            let language = writes.then(|| threads.spawn(|| LanguageModel::open(&runtime, &bundle)));
            let reader = threads.spawn(|| Reader::open(&runtime, &bundle));
            (Vision::open(&runtime, &bundle), finished(reader), language.map(finished))
        });
        let (vision, reader, decoding) = (vision?, reader?, language.transpose()?.map(StepLoop::new));
        let text = writes.then(|| Text::open(&bundle, bundle.tokenizer())).transpose()?.map(Arc::new);
        let qformer_text = bundle.facts().qformer.text.as_ref().map(|facts| Text::open(&bundle, &facts.tokenizer)).transpose()?;
        vocabulary::check(&bundle, text.as_deref(), qformer_text.as_ref())?;
        let fingerprint = fingerprint(&bundle);
        Ok(Self { bundle, runtime, vision, reader, decoding, text, qformer_text, fingerprint })
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
        let pixels = timings.time(Stage::Preprocess, || Pixels::from_pictures(pictures, &self.bundle.facts().image))?;
        let features = timings.time(Stage::Vision, || self.vision.encode(pixels))?;
        let read = timings.time(Stage::Qformer, || self.reader.read(&features))?;
        let seen_by = self.fingerprint;
        Ok(read.into_iter().map(|read| Sight { read, seen_by, timings: timings.clone() }).collect())
    }

    /// The prompt that a task becomes, with what there is to say about it; an error if this bundle or its tokenizers cannot take it.
    pub fn prompt(&self, task: &Task) -> Result<Prompt, Error> {
        self.bundle.require(task.name())?;
        let text = self.text.as_deref().ok_or(PromptError::NotWriting(task.name()))?;
        let qformer = self.qformer_text.as_ref().zip(self.bundle.facts().qformer.text.as_ref());
        Ok(task.prompt(&self.bundle, Tokenizers { text, qformer })?)
    }

    /// Token ids of a word as it may stand in a text: at its beginning and behind a space. The vocabulary must have it.
    pub fn spellings(&self, word: &str) -> Result<Vec<Vec<TokenId>>, Error> {
        let text = self.text.as_deref().ok_or(PromptError::NotWriting(TaskName::Match))?;
        let found = [text.encode_plain(word), text.encode_answer(word)];
        let [alone, spaced] = found.map(|found| found.map_err(PromptError::from));
        let (alone, spaced) = (alone?, spaced?);
        Warning::refuse_unknown(&Warning::about(word, alone.unknown, 0)).map_err(PromptError::from)?;
        let mut found = vec![alone.ids, spaced.ids];
        found.dedup();
        Ok(found)
    }

    /// Refuses what another bundle made of a picture.
    fn know(&self, sight: &Sight) -> Result<(), PromptError> {
        if sight.seen_by == self.fingerprint { Ok(()) } else { Err(PromptError::OtherBundle) }
    }

    /// # Panics
    /// If the bundle does not write; [`Bundle::require`] comes first.
    pub(crate) fn text(&self) -> &Text {
        self.text.as_ref().expect("a bundle that writes has a tokenizer")
    }

    /// # Panics
    /// As [`text`](Self::text).
    pub(crate) fn language(&mut self) -> &mut LanguageModel {
        self.decoding.as_mut().expect("a bundle that writes has a language model").model()
    }
}

impl Reader {
    fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        match bundle.facts().family {
            Family::Qformer => Stage1::open(runtime, bundle).map(Box::new).map(Self::Stage1),
            Family::DecoderOnly | Family::EncoderDecoder => Qformer::open(runtime, bundle).map(Self::Queries),
        }
    }

    fn read(&mut self, features: &ImageFeatures) -> Result<Vec<Read>, RuntimeError> {
        match self {
            Self::Queries(qformer) if qformer.reads_questions() => Ok(features.rows().map(Read::Features).collect()),
            Self::Queries(qformer) => Ok(qformer.read(features, None)?.into_iter().map(Read::Queries).collect()),
            Self::Stage1(stage1) => {
                let read = |(features, (embedding, cached)): (PictureFeatures, (ImageEmbedding, Option<QueryCache>))| {
                    Read::Stage1 { features, embedding: Arc::new(embedding), cached }
                };
                Ok(features.rows().zip(stage1.see(features)?).map(read).collect())
            }
        }
    }
}

impl Sight {
    /// What a text about the picture starts from, where no question changes it.
    pub fn seen(&self) -> Option<Seen> {
        match &self.read {
            Read::Queries(queries) => Some(Seen::Queries(queries.clone())),
            Read::Stage1 { cached, .. } => cached.clone().map(Seen::Cached),
            Read::Features(_) => None,
        }
    }

    /// The picture in the space of pictures and texts, in a bundle that compares them.
    pub fn embedding(&self) -> Option<&ImageEmbedding> {
        match &self.read {
            Read::Stage1 { embedding, .. } => Some(embedding),
            Read::Queries(_) | Read::Features(_) => None,
        }
    }

    /// How long it took to look.
    pub fn timings(&self) -> &Timings {
        &self.timings
    }

    /// Adds time that was spent on the picture before the engine saw it.
    pub fn add_timings(&mut self, timings: &Timings) {
        self.timings.merge(timings);
    }

    fn features(&self) -> Option<&PictureFeatures> {
        match &self.read {
            Read::Features(features) | Read::Stage1 { features, .. } => Some(features),
            Read::Queries(_) => None,
        }
    }
}

fn finished<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Tells bundles apart by the hashes of their files, for as long as the process lives.
fn fingerprint(bundle: &Bundle) -> u64 {
    let mut hasher = DefaultHasher::new();
    for (name, file) in &bundle.facts().files {
        (name, &file.sha256).hash(&mut hasher);
    }
    hasher.finish()
}
