//! Tensors → jobs → tensors.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::metadata;
use super::tensor::{Data, Elements, Head, Output};
use crate::bundle::{Bundle, TaskName};
use crate::engine::Generation;
use crate::server::App;
use crate::server::body::Room;
use crate::server::call::{self, Call};
use crate::server::error::ApiError;
use crate::server::keys::Caller;
use crate::server::picture::{self, Given, PictureIn};
use crate::server::routes::options::Options;
use crate::service::{Outcome, Want};
use crate::timing::Timings;

/// What is wanted, whatever it came as.
pub struct Inference {
    /// The model.
    pub model: String,
    /// How texts are written.
    pub parameters: Map<String, Value>,
    /// What it is about.
    pub inputs: Inputs,
    /// The outputs that are wanted; all if there are none.
    pub outputs: Vec<String>,
}

/// The input tensors of a request.
#[derive(Default)]
pub struct Inputs {
    image: Option<Elements>,
    text: Option<Vec<String>>,
    task: Option<TaskName>,
}

/// What came of it.
pub struct Inferred {
    /// The outputs, in the order in which they were wanted.
    pub outputs: Vec<Output>,
    /// Where the time went, if it was one picture and text.
    pub spent: Option<Timings>,
}

impl Inputs {
    /// Adds a tensor.
    pub fn add(&mut self, head: &Head, elements: Elements) -> Result<(), ApiError> {
        let is_new = match head.name.as_str() {
            "image" => self.image.replace(elements).is_none(),
            "text" => self.text.replace(texts(head, elements)?).is_none(),
            _ => self.task.replace(task(head, elements)?).is_none(),
        };
        if is_new { Ok(()) } else { Err(head.wrong("this input comes twice")) }
    }

    /// The task that is named; without one, what the tensors and the model allow.
    fn task(&self, bundle: &Bundle) -> Result<TaskName, ApiError> {
        let does = |task: &TaskName| bundle.facts().tasks.contains(task);
        let task = self.task.or_else(|| match &self.text {
            Some(_) => [TaskName::Ask, TaskName::Match].into_iter().find(does),
            None => [TaskName::Caption, TaskName::Embed].into_iter().find(does),
        });
        let needs = task.map(|task| matches!(task, TaskName::Ask | TaskName::Match));
        match (task, needs, &self.text) {
            (Some(_), Some(true), None) => Err(ApiError::invalid("this task needs the input `text`").about("text")),
            (Some(_), Some(false), Some(_)) => Err(ApiError::invalid("this task takes no input `text`").about("text")),
            (Some(task), ..) => Ok(task),
            (None, _, None) => Err(ApiError::invalid("this model needs the input `text`").about("text")),
            (None, ..) => Err(ApiError::invalid("this model takes no input `text`").about("text")),
        }
    }
}

fn texts(head: &Head, elements: Elements) -> Result<Vec<String>, ApiError> {
    elements.texts().ok_or_else(|| head.wrong("the data is not in UTF-8"))
}

fn task(head: &Head, elements: Elements) -> Result<TaskName, ApiError> {
    let named = texts(head, elements)?.pop().map(Value::String).unwrap_or_default();
    serde_json::from_value(named).map_err(|_| head.wrong("there is no such task; caption, ask, match and embed are known"))
}

/// Does what is wanted. Where one picture fails, all do.
pub async fn infer(app: &Arc<App>, caller: Caller, wanted: Inference, room: Room) -> Result<Inferred, ApiError> {
    let Inference { model, parameters, mut inputs, outputs } = wanted;
    let task = inputs.task(&app.fleet.named(&model)?.bundle)?;
    let names = chosen(task, &outputs)?;
    let texts = inputs.text.take();
    if let Some(texts) = &texts {
        call::check_list(app, texts, "text")?;
    }
    let call = Call::new(app, caller, (Some(&model), task, &[]), room)?;
    let n_texts = texts.as_ref().map_or(1, Vec::len);
    let wants = wants(&call, task, texts, parameters)?;
    let pictures = pictures(app, inputs.image).await?;
    let n_pictures = pictures.len();
    let pictures = if wants.len() > 1 { looked(&call, pictures).await? } else { pictures };
    let asked = pictures.into_iter().flat_map(|given| {
        let call = &call;
        wants.clone().into_iter().map(move |want| call.asked(Ok(given.clone()), want))
    });
    let mut found = Vec::with_capacity(n_pictures * wants.len());
    for (place, end) in call.finish(asked.collect()).await?.into_iter().enumerate() {
        found.push(end.map_err(|error| error.about(which(place, wants.len())))?);
    }
    let spent = if let [one] = found.as_slice() { Some(one.timings().clone()) } else { None };
    let mut outputs = tensors(task, found, [n_pictures, n_texts])?;
    outputs.retain(|output| names.contains(&output.name));
    outputs.sort_by_key(|output| names.iter().position(|name| *name == output.name));
    Ok(Inferred { outputs, spent })
}

/// Pictures that are looked at once, for several texts each.
async fn looked(call: &Call, pictures: Vec<Given>) -> Result<Vec<Given>, ApiError> {
    let seen = call.looked(pictures.into_iter().map(Ok).collect()).await?;
    seen.into_iter().enumerate().map(|(place, seen)| seen.map_err(|error| error.about(which(place, 1)))).collect()
}

/// The job at this place: its picture, and its text where each picture has several.
fn which(place: usize, n_wants: usize) -> String {
    match n_wants {
        1 => format!("image[{place}]"),
        n => format!("image[{}], text[{}]", place / n, place % n),
    }
}

/// The outputs that are wanted, each once.
fn chosen(task: TaskName, wanted: &[String]) -> Result<Vec<&'static str>, ApiError> {
    let all = metadata::names(task);
    if wanted.is_empty() {
        return Ok(all.to_vec());
    }
    let mut found = Vec::with_capacity(all.len());
    for name in wanted {
        let known = all.iter().find(|known| *known == name);
        let known =
            known.ok_or_else(|| ApiError::unsupported(name, format!("{task} has no such output; it has {}", all.join(", "))))?;
        if found.contains(known) {
            return Err(ApiError::invalid("this output is wanted twice").about(name));
        }
        found.push(*known);
    }
    Ok(found)
}

/// What is wanted of each picture.
fn wants(call: &Call, task: TaskName, texts: Option<Vec<String>>, parameters: Map<String, Value>) -> Result<Vec<Want>, ApiError> {
    if let Some((name, _)) = parameters.iter().next().filter(|_| matches!(task, TaskName::Match | TaskName::Embed)) {
        return Err(ApiError::unsupported(name, format!("{task} has no parameters")));
    }
    let texts = texts.unwrap_or_default();
    match task {
        TaskName::Match => Ok(vec![Want::Match(texts)]),
        TaskName::Embed => Ok(vec![Want::Embed]),
        TaskName::Caption => {
            let (generation, prompt) = written(call, task, parameters)?;
            Ok(vec![Want::Write(call::caption(prompt)?, generation)])
        }
        TaskName::Ask => {
            let (generation, prompt) = written(call, task, parameters)?;
            let ask = |text| Ok(Want::Write(call::ask(text, prompt.clone())?, generation.clone()));
            texts.into_iter().map(ask).collect()
        }
    }
}

/// How texts are written, and the text around what is asked.
fn written(call: &Call, task: TaskName, parameters: Map<String, Value>) -> Result<(Box<Generation>, Option<String>), ApiError> {
    let meant = parameters.into_iter().map(|(name, value)| {
        let value = meant(&name, value);
        (name, value)
    });
    let options: Options = serde_json::from_value(Value::Object(meant.collect()))
        .map_err(|error| ApiError::invalid(format!("the parameters cannot be read: {error}")).about("parameters"))?;
    let generation = options.generation()?;
    for (name, is_set) in
        [("num_return", generation.n_return.is_some_and(|n| n != 1)), ("log_probs", generation.log_probs.is_some())]
    {
        if is_set {
            return Err(ApiError::unsupported(name, "no output has a place for this; /caption and /ask tell it"));
        }
    }
    Ok((Box::new(call.generation(task, &generation)?), options.prompt))
}

/// The protocol's parameters are texts, numbers and truth values; some clients have no fractions, and none has lists. What is no text may
/// come as one, then.
fn meant(name: &str, value: Value) -> Value {
    match (name, value) {
        ("prompt" | "early_stopping", value) => value,
        ("stop" | "bad_words", Value::String(text)) if !text.starts_with('[') => Value::Array(vec![text.into()]),
        (_, Value::String(text)) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        (_, value) => value,
    }
}

/// The pictures; the first that cannot be had is an error.
async fn pictures(app: &Arc<App>, image: Option<Elements>) -> Result<Vec<Given>, ApiError> {
    let image = image.ok_or_else(|| ApiError::invalid("the input `image` is missing").about("image"))?;
    let texts = match image {
        Elements::Bytes(all) => return Ok(all.into_iter().map(|bytes| Given::Bytes(Arc::from(&*bytes))).collect()),
        Elements::Texts(texts) => texts,
    };
    let mut found = Vec::with_capacity(texts.len());
    for (place, text) in texts.into_iter().enumerate() {
        // Base64 has no colon, and addresses do.
        let picture = match text.contains(':') {
            true => PictureIn { url: Some(text), ..PictureIn::default() },
            false => PictureIn { data: Some(text), ..PictureIn::default() },
        };
        found.push(picture::one(app, picture).await.map_err(|error| error.about(which(place, 1)))?);
    }
    Ok(found)
}

/// Everything that a task gives.
fn tensors(task: TaskName, found: Vec<Outcome>, [n_pictures, n_texts]: [usize; 2]) -> Result<Vec<Output>, ApiError> {
    let (mut texts, mut vectors, mut probabilities, mut similarities) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for outcome in found {
        match outcome {
            Outcome::Written(answer) => texts.push(answer.text),
            Outcome::Embedded(vector, _) => vectors.extend(vector),
            Outcome::Matched(matches, _) => {
                probabilities.extend(matches.iter().map(|found| found.itm_probability));
                similarities.extend(matches.iter().map(|found| found.itc_similarity));
            }
            Outcome::Ranked(..) | Outcome::Texts(..) | Outcome::Seen(_) => return Err(ApiError::internal()),
        }
    }
    let numbers = |name, shape: [usize; 2], data| Output { name, shape: shape.into(), data: Data::Numbers(data) };
    let pairs = [n_pictures, n_texts];
    Ok(match task {
        TaskName::Caption | TaskName::Ask => vec![Output { name: "text", shape: vec![texts.len()], data: Data::Texts(texts) }],
        TaskName::Embed => vec![numbers("embedding", [n_pictures, vectors.len() / n_pictures.max(1)], vectors)],
        TaskName::Match => vec![numbers("itm_probability", pairs, probabilities), numbers("itc_similarity", pairs, similarities)],
    })
}
