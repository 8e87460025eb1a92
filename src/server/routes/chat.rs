//! `POST /v1/chat/completions`: OpenAI's form of a question about a picture.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::{Request, State};
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::messages::{Conversation, Message};
use super::options::{MOST_ALTERNATIVES, check_plain, check_words, is_plain};
use super::stream::{self, Say};
use super::turn::{Opening, Turn, written};
use crate::engine::{Alternative, Answer, GenerationOptions, TokenLogProb};
use crate::server::App;
use crate::server::body;
use crate::server::error::{ApiError, ErrorBody};
use crate::server::guard::Spent;
use crate::server::keys::Caller;
use crate::service::Outcome;

/// A conversation about one picture. Fields that would change the answer and that BLIP-2 has no place for are refused.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "what is not read is named to be allowed")]
pub struct ChatRequest {
    /// The model; the first that does it if absent.
    model: Option<String>,
    /// One picture, and a question with the turns before it; without a text the picture is described.
    messages: Vec<Message>,
    /// Tokens to write at most.
    #[serde(alias = "max_completion_tokens")]
    max_tokens: Option<usize>,
    /// Tokens to write before the text may end.
    min_tokens: Option<usize>,
    /// Write as many tokens as `max_tokens` says, whatever they are.
    #[serde(default)]
    ignore_eos: bool,
    /// 0 is greedy search, more draws; absent: the model's own search, which may have beams.
    temperature: Option<f32>,
    /// Draw from the best tokens that together reach this probability.
    top_p: Option<f32>,
    /// Draw from this many of the best tokens; -1 and 0 draw from all.
    top_k: Option<i64>,
    /// Draw from tokens with at least this share of the best one's probability.
    min_p: Option<f32>,
    /// The same seed draws the same text; absent: another every time.
    seed: Option<i64>,
    /// Texts.
    #[schema(minimum = 1)]
    n: Option<usize>,
    /// The text ends before the first of these.
    stop: Option<Stop>,
    /// Tell how probable each token is.
    #[serde(default)]
    logprobs: Option<bool>,
    /// With so many others in its place.
    #[schema(maximum = 20)]
    top_logprobs: Option<usize>,
    /// Tell the text as it is written.
    #[serde(default)]
    stream: Option<bool>,
    /// How it is told.
    stream_options: Option<StreamOptions>,
    /// Beam search.
    #[serde(default)]
    use_beam_search: bool,
    /// With so many beams.
    #[serde(alias = "beams", alias = "num_beams")]
    best_of: Option<usize>,
    /// Of beam search.
    length_penalty: Option<f32>,
    /// Above 1, tokens that are already there become less likely.
    repetition_penalty: Option<f32>,
    /// No run of this many tokens occurs twice.
    #[serde(default)]
    no_repeat_ngram_size: usize,
    /// Only 0: there is no such search here.
    #[serde(default)]
    frequency_penalty: Option<f32>,
    /// Only 0: there is no such search here.
    #[serde(default)]
    presence_penalty: Option<f32>,
    /// Only `{"type": "text"}`.
    response_format: Option<Value>,
    /// Only none.
    tools: Option<Value>,
    /// Only `none` or `auto`.
    tool_choice: Option<Value>,
    /// Only none.
    logit_bias: Option<Value>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    user: Option<IgnoredAny>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    metadata: Option<IgnoredAny>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    store: Option<IgnoredAny>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    service_tier: Option<IgnoredAny>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    parallel_tool_calls: Option<IgnoredAny>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    safety_identifier: Option<IgnoredAny>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    prompt_cache_key: Option<IgnoredAny>,
}

/// A text, or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

/// How a stream tells.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub struct StreamOptions {
    /// At its end, how many tokens there were.
    include_usage: bool,
}

/// Texts about the picture.
#[derive(Serialize, ToSchema)]
pub struct ChatResponse {
    /// The answer's name.
    id: String,
    /// `chat.completion`.
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    /// The model that answered.
    model: String,
    /// The texts.
    choices: Vec<Choice>,
    /// How many tokens there were.
    usage: Usage,
    /// What OpenAI's form has no place for: `timings_ms` by stage, `warnings`, and `score` of beam search.
    #[schema(value_type = Object)]
    blip2: Value,
}

/// A text.
#[derive(Serialize, ToSchema)]
pub struct Choice {
    index: usize,
    message: Said,
    #[schema(value_type = Option<Object>)]
    logprobs: Option<Value>,
    /// `stop` or `length`.
    finish_reason: String,
}

/// The text itself.
#[derive(Serialize, ToSchema)]
pub struct Said {
    /// `assistant`.
    role: &'static str,
    content: String,
    /// Never anything.
    refusal: Option<String>,
}

/// How many tokens there were.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct Usage {
    /// Of the prompt, those of the picture included.
    pub prompt_tokens: usize,
    /// That were written, end tokens included.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
}

/// Answers a question about a picture, or describes it.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "openai",
    request_body = ChatRequest,
    responses(
        (status = 200, content((ChatResponse = "application/json"), (Value = "text/event-stream"))),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    ),
)]
pub async fn complete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let said = body::read::<ChatRequest>(&app, request).await?;
    let mut asked = said.value;
    asked.check()?;
    let conversation = Conversation::read(std::mem::take(&mut asked.messages), "messages")?;
    let opening = Opening { model: asked.model.as_deref(), conversation, options: &asked.generation() };
    let turn = Turn::begin(&app, caller, opening, said.room).await?;
    let about = About::new(turn.call.name(), turn.n_prompt);
    if asked.stream == Some(true) {
        let with_usage = asked.stream_options.unwrap_or_default().include_usage;
        return Ok(stream::stream(turn.call, turn.ticket, Chunks { about, with_usage, has_begun: false }));
    }
    Ok(about.whole(turn.answer().await?))
}

impl ChatRequest {
    /// Refuses what would be passed over in silence.
    fn check(&self) -> Result<(), ApiError> {
        let zero = |value: Option<f32>| value.unwrap_or(0.0) == 0.0;
        check_plain(&[
            ("frequency_penalty", zero(self.frequency_penalty)),
            ("presence_penalty", zero(self.presence_penalty)),
            ("response_format", is_plain(&self.response_format, &[json!({"type": "text"})])),
            ("tools", is_plain(&self.tools, &[json!([])])),
            ("tool_choice", is_plain(&self.tool_choice, &[json!("none"), json!("auto")])),
            ("logit_bias", is_plain(&self.logit_bias, &[json!({})])),
        ])?;
        if self.top_logprobs.is_some_and(|n| n > MOST_ALTERNATIVES) {
            return Err(ApiError::invalid(format!("{MOST_ALTERNATIVES} alternatives at most are told")).about("top_logprobs"));
        }
        check_words("stop", &self.stop())
    }

    fn stop(&self) -> Vec<String> {
        match &self.stop {
            None => Vec::new(),
            Some(Stop::One(text)) => vec![text.clone()],
            Some(Stop::Several(texts)) => texts.clone(),
        }
    }

    fn generation(&self) -> GenerationOptions {
        let sample = self.temperature.is_some_and(|temperature| temperature != 0.0) && !self.use_beam_search;
        let draws = |value: Option<f32>| value.filter(|_| sample);
        let beams = match self.best_of {
            Some(beams) if self.use_beam_search || !sample => Some(beams),
            _ if self.use_beam_search => Some(self.n.unwrap_or(1).max(2)),
            _ => self.temperature.map(|_| 1),
        };
        GenerationOptions {
            max_new_tokens: self.max_tokens,
            min_new_tokens: if self.ignore_eos { self.max_tokens } else { self.min_tokens },
            beams,
            length_penalty: self.length_penalty,
            n_return: self.n,
            sample,
            temperature: draws(self.temperature),
            top_k: self.top_k.filter(|_| sample).map(|k| usize::try_from(k).unwrap_or(0)),
            top_p: draws(self.top_p),
            min_p: draws(self.min_p),
            seed: sample.then(|| self.seed.map_or_else(rand::random, |seed| seed as u64)),
            repetition_penalty: self.repetition_penalty,
            no_repeat_ngram: self.no_repeat_ngram_size,
            stop: self.stop(),
            log_probs: (self.logprobs == Some(true)).then(|| self.top_logprobs.unwrap_or(0)),
            ..GenerationOptions::default()
        }
    }
}

/// What every part of an answer says.
struct About {
    id: String,
    created: u64,
    model: String,
    n_prompt: usize,
}

impl About {
    fn new(model: &str, n_prompt: usize) -> Self {
        let id = format!("chatcmpl-{:032x}", rand::random::<u128>());
        Self { id, created: now(), model: model.to_owned(), n_prompt }
    }

    fn usage(&self, answer: &Answer) -> Usage {
        let of_several: usize = answer.candidates.iter().map(|candidate| candidate.tokens.len()).sum();
        let completion_tokens = if answer.candidates.is_empty() { answer.tokens.len() } else { of_several };
        Usage { prompt_tokens: self.n_prompt, completion_tokens, total_tokens: self.n_prompt + completion_tokens }
    }

    fn whole(self, answer: Answer) -> Response {
        let (usage, spent) = (self.usage(&answer), Spent(answer.timings.clone()));
        let choice = |(index, (content, finish_reason)): (usize, (String, String))| {
            let logprobs = (index == 0).then(|| log_probs(&answer.log_probs)).flatten();
            Choice { index, message: Said { role: "assistant", content, refusal: None }, logprobs, finish_reason }
        };
        let choices = texts(&answer).into_iter().enumerate().map(choice).collect();
        let blip2 = extra(&answer);
        let Self { id, created, model, .. } = self;
        let mut response =
            Json(ChatResponse { id, object: "chat.completion", created, model, choices, usage, blip2 }).into_response();
        response.extensions_mut().insert(spent);
        response
    }

    fn chunk(&self, choices: Value) -> Value {
        let Self { id, created, model, .. } = self;
        json!({"id": id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices})
    }
}

/// Every text with why it ended.
fn texts(answer: &Answer) -> Vec<(String, String)> {
    if answer.candidates.is_empty() {
        return vec![(answer.text.clone(), answer.finish.to_string())];
    }
    answer.candidates.iter().map(|candidate| (candidate.text.clone(), candidate.finish.to_string())).collect()
}

/// What OpenAI's form has no place for.
pub fn extra(answer: &Answer) -> Value {
    let mut extra = json!({"timings_ms": answer.timings});
    if !answer.warnings.is_empty() {
        extra["warnings"] = json!(answer.warnings);
    }
    if let Some(score) = answer.score {
        extra["score"] = score.into();
    }
    extra
}

fn log_probs(tokens: &[TokenLogProb]) -> Option<Value> {
    let alternative =
        |Alternative { text, log_prob, .. }: &Alternative| json!({"token": text, "logprob": log_prob, "bytes": text.as_bytes()});
    let token = |TokenLogProb { text, log_prob, alternatives, .. }: &TokenLogProb| {
        let top: Vec<Value> = alternatives.iter().map(alternative).collect();
        json!({"token": text, "logprob": log_prob, "bytes": text.as_bytes(), "top_logprobs": top})
    };
    (!tokens.is_empty()).then(|| json!({"content": tokens.iter().map(token).collect::<Vec<_>>(), "refusal": null}))
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The chunks of a stream. The first text comes as it is written, the others at the end.
struct Chunks {
    about: About,
    with_usage: bool,
    has_begun: bool,
}

impl Chunks {
    /// With the role where the text begins: clients take the first chunk for the first token, so none may come before it.
    fn delta(&mut self, mut delta: Value) -> Value {
        if !std::mem::replace(&mut self.has_begun, true) {
            delta["role"] = "assistant".into();
        }
        delta
    }
}

impl Say for Chunks {
    fn first(&mut self) -> Vec<Event> {
        Vec::new()
    }

    fn piece(&mut self, text: String, _: usize) -> Option<Event> {
        if text.is_empty() {
            return None;
        }
        let delta = self.delta(json!({"content": text}));
        Some(stream::json(&self.about.chunk(json!([{"index": 0, "delta": delta, "finish_reason": null}]))))
    }

    fn last(&mut self, end: Result<Outcome, ApiError>) -> Vec<Event> {
        let answer = match written(end) {
            Ok(answer) => answer,
            Err(error) => return vec![stream::json(&error.body()), stream::done()],
        };
        let mut events = Vec::new();
        for (index, (text, finish)) in texts(&answer).into_iter().enumerate() {
            if index > 0 {
                let delta = json!({"role": "assistant", "content": text});
                events.push(self.about.chunk(json!([{"index": index, "delta": delta, "finish_reason": null}])));
            }
            let logprobs = (index == 0).then(|| log_probs(&answer.log_probs)).flatten();
            let delta = self.delta(json!({}));
            events.push(self.about.chunk(json!([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])));
        }
        if let Some(last) = events.last_mut() {
            last["blip2"] = extra(&answer);
        }
        if self.with_usage {
            let mut usage = self.about.chunk(json!([]));
            usage["usage"] = json!(self.about.usage(&answer));
            events.push(usage);
        }
        events.iter().map(stream::json).chain([stream::done()]).collect()
    }
}
