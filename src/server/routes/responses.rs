//! `POST /v1/responses`: OpenAI's newer form of a question about a picture. Nothing is stored.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::chat::{extra, now};
use super::messages::{Content, Conversation, ImageUrl, Message, Part};
use super::options::{check_plain, is_plain};
use super::stream::{self, Say};
use super::turn::{Opening, Turn, written};
use crate::decode::Finish;
use crate::engine::{Answer, GenerationOptions};
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
pub struct ResponsesRequest {
    /// The model; the first that does it if absent.
    model: Option<String>,
    /// Messages with one picture, and a question with the turns before it; without a text the picture is described.
    input: Input,
    /// Must be empty, for BLIP-2 reads none.
    instructions: Option<String>,
    /// Tokens to write at most.
    #[schema(minimum = 1)]
    max_output_tokens: Option<usize>,
    /// 0 is greedy search, more draws; absent: the model's own search, which may have beams.
    temperature: Option<f32>,
    /// Draw from the best tokens that together reach this probability.
    top_p: Option<f32>,
    /// Tell the text as it is written.
    stream: Option<bool>,
    /// Only text.
    text: Option<TextForm>,
    /// Only false: nothing is stored, neither where it is absent.
    store: Option<bool>,
    /// Only null: nothing is stored.
    previous_response_id: Option<Value>,
    /// Only null: nothing is stored.
    conversation: Option<Value>,
    /// Only false.
    background: Option<bool>,
    /// Only none.
    tools: Option<Value>,
    /// Only `none` or `auto`.
    tool_choice: Option<Value>,
    /// Only none.
    include: Option<Value>,
    /// Only none.
    reasoning: Option<Value>,
    /// Only none.
    prompt: Option<Value>,
    /// Only 0.
    top_logprobs: Option<Value>,
    /// Only `disabled`: a text that is too long is refused.
    truncation: Option<Value>,
    /// Told again with the answer.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
    /// Is not read.
    #[schema(value_type = Value)]
    stream_options: Option<IgnoredAny>,
    /// Is not read.
    #[schema(value_type = Value)]
    user: Option<IgnoredAny>,
    /// Is not read.
    #[schema(value_type = Value)]
    service_tier: Option<IgnoredAny>,
    /// Is not read.
    #[schema(value_type = Value)]
    parallel_tool_calls: Option<IgnoredAny>,
    /// Is not read.
    #[schema(value_type = Value)]
    safety_identifier: Option<IgnoredAny>,
    /// Is not read.
    #[schema(value_type = Value)]
    prompt_cache_key: Option<IgnoredAny>,
}

/// A text, or messages.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Input {
    /// What the user says.
    Text(String),
    /// Messages.
    Items(Vec<InputItem>),
}

/// A message; one of an earlier answer's `output` too.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "what is not read is named to be allowed")]
pub struct InputItem {
    /// `message`.
    r#type: Option<ItemType>,
    /// `user` or `assistant`; a `system` or `developer` message must be empty, for BLIP-2 reads none.
    role: String,
    /// A text, or parts.
    content: InputContent,
    /// Is not read.
    #[schema(value_type = Value)]
    id: Option<IgnoredAny>,
    /// Is not read.
    #[schema(value_type = Value)]
    status: Option<IgnoredAny>,
    /// Is not read.
    #[schema(value_type = Value)]
    phase: Option<IgnoredAny>,
}

/// What an item is.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ItemType {
    /// Something that somebody said.
    Message,
}

/// A text, or parts.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub enum InputContent {
    /// A text.
    Text(String),
    /// Texts and pictures.
    Parts(Vec<InputPart>),
}

/// A text or a picture.
#[derive(Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[allow(dead_code, reason = "what is not read is named to be allowed")]
pub enum InputPart {
    /// A text.
    InputText {
        /// The text.
        text: String,
    },
    /// A text of an earlier answer.
    OutputText {
        /// The text.
        text: String,
        /// Is not read.
        #[schema(value_type = Value)]
        annotations: Option<IgnoredAny>,
        /// Is not read.
        #[schema(value_type = Value)]
        logprobs: Option<IgnoredAny>,
    },
    /// A picture.
    InputImage {
        /// A data URL, or an address that the server allows.
        image_url: String,
        /// Is not read: every picture is seen in the one size of the model.
        #[schema(value_type = Value)]
        detail: Option<IgnoredAny>,
    },
}

/// What is written.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TextForm {
    /// Only `{"type": "text"}`.
    format: Option<Value>,
    /// Only `medium`.
    verbosity: Option<Value>,
}

/// An answer.
#[derive(Clone, Serialize, ToSchema)]
pub struct ResponsesResponse {
    /// The answer's name, by which it cannot be asked for: nothing is stored.
    id: String,
    /// `response`.
    object: &'static str,
    /// Seconds since 1970.
    created_at: u64,
    completed_at: Option<u64>,
    /// `completed`; `incomplete` where `max_output_tokens` was reached; in streams `in_progress` and `failed` too.
    status: &'static str,
    background: bool,
    /// Why it failed.
    #[schema(value_type = Option<Object>)]
    error: Option<Value>,
    /// Why it is incomplete.
    #[schema(value_type = Option<Object>)]
    incomplete_details: Option<Value>,
    instructions: Option<String>,
    max_output_tokens: Option<usize>,
    /// The model that answered.
    model: String,
    /// One message.
    output: Vec<OutputItem>,
    parallel_tool_calls: bool,
    previous_response_id: Option<String>,
    #[schema(value_type = Object)]
    reasoning: Value,
    store: bool,
    temperature: Option<f32>,
    #[schema(value_type = Object)]
    text: Value,
    tool_choice: &'static str,
    #[schema(value_type = Vec<Object>)]
    tools: [Value; 0],
    top_logprobs: usize,
    top_p: Option<f32>,
    truncation: &'static str,
    usage: Option<ResponsesUsage>,
    user: Option<String>,
    #[schema(value_type = Object)]
    metadata: Map<String, Value>,
    /// What OpenAI's form has no place for: `timings_ms` by stage, `warnings`, and `score` of beam search.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    blip2: Option<Value>,
}

/// The message with the text.
#[derive(Clone, Serialize, ToSchema)]
pub struct OutputItem {
    id: String,
    /// `message`.
    r#type: &'static str,
    status: &'static str,
    /// `assistant`.
    role: &'static str,
    content: Vec<OutputPart>,
}

/// The text.
#[derive(Clone, Serialize, ToSchema)]
pub struct OutputPart {
    /// `output_text`.
    r#type: &'static str,
    text: String,
    #[schema(value_type = Vec<Object>)]
    annotations: [Value; 0],
    #[schema(value_type = Vec<Object>)]
    logprobs: [Value; 0],
}

/// How many tokens there were.
#[derive(Clone, Serialize, ToSchema)]
pub struct ResponsesUsage {
    /// Of the prompt, those of the picture included.
    input_tokens: usize,
    #[schema(value_type = Object)]
    input_tokens_details: Value,
    /// That were written, end tokens included.
    output_tokens: usize,
    #[schema(value_type = Object)]
    output_tokens_details: Value,
    total_tokens: usize,
}

/// Answers a question about a picture, or describes it.
///
/// With `stream`, the answer is a stream of server-sent events, each with its `type`: `response.created`, `response.in_progress`,
/// `response.output_item.added`, `response.content_part.added`, `response.output_text.delta` for every piece, then the same things done and
/// `response.completed`, `response.incomplete` or `response.failed`.
#[utoipa::path(
    post, path = "/v1/responses", tag = "openai",
    request_body = ResponsesRequest,
    responses(
        (status = 200, content((ResponsesResponse = "application/json"), (Value = "text/event-stream"))),
        (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody),
    ),
)]
pub async fn respond(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let said = body::read::<ResponsesRequest>(&app, request).await?;
    let mut asked = said.value;
    asked.check()?;
    let options = asked.generation();
    let conversation = Conversation::read(std::mem::replace(&mut asked.input, Input::Items(Vec::new())).messages(), "input")?;
    let opening = Opening { model: asked.model.as_deref(), conversation, options: &options };
    let turn = Turn::begin(&app, caller, opening, said.room).await?;
    let (streams, mut draft) = (asked.stream == Some(true), Draft::new(asked, &turn));
    if streams {
        return Ok(stream::stream(turn.call, turn.ticket, Told { draft, n_said: 0, text: String::new(), edges: Edges::default() }));
    }
    let answer = turn.answer().await?;
    let mut response = Json(draft.ended(&answer)).into_response();
    response.extensions_mut().insert(Spent(answer.timings));
    Ok(response)
}

/// There is none, for nothing is stored.
#[utoipa::path(
    get, path = "/v1/responses/{response_id}", tag = "openai",
    params(("response_id" = String, Path, description = "Any.")),
    responses((status = "4XX", body = ErrorBody)),
)]
pub async fn stored(Path(_): Path<String>) -> ApiError {
    ApiError::not_found("responses are not stored here")
}

impl ResponsesRequest {
    /// Refuses what would be passed over in silence.
    fn check(&self) -> Result<(), ApiError> {
        let text = self.text.as_ref();
        check_plain(&[
            ("instructions", self.instructions.as_ref().is_none_or(String::is_empty)),
            ("text.format", text.is_none_or(|text| is_plain(&text.format, &[json!({"type": "text"})]))),
            ("text.verbosity", text.is_none_or(|text| is_plain(&text.verbosity, &[json!("medium")]))),
            ("store", self.store != Some(true)),
            ("previous_response_id", is_plain(&self.previous_response_id, &[])),
            ("conversation", is_plain(&self.conversation, &[])),
            ("background", self.background != Some(true)),
            ("tools", is_plain(&self.tools, &[json!([])])),
            ("tool_choice", is_plain(&self.tool_choice, &[json!("none"), json!("auto")])),
            ("include", is_plain(&self.include, &[json!([])])),
            ("reasoning", is_plain(&self.reasoning, &[json!({})])),
            ("prompt", is_plain(&self.prompt, &[])),
            ("top_logprobs", is_plain(&self.top_logprobs, &[json!(0)])),
            ("truncation", is_plain(&self.truncation, &[json!("disabled")])),
        ])
    }

    fn generation(&self) -> GenerationOptions {
        let sample = self.temperature.is_some_and(|temperature| temperature != 0.0);
        GenerationOptions {
            max_new_tokens: self.max_output_tokens,
            beams: self.temperature.map(|_| 1),
            sample,
            temperature: self.temperature.filter(|_| sample),
            top_p: self.top_p.filter(|_| sample),
            seed: sample.then(rand::random),
            ..GenerationOptions::default()
        }
    }
}

impl Input {
    /// As chat completions have them.
    fn messages(self) -> Vec<Message> {
        match self {
            Self::Text(text) => vec![Message::new("user".into(), Some(Content::Text(text)))],
            Self::Items(items) => items.into_iter().map(InputItem::message).collect(),
        }
    }
}

impl InputItem {
    fn message(self) -> Message {
        let content = match self.content {
            InputContent::Text(text) => Content::Text(text),
            InputContent::Parts(parts) => Content::Parts(parts.into_iter().map(InputPart::part).collect()),
        };
        Message::new(self.role, Some(content))
    }
}

impl InputPart {
    fn part(self) -> Part {
        match self {
            Self::InputText { text } | Self::OutputText { text, .. } => Part::Text { text },
            Self::InputImage { image_url, .. } => Part::ImageUrl { image_url: ImageUrl::Bare(image_url) },
        }
    }
}

/// An answer on its way.
struct Draft {
    response: ResponsesResponse,
    item_id: String,
    n_prompt: usize,
}

impl Draft {
    fn new(asked: ResponsesRequest, turn: &Turn) -> Self {
        let response = ResponsesResponse {
            id: format!("resp_{:032x}", rand::random::<u128>()),
            object: "response",
            created_at: now(),
            completed_at: None,
            status: "in_progress",
            background: false,
            error: None,
            incomplete_details: None,
            instructions: None,
            max_output_tokens: asked.max_output_tokens,
            model: turn.call.name().to_owned(),
            output: Vec::new(),
            parallel_tool_calls: true,
            previous_response_id: None,
            reasoning: json!({"effort": null, "summary": null}),
            store: false,
            temperature: asked.temperature,
            text: json!({"format": {"type": "text"}}),
            tool_choice: "auto",
            tools: [],
            top_logprobs: 0,
            top_p: asked.top_p,
            truncation: "disabled",
            usage: None,
            user: None,
            metadata: asked.metadata.unwrap_or_default(),
            blip2: None,
        };
        Self { response, item_id: format!("msg_{:032x}", rand::random::<u128>()), n_prompt: turn.n_prompt }
    }

    /// The message, with its text if there is any yet.
    fn item(&self, status: &'static str, text: Option<&str>) -> OutputItem {
        let content = text.into_iter().map(OutputPart::new).collect();
        OutputItem { id: self.item_id.clone(), r#type: "message", status, role: "assistant", content }
    }

    fn ended(&mut self, answer: &Answer) -> &ResponsesResponse {
        let is_cut = answer.finish == Finish::Length;
        let (status, output_tokens) = (if is_cut { "incomplete" } else { "completed" }, answer.tokens.len());
        self.response.output = vec![self.item(status, Some(&answer.text))];
        self.response.status = status;
        self.response.completed_at = (!is_cut).then(now);
        self.response.incomplete_details = is_cut.then(|| json!({"reason": "max_output_tokens"}));
        self.response.usage = Some(ResponsesUsage {
            input_tokens: self.n_prompt,
            input_tokens_details: json!({"cached_tokens": 0, "cache_write_tokens": 0}),
            output_tokens,
            output_tokens_details: json!({"reasoning_tokens": 0}),
            total_tokens: self.n_prompt + output_tokens,
        });
        self.response.blip2 = Some(extra(answer));
        &self.response
    }

    fn failed(&mut self, error: &ApiError) -> &ResponsesResponse {
        let error = error.body().error;
        let code = match error.r#type {
            "rate_limit_error" | "overloaded_error" => "rate_limit_exceeded",
            "invalid_request_error" if error.code.starts_with("picture") => "invalid_image",
            "invalid_request_error" => "invalid_prompt",
            _ => "server_error",
        };
        self.response.status = "failed";
        self.response.error = Some(json!({"code": code, "message": error.message}));
        &self.response
    }
}

impl OutputPart {
    fn new(text: &str) -> Self {
        Self { r#type: "output_text", text: text.to_owned(), annotations: [], logprobs: [] }
    }
}

/// What a stream has told.
struct Told {
    draft: Draft,
    n_said: usize,
    text: String,
    edges: Edges,
}

/// Blanks around a text, which are no part of it: those at the end of a piece are held until more comes.
#[derive(Default)]
struct Edges {
    has_begun: bool,
    held: String,
}

impl Edges {
    /// What is sure to be inside the text.
    fn inside(&mut self, piece: &str) -> String {
        let mut whole = std::mem::take(&mut self.held) + piece;
        if !self.has_begun {
            whole = whole.trim_start().to_owned();
        }
        self.held = whole.split_off(whole.trim_end().len());
        self.has_begun |= !whole.is_empty();
        whole
    }
}

impl Told {
    fn say(&mut self, name: &str, mut fields: Value) -> Event {
        fields["type"] = name.into();
        fields["sequence_number"] = self.n_said.into();
        self.n_said += 1;
        stream::named(name, &fields)
    }

    /// Something about the one part of the one message.
    fn part(&mut self, name: &str, mut fields: Value) -> Event {
        fields["item_id"] = json!(self.draft.item_id);
        (fields["output_index"], fields["content_index"]) = (json!(0), json!(0));
        self.say(name, fields)
    }

    fn delta(&mut self, text: &str) -> Option<Event> {
        if text.is_empty() {
            return None;
        }
        self.text.push_str(text);
        Some(self.part("response.output_text.delta", json!({"delta": text, "logprobs": []})))
    }
}

impl Say for Told {
    fn first(&mut self) -> Vec<Event> {
        let response = json!(self.draft.response);
        let item = self.draft.item("in_progress", None);
        vec![
            self.say("response.created", json!({"response": response})),
            self.say("response.in_progress", json!({"response": response})),
            self.say("response.output_item.added", json!({"output_index": 0, "item": item})),
            self.part("response.content_part.added", json!({"part": OutputPart::new("")})),
        ]
    }

    fn piece(&mut self, text: String, _: usize) -> Option<Event> {
        let text = self.edges.inside(&text);
        self.delta(&text)
    }

    fn last(&mut self, end: Result<Outcome, ApiError>) -> Vec<Event> {
        let answer = match written(end) {
            Ok(answer) => answer,
            Err(error) => {
                let response = json!(self.draft.failed(&error));
                return vec![self.say("response.failed", json!({"response": response}))];
            }
        };
        let rest = answer.text.strip_prefix(&self.text).unwrap_or_default().to_owned();
        let response = json!(self.draft.ended(&answer));
        let name = format!("response.{}", self.draft.response.status);
        let rest = self.delta(&rest);
        let ends = [
            self.part("response.output_text.done", json!({"text": answer.text, "logprobs": []})),
            self.part("response.content_part.done", json!({"part": OutputPart::new(&answer.text)})),
            self.say("response.output_item.done", json!({"output_index": 0, "item": response["output"][0]})),
            self.say(&name, json!({"response": response})),
        ];
        rest.into_iter().chain(ends).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_to_the_text_without_blanks_around_it() {
        for pieces in [&[" a", " red ", "", "\n", "ring", " \n", " "][..], &[" ", " ", "a  b", "."], &["", " "], &["x"]] {
            let mut edges = Edges::default();
            let told: Vec<String> = pieces.iter().map(|piece| edges.inside(piece)).collect();
            assert_eq!(told.concat(), pieces.concat().trim(), "{told:?}");
        }
    }
}
