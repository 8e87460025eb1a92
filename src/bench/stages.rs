//! Every part of a request alone, by the engine's own ways: a query is a round in which each runs once.

mod costs;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::load::{Query, Target, Told, What};
use crate::bundle::{Bundle, Family};
use crate::decode::{Model, Pick, TokenId, argmax};
use crate::engine::{Engine, Generation, Reader};
use crate::error::Error;
use crate::language::{Blank, LanguageModel, Prefix, Seen};
use crate::pixels::{Limits, Picture, Pixels};
use crate::prompt::{Prompt, Task};
use crate::text::TokenBatch;
use crate::timing::{Stage, milliseconds};
use crate::vision::ImageFeatures;

/// Runs of a step before any is measured: on a GPU it is recorded in the third.
const REHEARSALS: usize = 3;

/// What is measured of a decoder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Rows side by side.
    pub rows: Vec<usize>,
    /// Positions of a row before the step.
    pub past: Vec<usize>,
}

/// An engine with what its parts are measured on.
pub struct Stages {
    engine: Engine,
    pictures: Vec<Arc<[u8]>>,
    /// What pictures are compared with, where they are.
    text: Option<TokenBatch>,
    writing: Option<Writing>,
}

/// What a language model is measured on.
struct Writing {
    prompt: Prompt,
    /// Of a text that it wrote.
    tokens: Vec<TokenId>,
    /// Positions that a prefill encodes, and that a step finds encoded.
    prefix_positions: usize,
    steps: Vec<Step>,
}

/// A decode step of some rows behind so many positions.
struct Step {
    rows: usize,
    past: usize,
    blank: Blank,
}

/// Times of a round, in order.
#[derive(Default)]
struct Times(Vec<(String, Duration)>);

impl Steps {
    /// One row, the bundle's beams and sixteen; behind a short text and a long one, as far as the model's positions go.
    pub fn of(bundle: &Bundle, beams: Option<usize>) -> Self {
        let Some(language) = &bundle.facts().language else { return Self::default() };
        let usual = bundle.facts().generation.values().map(|generation| generation.beams).max();
        let beams = beams.or(usual.filter(|beams| *beams > 1)).unwrap_or(5);
        let most = language.max_positions - 1;
        let long = if most >= 2 * SHORT { most.min(LONG) } else { most };
        Self { rows: vec![1, beams, 16], past: vec![SHORT.min(most), long] }.in_order()
    }

    /// Each once, the fewest first.
    #[must_use]
    pub fn in_order(mut self) -> Self {
        for numbers in [&mut self.rows, &mut self.past] {
            numbers.sort_unstable();
            numbers.dedup();
        }
        self
    }

    /// Why a bundle has no such steps, if it has none.
    pub fn objection(&self, bundle: &Bundle) -> Option<String> {
        let Some(language) = &bundle.facts().language else {
            return Some(format!("{} writes nothing, so it has no decode step", bundle.facts().name));
        };
        let (most, facts) = (language.max_positions - 1, bundle.facts());
        // Those of the queries are there from the start.
        let least = if facts.family == Family::Qformer { facts.qformer.n_queries + 1 } else { 1 };
        let odd = self.past.iter().find(|past| !(least..=most).contains(*past))?;
        Some(format!("{odd} positions before a step are none that {} can have: it has {least} to {most}", facts.name))
    }
}

/// Positions of a caption, and of a long answer.
const SHORT: usize = 48;
const LONG: usize = 256;

impl Stages {
    /// Writes one text about the first picture, so that there are tokens, and runs every step until it stays as it is. `text` is what
    /// pictures are compared with, in bundles that do.
    pub fn new(mut engine: Engine, pictures: Vec<Arc<[u8]>>, (task, text): (Task, &str), steps: &Steps) -> Result<Self, Error> {
        let compares = engine.bundle().facts().family == Family::Qformer;
        let text = compares.then(|| engine.context().reading(text)).transpose()?;
        let pad = engine.bundle().facts().qformer.text.as_ref().map_or(0, |facts| facts.pad);
        let text = text.map(|reading| TokenBatch::new(&[reading.ids], pad));
        let writes = engine.bundle().facts().language.is_some();
        let writing = if writes { Some(Writing::new(&mut engine, &pictures[0], task, steps)?) } else { None };
        Ok(Self { engine, pictures, text, writing })
    }

    /// What runs.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    fn round(&mut self, picture: &[u8]) -> Result<(Times, String), Error> {
        let (mut times, bundle) = (Times::default(), self.engine.bundle().facts().image.clone());
        let picture = times.run(Stage::DecodeImage.name(), || Picture::decode(picture, &Limits::default()))?;
        let pixels = times.run(Stage::Preprocess.name(), || Pixels::from_pictures(&[&picture], &bundle))?;
        let vision = &mut self.engine.seer.vision;
        let features = times.run(Stage::Vision.name(), || vision.encode(pixels))?;
        let (seen, mut output) = self.read(&features, &mut times)?;
        if let (Some(writing), Some(seen)) = (&mut self.writing, seen) {
            let first = writing.round(self.engine.language()?, seen, &mut times)?;
            let context = self.engine.context();
            times.run("text", || context.decode(&writing.tokens));
            output.push_str(&context.decode(&[first]));
        }
        Ok((times, output))
    }

    /// What the Q-Former makes of a picture, and of a text beside it where it compares them.
    fn read(&mut self, features: &ImageFeatures, times: &mut Times) -> Result<(Option<Seen>, String), Error> {
        match &mut self.engine.seer.reader {
            Reader::Queries(qformer) => {
                let question = self.writing.as_ref().and_then(|writing| writing.prompt.question_ids.clone());
                let question = question.filter(|_| qformer.reads_questions()).map(|ids| TokenBatch::new(&[ids], 0));
                let queries = times.run(Stage::Qformer.name(), || qformer.read(features, question.as_ref()))?.remove(0);
                Ok((Some(Seen::Queries(queries)), String::new()))
            }
            Reader::Stage1(stage1) => {
                let (_, cached) = times.run(Stage::Qformer.name(), || stage1.see(features))?.remove(0);
                let text = self.text.as_ref().expect("bundles that compare have a text");
                times.run(EMBED_TEXT, || stage1.read(text))?;
                let picture = features.rows().next().expect("one picture was encoded");
                let pair = times.run(Stage::Match.name(), || stage1.compare(&[&picture], text))?.remove(0);
                Ok((cached.map(Seen::Cached), format!("{:.4} ", pair.probability())))
            }
        }
    }
}

const EMBED_TEXT: &str = "embed_text";
const ENCODER: &str = "encoder";

impl Writing {
    fn new(engine: &mut Engine, picture: &[u8], task: Task, steps: &Steps) -> Result<Self, Error> {
        let prompt = engine.context().prompt(&task)?;
        let picture = Picture::decode(picture, &Limits::default())?;
        let tokens = engine.answer(&picture, task, Generation::default())?.tokens;
        let sight = engine.see(&[&picture])?.remove(0);
        let seen = engine.seer().seen(&[(&sight, &prompt)])?.remove(0);
        let prefix = Prefix { seen, prompt: prompt.ids.clone(), max_new_tokens: 1 };
        let (model, mut found) = (engine.language()?, Vec::new());
        let token = tokens.first().copied().unwrap_or_default();
        for (past, rows) in steps.past.iter().flat_map(|past| steps.rows.iter().map(move |rows| (*past, *rows))) {
            let mut step = Step { rows, past, blank: model.blank(&prefix, rows, past)? };
            for _ in 0..REHEARSALS {
                step.run(model, token, &mut Times::default())?;
            }
            found.push(step);
        }
        Ok(Self { prompt, tokens, prefix_positions: model.room(&prefix).read, steps: found })
    }

    /// Gives the most probable token.
    fn round(&mut self, model: &mut LanguageModel, seen: Seen, times: &mut Times) -> Result<TokenId, Error> {
        let prefix = [Prefix { seen, prompt: self.prompt.ids.clone(), max_new_tokens: 1 }];
        model.reserve(model.room(&prefix[0]))?;
        let start = Instant::now();
        let encoded = model.encode(&prefix)?;
        if encoded.is_some() {
            times.note(ENCODER, start.elapsed());
        }
        times.run(Stage::Prefill.name(), || model.open_rows(&prefix, encoded))?;
        let first = argmax(model.scores(0..1)?.row(0)) as TokenId;
        model.keep(&[]);
        self.steps.iter_mut().try_for_each(|step| step.run(model, first, times))?;
        Ok(first)
    }
}

impl Step {
    /// The step, and what it takes to let all rows continue the first where there are several.
    fn run(&mut self, model: &mut LanguageModel, token: TokenId, times: &mut Times) -> Result<(), Error> {
        let picks: Vec<Pick> = (0..self.rows).map(|parent| Pick { parent, token }).collect();
        let (step, reorder) = (self.name(), self.reorder());
        model.alone(&mut self.blank, |model| times.run(&step, || model.step(&picks)))?;
        if let Some(reorder) = reorder {
            let parents = vec![0; self.rows];
            model.alone(&mut self.blank, |model| times.run(&reorder, || model.fork(&parents)))?;
        }
        Ok(())
    }

    fn name(&self) -> String {
        format!("step_{}x{}", self.rows, self.past)
    }

    fn reorder(&self) -> Option<String> {
        (self.rows > 1).then(|| format!("reorder_{}x{}", self.rows, self.past))
    }
}

impl Times {
    fn run<T>(&mut self, stage: &str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = work();
        self.note(stage, start.elapsed());
        done
    }

    fn note(&mut self, stage: &str, time: Duration) {
        self.0.push((stage.to_owned(), time));
    }
}

impl Target for Stages {
    /// Ends when the sum of its stages is over: what is made ready between them is not measured.
    fn send(&mut self, query: &Query, to: Told) {
        for input in &query.inputs {
            let (start, picture) = (Instant::now(), self.pictures[*input].clone());
            match self.round(&picture) {
                Ok((Times(times), output)) => {
                    let whole: Duration = times.iter().map(|(_, time)| time).sum();
                    let stages_ms = times.into_iter().map(|(stage, time)| (stage, milliseconds(time))).collect();
                    to.tell_at(start + whole, What::Done { output: output.into(), stages_ms });
                }
                Err(error) => to.tell(What::Failed(error.to_string())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::runtime::{Provider, ProviderChoice, RuntimeOptions};

    fn engine(folder: &Path) -> Engine {
        let provider = ProviderChoice::Only(Provider::Cpu);
        Engine::open(folder, &RuntimeOptions { provider, ..RuntimeOptions::default() }).expect("a bundle")
    }

    fn root() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR"))
    }

    fn picture() -> Arc<[u8]> {
        std::fs::read(root().join("models/samples/0.png")).expect("a sample").into()
    }

    #[test]
    fn every_bundle_comes_apart_and_the_costs_are_of_its_stages() {
        for entry in std::fs::read_dir(root().join("tests/bundles")).expect("a folder").flatten() {
            if !entry.path().join("bundle.json").exists() {
                continue;
            }
            let steps = Steps { rows: vec![1, 3], past: vec![20] };
            let stages = Stages::new(engine(&entry.path()), vec![picture()], (Task::Caption, "a star"), &steps);
            let mut stages = stages.unwrap_or_else(|error| panic!("{}: {error}", entry.path().display()));
            let (Times(times), _) = stages.round(&picture()).expect("a round");
            let costs = stages.costs().expect("known operators");
            let without = ["decode_image", "preprocess", "text"];
            let named: Vec<&str> = times.iter().map(|(name, _)| name.as_str()).filter(|name| !without.contains(name)).collect();
            assert_eq!(costs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), named, "{}", entry.path().display());
        }
    }

    /// The most probable tokens of a text, each behind those before it; `between` runs before every step.
    fn written(engine: &mut Engine, mut between: impl FnMut(&mut LanguageModel)) -> Vec<Vec<f32>> {
        let picture = Picture::decode(&picture(), &Limits::default()).expect("a picture");
        let sight = engine.see(&[&picture]).expect("a sight").remove(0);
        let prompt = engine.context().prompt(&Task::Caption).expect("a prompt");
        let prefix = Prefix { seen: sight.seen().expect("queries"), prompt: prompt.ids, max_new_tokens: 6 };
        let model = engine.language().expect("nothing is in hand");
        model.reserve(model.room(&prefix)).expect("room");
        model.prefill(&[prefix]).expect("a prefill");
        let mut found = vec![model.scores(0..1).expect("scores").row(0).to_vec()];
        for _ in 0..5 {
            let token = argmax(&found[found.len() - 1]) as TokenId;
            between(model);
            model.step(&[Pick { parent: 0, token }]).expect("a step");
            found.push(model.scores(0..1).expect("scores").row(0).to_vec());
        }
        model.keep(&[]);
        found
    }

    #[test]
    fn steps_that_are_measured_leave_a_text_in_peace_and_rows_as_they_were() {
        for bundle in ["models/demo-opt", "models/demo-t5"] {
            let mut engine = engine(&root().join(bundle));
            let alone = written(&mut engine, |_| ());
            let steps = Steps { rows: vec![4], past: vec![33] };
            let mut writing = Writing::new(&mut engine, &picture(), Task::Caption, &steps).expect("a text");
            let mut blank_scores = Vec::new();
            let beside = written(&mut engine, |model| {
                let step = &mut writing.steps[0];
                step.run(model, 5, &mut Times::default()).expect("a step");
                let picks: Vec<Pick> = (0..4).map(|parent| Pick { parent, token: 5 }).collect();
                let scores = model.alone(&mut step.blank, |model| {
                    model.step(&picks).expect("a step");
                    model.scores(0..4).expect("scores").row(3).to_vec()
                });
                blank_scores.push(scores);
            });
            assert_eq!(alone, beside, "{bundle}");
            assert!(blank_scores.windows(2).all(|pair| pair[0] == pair[1]), "{bundle}: every step is behind the same positions");
        }
    }

    #[test]
    fn steps_that_positions_do_not_allow_are_objected_to() {
        let bundle = Bundle::open(&root().join("tests/bundles/vqa-opt")).expect("a bundle");
        let steps = |past: &[usize]| Steps { rows: vec![1], past: past.to_vec() }.objection(&bundle);
        assert_eq!(steps(&[1, 127]), None);
        assert!(steps(&[48, 128]).expect("too many").starts_with("128 positions before a step"));
        assert_eq!(Steps::of(&bundle, Some(7)), Steps { rows: vec![1, 7, 16], past: vec![48, 127] });
        assert_eq!(Steps::of(&bundle, None).objection(&bundle), None);
    }
}
