//! A bundle against the outputs recorded from its reference, stage by stage: the first red stage names the culprit.
//!
//! Every stage gets the reference's own input, so that an error is not carried on; at the end the whole way must give the same tokens.

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::{Array1, Array2, Array3, ArrayD, Axis, Dimension, IxDyn};
use serde::Deserialize;

use crate::bundle::{BundleError, Dtype, TaskName};
use crate::decode::TokenId;
use crate::engine::{Engine, Generation, Request};
use crate::error::Error;
use crate::pixels::{Limits, Picture, Pixels};
use crate::prompt::Task;
use crate::qformer::Queries;
use crate::runtime::{GraphError, RuntimeError, Tensor, f32_from};
use crate::vision::ImageFeatures;

const FILE: &str = "golden/golden.json";

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

#[derive(Deserialize)]
struct Golden {
    format_version: u64,
    reference: String,
    tolerance: BTreeMap<String, f32>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    task: TaskName,
    image: String,
    prompt: String,
    prompt_ids: Vec<TokenId>,
    max_new_tokens: usize,
    pixels: Recorded,
    features: Recorded,
    queries: Recorded,
    first_logits: Recorded,
    tokens: Vec<TokenId>,
    text: String,
}

#[derive(Clone, Deserialize, PartialEq, Eq)]
struct Recorded {
    file: String,
    shape: Vec<usize>,
}

/// Whether the bundle carries recorded outputs.
pub fn has_golden(engine: &Engine) -> bool {
    engine.bundle().facts().files.contains_key(FILE)
}

/// Runs every recorded case; `each` hears of every comparison. Gives the reference's name.
pub fn run(engine: &mut Engine, mut each: impl FnMut(Check)) -> Result<String, Error> {
    let golden = read(engine)?;
    let mut seen = Vec::new();
    for case in &golden.cases {
        let mut checker = Checker { engine, tolerance: &golden.tolerance, case, each: &mut each };
        if !seen.contains(&&case.image) {
            checker.stages_of_the_picture()?;
            seen.push(&case.image);
        }
        checker.stages_of_the_text()?;
    }
    Ok(golden.reference)
}

struct Checker<'a> {
    engine: &'a mut Engine,
    tolerance: &'a BTreeMap<String, f32>,
    case: &'a Case,
    each: &'a mut dyn FnMut(Check),
}

impl Checker<'_> {
    fn stages_of_the_picture(&mut self) -> Result<(), Error> {
        let picture = self.picture()?;
        let found = Pixels::from_pictures(&[&picture], &self.engine.bundle().facts().image).0;
        let wanted: Array3<f32> = self.recorded(&self.case.pixels)?;
        self.check_within("pixels", largest_difference(found.iter(), wanted.iter()));

        let features: Array2<f32> = self.recorded(&self.case.features)?;
        let found = self.engine.vision.encode(Pixels(wanted.insert_axis(Axis(0))))?;
        let found = found.0.to_f32().map_err(|source| failed("vision", source))?;
        self.check_relative("features", found.iter(), features.iter());

        let queries: Array2<f32> = self.recorded(&self.case.queries)?;
        let features = Tensor::from_f32(features.insert_axis(Axis(0))).map_err(|source| failed("qformer", source))?;
        let found = self.engine.qformer.read(&ImageFeatures(features))?;
        self.check_relative("queries", found[0].0.iter(), queries.iter());
        Ok(())
    }

    fn stages_of_the_text(&mut self) -> Result<(), Error> {
        let case = self.case;
        let task = Task::Raw(case.task, case.prompt.clone());
        let ids = self.engine.prompt(&task)?.ids;
        self.check_equal("prompt ids", &ids, &case.prompt_ids);

        let queries = Queries(Arc::new(self.recorded::<Array2<f32>>(&case.queries)?));
        let logits: Array1<f32> = self.recorded(&case.first_logits)?;
        let found = self.engine.first_logits(queries, case.prompt_ids.clone())?;
        self.check_relative("first_logits", found.iter(), logits.iter());

        let picture = self.picture()?;
        let sights = self.engine.see(&[&picture])?;
        let generation = Generation { max_new_tokens: Some(case.max_new_tokens), ..Generation::default() };
        let answer = self.engine.ask(&[Request { sight: &sights[0], task, generation }], |_, _| ())?.remove(0);
        self.check_equal("tokens", &answer.tokens, &case.tokens);
        let decoded = self.engine.text().decode(&case.tokens);
        self.report(
            "text",
            decoded == case.text && answer.text == case.text,
            format!("`{}`, recorded `{}`", answer.text, case.text),
        );
        Ok(())
    }

    fn picture(&self) -> Result<Picture, Error> {
        Ok(Picture::open(&self.engine.bundle().path(&self.case.image), &Limits::default())?)
    }

    fn recorded<T: FromDyn>(&self, recorded: &Recorded) -> Result<T, Error> {
        let bundle = self.engine.bundle();
        let bytes = std::fs::read(bundle.path(&recorded.file)).map_err(|source| BundleError::File {
            folder: bundle.folder().to_path_buf(),
            file: recorded.file.clone(),
            source,
        })?;
        let mut values = vec![0.0; bytes.len() / Dtype::Float32.size()];
        f32_from(&bytes, Dtype::Float32, &mut values);
        let shaped = ArrayD::from_shape_vec(IxDyn(&recorded.shape), values).ok().and_then(T::from_dyn);
        Ok(shaped.ok_or_else(|| BundleError::Golden {
            folder: bundle.folder().to_path_buf(),
            file: recorded.file.clone(),
            reason: format!("{} bytes are no float32 tensor of shape {:?}", bytes.len(), recorded.shape),
        })?)
    }

    fn check_relative<'v>(
        &mut self,
        stage: &str,
        found: impl Iterator<Item = &'v f32>,
        wanted: impl Iterator<Item = &'v f32> + Clone,
    ) {
        let scale = wanted.clone().fold(0.0f32, |largest, value| largest.max(value.abs()));
        self.check_within(stage, largest_difference(found, wanted) / scale.max(f32::MIN_POSITIVE));
    }

    fn check_within(&mut self, stage: &str, error: f32) {
        let allowed = self.tolerance.get(stage).copied().unwrap_or(0.0);
        self.report(stage, error <= allowed, format!("largest error {error:.1e}, allowed {allowed:.1e}"));
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
            _ => format!("{} {} {stage}", self.case.image, self.case.task),
        };
        (self.each)(Check { what, holds, found });
    }
}

fn read(engine: &Engine) -> Result<Golden, BundleError> {
    let bundle = engine.bundle();
    let golden = |reason: String| BundleError::Golden { folder: bundle.folder().to_path_buf(), file: FILE.into(), reason };
    let text = std::fs::read_to_string(bundle.path(FILE)).map_err(|error| golden(error.to_string()))?;
    let read: Golden = serde_json::from_str(&text).map_err(|error| golden(error.to_string()))?;
    if read.format_version != 1 {
        return Err(golden(format!("format version {}, this engine reads version 1", read.format_version)));
    }
    let files = read
        .cases
        .iter()
        .flat_map(|case| [&case.image, &case.pixels.file, &case.features.file, &case.queries.file, &case.first_logits.file]);
    for file in files {
        if !bundle.facts().files.contains_key(file) {
            return Err(golden(format!("names {file}, which bundle.json does not list")));
        }
    }
    Ok(read)
}

fn failed(graph: &str, source: GraphError) -> RuntimeError {
    RuntimeError::Failed { graph: graph.into(), doing: "copying", source }
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

trait FromDyn: Sized {
    fn from_dyn(array: ArrayD<f32>) -> Option<Self>;
}

impl<D: Dimension> FromDyn for ndarray::Array<f32, D> {
    fn from_dyn(array: ArrayD<f32>) -> Option<Self> {
        array.into_dimensionality().ok()
    }
}
