//! `golden/golden.json` → recorded cases, held against the bundle before anything runs.

use std::collections::{BTreeMap, BTreeSet};

use ndarray::{Array, ArrayD, Dimension, IxDyn};
use serde::Deserialize;

use crate::bundle::{Bundle, BundleError, Dtype, Family, MAX_GOLDEN_BYTES, TaskName, parse, unique};
use crate::decode::TokenId;
use crate::runtime::f32_from;

pub(super) const FILE: &str = "golden/golden.json";

/// The form of `golden.json` that this engine reads.
const FORMAT_VERSION: u64 = 1;
/// A stage that may differ by more than this is not compared.
const MAX_TOLERANCE: f32 = 0.1;
/// The same where a graph is not float32.
const MAX_LOSSY_TOLERANCE: f32 = 0.5;

const STAGES: [&str; 9] =
    ["pixels", "features", "queries", "first_logits", "itm_logits", "itc", "multimodal_states", "image_embeds", "text_embeds"];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Golden {
    format_version: u64,
    pub reference: String,
    #[serde(deserialize_with = "unique")]
    pub tolerance: BTreeMap<String, f32>,
    /// Of stages that are not float32: how small the cosine of rows may be on average.
    #[serde(default, deserialize_with = "unique")]
    pub cosine: BTreeMap<String, f64>,
    /// Of bundles that are not float32: the least share of recorded tokens that are chosen behind the same text. Nothing: all.
    pub agreement: Option<f64>,
    pub cases: Vec<Case>,
}

#[derive(Deserialize)]
pub(super) struct Case {
    pub image: String,
    pub pixels: Recorded,
    pub features: Recorded,
    pub queries: Recorded,
    #[serde(flatten)]
    pub asked: Asked,
}

/// What was asked of the picture, and what came.
#[derive(Deserialize)]
#[serde(tag = "task", rename_all = "snake_case")]
pub(super) enum Asked {
    Caption(Written),
    Ask(Written),
    Match(Matches),
    Embed(Embedded),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Written {
    pub prompt: String,
    pub prompt_ids: Vec<TokenId>,
    /// What a question-conditioned Q-Former read.
    pub question_ids: Option<Vec<TokenId>>,
    pub max_new_tokens: usize,
    pub first_logits: Recorded,
    pub tokens: Vec<TokenId>,
    pub text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Matches {
    pub texts: Vec<Matched>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Matched {
    pub text: String,
    pub input_ids: Vec<TokenId>,
    pub itm_logits: [f32; 2],
    /// The softmax of the logits; it follows from them.
    #[serde(rename = "probability")]
    _probability: f32,
    pub itc: f32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Embedded {
    #[serde(rename = "text")]
    _text: String,
    pub input_ids: Vec<TokenId>,
    pub image_embeds: Recorded,
    pub text_embeds: Recorded,
    pub multimodal_states: Recorded,
}

#[derive(Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(super) struct Recorded {
    pub file: String,
    shape: Vec<usize>,
}

/// Reads and checks what was recorded: the right shapes, tokens that there are, tolerances that tell right from wrong.
pub(super) fn read(bundle: &Bundle) -> Result<Golden, BundleError> {
    let bytes = bundle.read(FILE, MAX_GOLDEN_BYTES)?;
    let golden: Golden = parse(&bytes).map_err(|reason| refused(bundle, FILE, format!("is not valid: {reason}")))?;
    check(bundle, &golden).map_err(|reason| refused(bundle, FILE, reason))?;
    Ok(golden)
}

/// A recorded tensor.
pub(super) fn tensor<D: Dimension>(bundle: &Bundle, recorded: &Recorded) -> Result<Array<f32, D>, BundleError> {
    let size = bundle.facts().files.get(&recorded.file).map_or(0, |facts| facts.bytes);
    let bytes = bundle.read(&recorded.file, size)?;
    let mut values = vec![0.0; bytes.len() / Dtype::Float32.size()];
    f32_from(&bytes, Dtype::Float32, &mut values);
    if values.iter().any(|value| !value.is_finite()) {
        return Err(refused(bundle, &recorded.file, "holds values that are not numbers".into()));
    }
    let shaped = ArrayD::from_shape_vec(IxDyn(&recorded.shape), values).ok().and_then(|array| array.into_dimensionality().ok());
    shaped.ok_or_else(|| refused(bundle, &recorded.file, format!("is no float32 tensor of shape {:?}", recorded.shape)))
}

pub(super) fn refused(bundle: &Bundle, file: &str, reason: String) -> BundleError {
    BundleError::Refused { folder: bundle.folder().to_path_buf(), file: file.into(), reason }
}

fn check(bundle: &Bundle, golden: &Golden) -> Result<(), String> {
    if golden.format_version != FORMAT_VERSION {
        return Err(format!("format version {}, this engine reads version {FORMAT_VERSION}", golden.format_version));
    }
    let recorded: BTreeSet<TaskName> = golden.cases.iter().map(|case| case.asked.task()).collect();
    if let Some(task) = bundle.facts().tasks.iter().find(|task| !recorded.contains(task)) {
        return Err(format!("has no case of task {task}, which the bundle offers"));
    }
    check_tolerance(golden, bundle.is_exact())?;
    check_loss(golden, bundle)?;
    for (index, case) in golden.cases.iter().enumerate() {
        check_case(bundle, case).map_err(|reason| format!("cases[{index}]: {reason}"))?;
    }
    Ok(())
}

fn check_tolerance(golden: &Golden, is_exact: bool) -> Result<(), String> {
    let stages: BTreeSet<&str> = golden.cases.iter().flat_map(|case| case.asked.stages()).copied().collect();
    if let Some(stage) = stages.iter().find(|stage| !golden.tolerance.contains_key(**stage)) {
        return Err(format!("has no tolerance for {stage}"));
    }
    if let Some(stage) = golden.tolerance.keys().chain(golden.cosine.keys()).find(|stage| !STAGES.contains(&stage.as_str())) {
        return Err(format!("has a tolerance for {stage}, which is no stage"));
    }
    let most = |stage: &str| if is_exact || stage == "pixels" { MAX_TOLERANCE } else { MAX_LOSSY_TOLERANCE };
    match golden.tolerance.iter().find(|(stage, value)| !(0.0..=most(stage)).contains(*value)) {
        Some((stage, value)) => Err(format!("tolerance for {stage} is {value}, 0 to {} are possible", most(stage))),
        None => Ok(()),
    }
}

/// What only a bundle of fewer bits may lose.
fn check_loss(golden: &Golden, bundle: &Bundle) -> Result<(), String> {
    if bundle.is_exact() && (golden.agreement.is_some() || !golden.cosine.is_empty()) {
        return Err("allows for fewer bits, but every graph is float32".into());
    }
    let cosines = golden.cosine.iter().map(|(stage, value)| (format!("cosine of {stage}"), value));
    let shares = golden.agreement.iter().map(|value| ("agreement".into(), value));
    match cosines.chain(shares).find(|(_, value)| !(0.0..=1.0).contains(*value)) {
        Some((name, value)) => Err(format!("{name} is {value}, 0 to 1 are possible")),
        None => Ok(()),
    }
}

fn check_case(bundle: &Bundle, case: &Case) -> Result<(), String> {
    let facts = bundle.facts();
    bundle.require(case.asked.task()).map_err(|_| format!("task {}, which the bundle does not offer", case.asked.task()))?;
    if !facts.files.contains_key(&case.image) {
        return Err(format!("picture {}, which bundle.json does not list", case.image));
    }
    let (side, n_queries) = (facts.image.size as usize, facts.qformer.n_queries);
    let queries_width = match (facts.family, &facts.language) {
        (Family::DecoderOnly | Family::EncoderDecoder, Some(language)) => language.hidden,
        _ => facts.qformer.hidden,
    };
    check_tensor(bundle, "pixels", &case.pixels, &[3, side, side])?;
    check_tensor(bundle, "features", &case.features, &[facts.vision.n_positions, facts.vision.hidden])?;
    check_tensor(bundle, "queries", &case.queries, &[n_queries, queries_width])?;
    match &case.asked {
        Asked::Caption(written) | Asked::Ask(written) => check_written(bundle, written),
        Asked::Match(Matches { texts }) if texts.is_empty() => Err("has no texts".into()),
        Asked::Match(Matches { texts }) => texts.iter().try_for_each(|text| {
            check_words(bundle, "input_ids", &text.input_ids)?;
            let numbers = [text.itm_logits[0], text.itm_logits[1], text.itc];
            if numbers.iter().all(|n| n.is_finite()) { Ok(()) } else { Err(format!("scores {numbers:?} are not numbers")) }
        }),
        Asked::Embed(found) => {
            let (joint, hidden) = (facts.qformer.joint.unwrap_or(0), facts.qformer.hidden);
            check_words(bundle, "input_ids", &found.input_ids)?;
            check_tensor(bundle, "image_embeds", &found.image_embeds, &[n_queries, joint])?;
            check_tensor(bundle, "text_embeds", &found.text_embeds, &[found.input_ids.len(), joint])?;
            check_tensor(bundle, "multimodal_states", &found.multimodal_states, &[n_queries, hidden])
        }
    }
}

fn check_written(bundle: &Bundle, written: &Written) -> Result<(), String> {
    let (facts, language) = (bundle.facts(), bundle.language());
    let room = bundle.room_behind(written.prompt_ids.len());
    let n_prompt = language.max_positions.saturating_sub(facts.qformer.n_queries);
    check_ids("prompt_ids", &written.prompt_ids, n_prompt, Some(language.vocab_size))?;
    check_ids("tokens", &written.tokens, written.max_new_tokens, Some(language.vocab_size))?;
    if !(1..=room).contains(&written.max_new_tokens) {
        return Err(format!("max_new_tokens is {}, behind this prompt 1 to {room} are possible", written.max_new_tokens));
    }
    check_tensor(bundle, "first_logits", &written.first_logits, &[language.vocab_size])?;
    let reads = facts.qformer.text.is_some() && facts.family != Family::Qformer;
    match &written.question_ids {
        Some(ids) if reads => check_words(bundle, "question_ids", ids),
        None if reads => Err("has no question_ids, which the Q-Former of this bundle reads".into()),
        Some(_) => Err("has question_ids, which no Q-Former of this bundle reads".into()),
        None => Ok(()),
    }
}

/// Token ids of a text that the Q-Former read.
fn check_words(bundle: &Bundle, name: &str, ids: &[TokenId]) -> Result<(), String> {
    let most = bundle.facts().qformer.text.as_ref().map_or(0, |text| text.max_tokens);
    check_ids(name, ids, most, bundle.n_qformer_words())
}

fn check_ids(name: &str, ids: &[TokenId], most: usize, vocabulary: Option<usize>) -> Result<(), String> {
    if !(1..=most).contains(&ids.len()) {
        return Err(format!("{name} has {} tokens, 1 to {most} are possible", ids.len()));
    }
    match ids.iter().find(|id| vocabulary.is_some_and(|n| **id as usize >= n)) {
        Some(id) => Err(format!("{name} has token {id}, the vocabulary has {}", vocabulary.unwrap_or_default())),
        None => Ok(()),
    }
}

fn check_tensor(bundle: &Bundle, name: &str, recorded: &Recorded, shape: &[usize]) -> Result<(), String> {
    let Recorded { file, shape: found } = recorded;
    if found != shape {
        return Err(format!("{name} is of shape {found:?}, the bundle's are {shape:?}"));
    }
    let bytes = (shape.iter().product::<usize>() * Dtype::Float32.size()) as u64;
    match bundle.facts().files.get(file) {
        Some(facts) if facts.bytes == bytes => Ok(()),
        Some(facts) => Err(format!("{name} of shape {shape:?} takes {bytes} bytes, {file} has {}", facts.bytes)),
        None => Err(format!("{name} lies in {file}, which bundle.json does not list")),
    }
}

impl Asked {
    pub fn task(&self) -> TaskName {
        match self {
            Self::Caption(_) => TaskName::Caption,
            Self::Ask(_) => TaskName::Ask,
            Self::Match(_) => TaskName::Match,
            Self::Embed(_) => TaskName::Embed,
        }
    }

    /// What is compared with a tolerance.
    fn stages(&self) -> &'static [&'static str] {
        match self {
            Self::Caption(_) | Self::Ask(_) => &["pixels", "features", "queries", "first_logits"],
            Self::Match(_) => &["pixels", "features", "queries", "itm_logits", "itc"],
            Self::Embed(_) => &["pixels", "features", "queries", "multimodal_states", "image_embeds", "text_embeds"],
        }
    }
}
