//! A bundle against the outputs recorded from its reference, stage by stage: the first red stage names the culprit.
//!
//! Every stage gets the reference's own input, so that an error is not carried on; at the end the whole way must give the same tokens.
//! A bundle of fewer bits may differ by little more than its conversion measured, in the largest error, in the direction of rows and in
//! the share of recorded tokens that it chooses behind the recorded text.

mod golden;

use ndarray::{Array, Array1, Array2, Array3, ArrayD, ArrayView, Axis, Dimension, aview1};

use crate::bundle::TaskName;
use crate::decode::{Model, Pick, TokenId, argmax};
use crate::engine::{Engine, Flow, Generation, Reader, Request};
use crate::error::Error;
use crate::language::{LanguageModel, Prefix, Seen};
use crate::pixels::{Limits, Picture, Pixels};
use crate::prompt::Task;
use crate::qformer::Queries;
use crate::runtime::{GraphError, Mover, Row, RuntimeError};
use crate::stage1::PairEmbedding;
use crate::text::TokenBatch;
use crate::vision::ImageFeatures;
use golden::{Asked, Case, Embedded, Golden, Matched, Matches, Recorded, Written};

/// One comparison.
#[derive(Clone, Debug)]
pub struct Check {
    /// Stage and picture.
    pub what: String,
    /// Whether it holds.
    pub holds: bool,
    /// What was found and what is allowed.
    pub found: String,
}

/// Whether the bundle carries recorded outputs.
pub fn has_golden(engine: &Engine) -> bool {
    engine.bundle().facts().files.contains_key(golden::FILE)
}

/// Runs every recorded case; `each` hears of every comparison. Gives the reference's name. An error while requests are in hand.
pub fn run(engine: &mut Engine, mut each: impl FnMut(Check)) -> Result<String, Error> {
    if !engine.is_idle() {
        return Err(Error::Busy);
    }
    let golden = golden::read(engine.bundle())?;
    let (mut seen, mut chosen) = (Vec::new(), Chosen::default());
    for case in &golden.cases {
        let mut checker = Checker { engine, golden: &golden, case, chosen: &mut chosen, each: &mut each };
        if !seen.contains(&&case.image) {
            checker.stages_of_the_picture()?;
            seen.push(&case.image);
        }
        match &case.asked {
            Asked::Caption(written) => checker.stages_of_the_text(Task::Caption, written)?,
            Asked::Ask(written) => checker.stages_of_the_text(checker.question(written), written)?,
            Asked::Match(Matches { texts }) => checker.matches(texts)?,
            Asked::Embed(embedded) => checker.embeddings(embedded)?,
        }
    }
    if let Some(least) = golden.agreement {
        each(chosen.check(least));
    }
    Ok(golden.reference)
}

/// Recorded tokens, and those of them that a bundle of fewer bits chooses too.
#[derive(Default)]
struct Chosen {
    compared: usize,
    same: usize,
}

impl Chosen {
    fn check(&self, least: f64) -> Check {
        let share = if self.compared == 0 { 1.0 } else { self.same as f64 / self.compared as f64 };
        let found = format!("{:.1} % of {} recorded are chosen, at least {:.1} %", 100.0 * share, self.compared, 100.0 * least);
        Check { what: "all tokens".into(), holds: share >= least, found }
    }
}

struct Checker<'a> {
    engine: &'a mut Engine,
    golden: &'a Golden,
    case: &'a Case,
    chosen: &'a mut Chosen,
    each: &'a mut dyn FnMut(Check),
}

impl Checker<'_> {
    fn stages_of_the_picture(&mut self) -> Result<(), Error> {
        let picture = self.picture()?;
        let found = Pixels::from_pictures(&[&picture], &self.engine.bundle().facts().image)?.0;
        let wanted: Array3<f32> = self.recorded(&self.case.pixels)?;
        self.check_within("pixels", largest_difference(found.iter(), wanted.iter()));

        let features: Array2<f32> = self.recorded(&self.case.features)?;
        let found = self.engine.seer.vision.encode(Pixels(wanted.insert_axis(Axis(0))))?;
        let found = self.row(found.rows().next().map(|picture| picture.0))?;
        self.check_relative("features", found.iter(), features.view());

        let queries: Array2<f32> = self.recorded(&self.case.queries)?;
        let features = self.features()?;
        let found = match &mut self.engine.seer.reader {
            Reader::Queries(qformer) if qformer.reads_questions() => return Ok(()),
            Reader::Queries(qformer) => {
                let found = qformer.read(&features, None)?.pop();
                self.row(found.map(|queries| queries.0))?
            }
            Reader::Stage1(stage1) => stage1.see(&features)?.remove(0).0.states.into_dyn(),
        };
        self.check_relative("queries", found.iter(), queries.view());
        Ok(())
    }

    /// What writes starts from the recorded features and queries.
    fn seen(&mut self, written: &Written) -> Result<Option<Seen>, Error> {
        let queries: Array2<f32> = self.recorded(&self.case.queries)?;
        let features = self.features()?;
        match &mut self.engine.seer.reader {
            Reader::Stage1(stage1) => Ok(stage1.see(&features)?.remove(0).1.map(Seen::Cached)),
            Reader::Queries(qformer) => {
                if let Some(ids) = &written.question_ids {
                    let question = TokenBatch::new(std::slice::from_ref(ids), 0);
                    let found = qformer.read(&features, Some(&question))?.pop();
                    let found = self.row(found.map(|queries| queries.0))?;
                    self.check_relative("queries", found.iter(), queries.view());
                }
                Ok(Some(Seen::Queries(Queries::on_host(queries).map_err(|source| failed("qformer", source))?)))
            }
        }
    }

    fn stages_of_the_text(&mut self, task: Task, written: &Written) -> Result<(), Error> {
        let prompt = self.engine.context().prompt(&task)?;
        self.check_equal("prompt", &prompt.ids, &written.prompt_ids);
        if let Some(seen) = self.seen(written)? {
            let logits: Array1<f32> = self.recorded(&written.first_logits)?;
            let prefix = Prefix { seen, prompt: written.prompt_ids.clone(), max_new_tokens: 1 };
            let mut found = Vec::new();
            read_behind(self.engine.language()?, prefix, &written.tokens[..1], |scores| found = scores.to_vec())?;
            self.check_relative("first_logits", found.iter(), logits.view());
        }
        let picture = self.picture()?;
        let sights = self.engine.see(&[&picture])?;
        if self.golden.agreement.is_some() {
            let seen = self.engine.seer().seen(&[(&sights[0], &prompt)])?.remove(0);
            return self.choose(seen, written);
        }
        let generation = Generation { max_new_tokens: Some(written.max_new_tokens), ..Generation::default() };
        let request = Request { sight: &sights[0], task, generation };
        let answer = self.engine.ask(&[request], |_, _| Flow::Continue(())).remove(0)?;
        self.check_equal("tokens", &answer.tokens, &written.tokens);
        self.check_text(&answer.text, written);
        Ok(())
    }

    /// Counts the recorded tokens that are chosen from the picture on, each behind the recorded ones before it.
    fn choose(&mut self, seen: Seen, written: &Written) -> Result<(), Error> {
        let prefix = Prefix { seen, prompt: written.prompt_ids.clone(), max_new_tokens: written.tokens.len() };
        let (mut tokens, mut same) = (written.tokens.iter(), 0);
        read_behind(self.engine.language()?, prefix, &written.tokens, |scores| {
            same += usize::from(tokens.next() == Some(&(argmax(scores) as TokenId)))
        })?;
        self.chosen.compared += written.tokens.len();
        self.chosen.same += same;
        self.check_text(&written.text, written);
        Ok(())
    }

    /// What the recorded tokens read as, too.
    fn check_text(&mut self, found: &str, written: &Written) {
        let decoded = self.engine.context().decode(&written.tokens);
        let holds = decoded == written.text && found == written.text;
        let found = if decoded == written.text { found } else { &decoded };
        self.report("text", holds, format!("`{found}`, recorded `{}`", written.text));
    }

    /// The question that became the recorded prompt in the bundle's template.
    fn question(&self, written: &Written) -> Task {
        let template = self.engine.bundle().facts().prompts.get(&TaskName::Ask).map_or("{}", String::as_str);
        let (before, behind) = template.split_once("{}").unwrap_or_default();
        let question = written.prompt.strip_prefix(before).and_then(|rest| rest.strip_suffix(behind));
        question.map_or_else(|| Task::Raw(TaskName::Ask, written.prompt.clone()), |question| Task::Ask(question.into()))
    }

    fn matches(&mut self, texts: &[Matched]) -> Result<(), Error> {
        let picture = self.picture()?;
        let sight = self.engine.see(&[&picture])?.remove(0);
        let pairs: Vec<_> = texts.iter().map(|text| (&sight, text.text.as_str())).collect();
        let together = self.engine.seer().match_texts(&pairs)?;
        for (wanted, together) in texts.iter().zip(together) {
            let pair = self.pair(&wanted.input_ids)?;
            self.check_relative("itm_logits", pair.itm_logits.iter(), aview1(&wanted.itm_logits));
            let end_to_end = [together.itm_logit, together.itc_similarity];
            self.check_relative("itc", end_to_end.iter(), aview1(&[wanted.itm_logits[1], wanted.itc]));
        }
        Ok(())
    }

    fn embeddings(&mut self, wanted: &Embedded) -> Result<(), Error> {
        let pair = self.pair(&wanted.input_ids)?;
        let states: Array2<f32> = self.recorded(&wanted.multimodal_states)?;
        self.check_relative("multimodal_states", pair.states.iter(), states.view());
        let (features, text) = (self.features()?, TokenBatch::new(std::slice::from_ref(&wanted.input_ids), 0));
        let Reader::Stage1(stage1) = &mut self.engine.seer.reader else { return Ok(()) };
        let (image, text) = (stage1.see(&features)?.remove(0).0, stage1.read(&text)?.remove(0));
        let embeds: Array2<f32> = self.recorded(&wanted.image_embeds)?;
        self.check_relative("image_embeds", image.queries.iter(), embeds.view());
        let embeds: Array2<f32> = self.recorded(&wanted.text_embeds)?;
        self.check_relative("text_embeds", text.pooled.iter(), embeds.row(0));
        Ok(())
    }

    /// The recorded features read together with a text.
    fn pair(&mut self, ids: &[TokenId]) -> Result<PairEmbedding, Error> {
        let features = self.features()?.rows().next().expect("one picture was recorded");
        let text = TokenBatch::new(&[ids.to_vec()], 0);
        match &mut self.engine.seer.reader {
            Reader::Stage1(stage1) => Ok(stage1.compare(&[&features], &text)?.remove(0)),
            Reader::Queries(_) => Err(self.engine.bundle().require(TaskName::Match).err().map_or_else(
                || golden::refused(self.engine.bundle(), golden::FILE, "matches texts, which this family cannot".into()).into(),
                Error::from,
            )),
        }
    }

    fn features(&self) -> Result<ImageFeatures, Error> {
        let features: Array2<f32> = self.recorded(&self.case.features)?;
        Ok(ImageFeatures::on_host(features.insert_axis(Axis(0))).map_err(|source| failed("qformer", source))?)
    }

    /// The values of the only row that a stage gave.
    fn row(&self, row: Option<Row>) -> Result<ArrayD<f32>, Error> {
        Ok(Mover::new(self.engine.runtime()).read(&row.expect("a stage gives a row a picture"))?)
    }

    fn picture(&self) -> Result<Picture, Error> {
        let (bundle, file) = (self.engine.bundle(), &self.case.image);
        let picture = Picture::open(&bundle.path(file), &Limits::default());
        Ok(picture.map_err(|error| golden::refused(bundle, file, error.to_string()))?)
    }

    fn recorded<D: Dimension>(&self, recorded: &Recorded) -> Result<Array<f32, D>, Error> {
        Ok(golden::tensor(self.engine.bundle(), recorded)?)
    }

    fn check_relative<'v, D: Dimension>(
        &mut self,
        stage: &str,
        found: impl Iterator<Item = &'v f32>,
        wanted: ArrayView<'_, f32, D>,
    ) {
        let width = wanted.shape().last().copied().unwrap_or(1);
        let (found, wanted): (Vec<f32>, Vec<f32>) = (found.copied().collect(), wanted.iter().copied().collect());
        let scale = wanted.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let error = largest_difference(found.iter(), wanted.iter()) / scale.max(f32::MIN_POSITIVE);
        let Some(least) = self.golden.cosine.get(stage) else { return self.check_within(stage, error) };
        let (cosine, allowed) = (cosine_of_rows(&found, &wanted, width), self.allowed(stage));
        let said = format!("largest error {error:.1e}, allowed {allowed:.1e}; cosine {cosine:.6}, at least {least:.6}");
        self.report(stage, error <= allowed && cosine >= *least, said);
    }

    fn check_within(&mut self, stage: &str, error: f32) {
        let allowed = self.allowed(stage);
        self.report(stage, error <= allowed, format!("largest error {error:.1e}, allowed {allowed:.1e}"));
    }

    fn allowed(&self, stage: &str) -> f32 {
        self.golden.tolerance.get(stage).copied().unwrap_or(0.0)
    }

    fn check_equal(&mut self, stage: &str, found: &[TokenId], wanted: &[TokenId]) {
        let same = found.iter().zip(wanted).take_while(|(found, wanted)| found == wanted).count();
        let holds = found == wanted;
        let difference = || format!("differs from place {same}: {:?}, recorded {:?}", found.get(same), wanted.get(same));
        self.report(stage, holds, if holds { format!("{} equal", found.len()) } else { difference() });
    }

    fn report(&mut self, stage: &str, holds: bool, found: String) {
        let what = match stage {
            "pixels" | "features" | "queries" => format!("{} {stage}", self.case.image),
            _ => format!("{} {} {stage}", self.case.image, self.case.asked.task()),
        };
        (self.each)(Check { what, holds, found });
    }
}

/// Hands out the logits at every place of a text behind a prefix; no request may be live.
fn read_behind(
    model: &mut LanguageModel,
    prefix: Prefix,
    text: &[TokenId],
    mut each: impl FnMut(&[f32]),
) -> Result<(), RuntimeError> {
    let room = model.room(&prefix);
    if !model.reserve(room)? {
        return Err(model.no_room(room));
    }
    model.prefill(&[prefix])?;
    each(model.scores(0..1)?.row(0));
    for token in &text[..text.len() - 1] {
        model.step(&[Pick { parent: 0, token: *token }])?;
        each(model.scores(0..1)?.row(0));
    }
    model.keep(&[]);
    Ok(())
}

fn failed(graph: &str, source: GraphError) -> RuntimeError {
    RuntimeError::Failed { graph: graph.into(), doing: "copying", source: source.into() }
}

/// NaN counts as infinitely far away, and so does a missing value.
fn largest_difference<'v>(found: impl Iterator<Item = &'v f32>, mut wanted: impl Iterator<Item = &'v f32>) -> f32 {
    let mut largest = 0.0f32;
    for value in found {
        let difference = wanted.next().map_or(f32::INFINITY, |wanted| (value - wanted).abs());
        largest = largest.max(if difference.is_nan() { f32::INFINITY } else { difference });
    }
    if wanted.next().is_some() { f32::INFINITY } else { largest }
}

/// Of rows of this width, on average; not a number where one is missing.
fn cosine_of_rows(found: &[f32], wanted: &[f32], width: usize) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let rows = found.chunks(width).zip(wanted.chunks(width));
    let cosines: Vec<f64> = rows.map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).collect();
    if found.len() == wanted.len() { cosines.iter().sum::<f64>() / cosines.len() as f64 } else { f64::NAN }
}
