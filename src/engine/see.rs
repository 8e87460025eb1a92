//! The half that looks: pictures → what texts start from, and pictures beside texts.

use std::sync::Arc;

use super::answer::Request;
use super::context::Context;
use super::write::{Order, Work};
use crate::bundle::{Bundle, BundleError, Family};
use crate::error::Error;
use crate::language::{Prefix, Seen};
use crate::pixels::{Picture, Pixels};
use crate::prompt::{Prompt, PromptError};
use crate::qformer::{Qformer, Queries, QueryCache};
use crate::runtime::{Cancel, Row, Runtime, RuntimeError};
use crate::stage1::{ImageEmbedding, Stage1};
use crate::text::TokenBatch;
use crate::timing::{Stage, Timings};
use crate::vision::{ImageFeatures, PictureFeatures, Vision};

/// The image encoder and the Q-Former. They belong to one thread.
pub struct Seer {
    pub(super) context: Arc<Context>,
    pub(crate) vision: Vision,
    pub(crate) reader: Reader,
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
    /// [`Context::fingerprint`] of the bundle that looked.
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

impl Seer {
    /// What is known of the bundle.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Lets `cancel` stop every later run, within the node that it is in: a picture that nobody waits for any more. It stays cancelled, so
    /// each picture that may be given up gets one of its own.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.vision.set_cancel(cancel.clone());
        match &mut self.reader {
            Reader::Queries(qformer) => qformer.set_cancel(cancel),
            Reader::Stage1(stage1) => stage1.set_cancel(cancel),
        }
    }

    /// Looks at pictures, in as few runs as are fast.
    pub fn see(&mut self, pictures: &[&Picture]) -> Result<Vec<Sight>, Error> {
        if pictures.is_empty() {
            return Ok(Vec::new());
        }
        let mut timings = Timings::default();
        let pixels = timings.time(Stage::Preprocess, || Pixels::from_pictures(pictures, &self.context.bundle.facts().image))?;
        let mut sights = self.see_pixels(pixels)?;
        sights.iter_mut().for_each(|sight| sight.add_timings(&timings));
        Ok(sights)
    }

    /// Looks at pictures that another thread made ready, together if that goes well; if not, each gets a run of its own, so that none
    /// fails for another.
    pub fn see_each(&mut self, pictures: &[&Pixels]) -> Vec<Result<Sight, Error>> {
        if pictures.is_empty() {
            return Vec::new();
        }
        let mut timings = Timings::default();
        let stacked = timings.time(Stage::Vision, || Pixels::stack(pictures));
        match self.see_pixels(stacked) {
            Ok(mut sights) => {
                sights.iter_mut().for_each(|sight| sight.add_timings(&timings));
                sights.into_iter().map(Ok).collect()
            }
            Err(error) if pictures.len() == 1 => vec![Err(error)],
            Err(_) => pictures.iter().map(|picture| Ok(self.see_pixels((*picture).clone())?.remove(0))).collect(),
        }
    }

    fn see_pixels(&mut self, pixels: Pixels) -> Result<Vec<Sight>, Error> {
        let mut sights = Vec::new();
        for pixels in pixels.chunks(self.vision.at_once()) {
            sights.extend(self.see_at_once(pixels)?);
        }
        Ok(sights)
    }

    fn see_at_once(&mut self, pixels: Pixels) -> Result<Vec<Sight>, Error> {
        let mut timings = Timings::default();
        let features = timings.time(Stage::Vision, || self.vision.encode(pixels))?;
        let read = timings.time(Stage::Qformer, || self.reader.read(&features))?;
        let seen_by = self.context.fingerprint();
        Ok(read.into_iter().map(|read| Sight { read, seen_by, timings: timings.clone() }).collect())
    }

    /// What texts behind prompts start from: made with each question in mind where the Q-Former reads it, all in one batch.
    pub fn seen(&mut self, asked: &[(&Sight, &Prompt)]) -> Result<Vec<Seen>, Error> {
        asked.iter().try_for_each(|(sight, _)| self.know(sight))?;
        Ok(self.seen_together(asked)?)
    }

    /// As [`seen`](Self::seen), of pictures that this bundle saw; where they fail together, each has a run of its own.
    pub(super) fn seen_each(&mut self, asked: &[(&Sight, &Prompt)]) -> Vec<Result<Seen, RuntimeError>> {
        match self.seen_together(asked) {
            Ok(seen) => seen.into_iter().map(Ok).collect(),
            Err(error) if asked.len() == 1 => vec![Err(error)],
            Err(_) => asked.iter().map(|one| Ok(self.seen_together(&[*one])?.remove(0))).collect(),
        }
    }

    fn seen_together(&mut self, asked: &[(&Sight, &Prompt)]) -> Result<Vec<Seen>, RuntimeError> {
        let text = &self.context.bundle.facts().qformer.text;
        let (Reader::Queries(qformer), Some(facts)) = (&mut self.reader, text) else {
            return Ok(asked.iter().filter_map(|(sight, _)| sight.seen()).collect());
        };
        if asked.is_empty() {
            return Ok(Vec::new());
        }
        let questions: Vec<_> = asked.iter().filter_map(|(_, prompt)| prompt.question_ids.clone()).collect();
        let questions = TokenBatch::new(&questions, facts.pad);
        let features: Vec<_> = asked.iter().filter_map(|(sight, _)| sight.features()).collect();
        Ok(qformer.read_pictures(&features, Some(&questions))?.into_iter().map(Seen::Queries).collect())
    }

    /// What requests about pictures that this bundle saw become for the half that writes; questions that the Q-Former reads are read
    /// together.
    pub fn orders(&mut self, requests: &[Request<'_>]) -> Vec<Result<Order, Error>> {
        let mut timings = Timings::default();
        let prompts: Vec<_> = timings.time(Stage::Prompt, || requests.iter().map(|request| self.prompt(request)).collect());
        let sound = requests.iter().zip(&prompts).filter_map(|(request, prompt)| Some((request.sight, prompt.as_ref().ok()?)));
        let sound: Vec<_> = sound.collect();
        let stage = if self.reads_questions() { Stage::Qformer } else { Stage::Prompt };
        let mut seen = timings.time(stage, || self.seen_each(&sound)).into_iter();
        let orders = requests.iter().zip(prompts).map(|(request, prompt)| {
            let prompt = prompt?;
            Ok(self.order(request, prompt, seen.next().expect("every prompt was read")?, &timings))
        });
        orders.collect()
    }

    fn prompt(&self, request: &Request<'_>) -> Result<Prompt, Error> {
        let prompt = self.context.check(&request.task, &request.generation)?;
        self.know(request.sight)?;
        Ok(prompt)
    }

    fn order(&self, request: &Request<'_>, prompt: Prompt, seen: Seen, read: &Timings) -> Order {
        let mut timings = request.sight.timings().clone();
        timings.merge(read);
        let max_new_tokens = self.context.n_new(&request.task, &request.generation, &prompt);
        let prefix = Prefix { seen, prompt: prompt.ids, max_new_tokens };
        Order { prefix, work: Work::Write(Box::new(request.generation.clone())), warnings: prompt.warnings, timings }
    }

    /// Pictures that are looked at fastest in one run.
    pub fn at_once(&self) -> usize {
        self.vision.at_once()
    }

    /// Whether looking is over only when the question is known.
    pub fn reads_questions(&self) -> bool {
        matches!(&self.reader, Reader::Queries(qformer) if qformer.reads_questions())
    }

    /// Refuses what another bundle made of a picture.
    pub(super) fn know(&self, sight: &Sight) -> Result<(), PromptError> {
        if sight.seen_by == self.context.fingerprint() { Ok(()) } else { Err(PromptError::OtherBundle) }
    }
}

impl Reader {
    pub(super) fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
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

    /// As if it had taken no time, for a request that did not wait for it.
    pub fn without_timings(self) -> Self {
        Self { timings: Timings::default(), ..self }
    }

    /// Bytes that it keeps in memory: where it was looked at beside others, all that came of that run.
    pub fn n_bytes(&self) -> usize {
        let of = |row: &Row| row.tensor().n_bytes();
        match &self.read {
            Read::Queries(queries) => of(&queries.0),
            Read::Features(features) => of(&features.0),
            Read::Stage1 { features, embedding, cached } => {
                let numbers = embedding.states.len() + embedding.queries.len();
                of(&features.0) + numbers * size_of::<f32>() + cached.as_ref().map_or(0, QueryCache::n_bytes)
            }
        }
    }

    pub(super) fn features(&self) -> Option<&PictureFeatures> {
        match &self.read {
            Read::Features(features) | Read::Stage1 { features, .. } => Some(features),
            Read::Queries(_) => None,
        }
    }
}
