//! Messages and documents in OpenAI's form, and what BLIP-2 can read of them: one picture, texts.

use serde::Deserialize;
use serde::de::IgnoredAny;
use utoipa::ToSchema;

use crate::server::error::ApiError;
use crate::server::picture::PictureIn;

/// What somebody said.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "what is not read is named to be allowed")]
pub struct Message {
    /// `user` or `assistant`; a `system` or `developer` message must be empty, for BLIP-2 reads none.
    pub role: String,
    /// A text, or parts.
    pub content: Option<Content>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    name: Option<IgnoredAny>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    refusal: Option<IgnoredAny>,
    /// Is not read.
    #[serde(default)]
    #[schema(value_type = Value)]
    annotations: Option<IgnoredAny>,
}

/// A text, or parts.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    /// A text.
    Text(String),
    /// Texts and pictures.
    Parts(Vec<Part>),
}

/// A text or a picture.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// A text.
    #[serde(alias = "input_text", alias = "output_text")]
    Text {
        /// The text.
        text: String,
    },
    /// A picture as a data URL, or behind an address that the server allows.
    #[serde(alias = "input_image")]
    ImageUrl {
        /// `{"url": …}`, or the address itself.
        image_url: ImageUrl,
    },
}

/// Where a picture is.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum ImageUrl {
    /// The address alone.
    Bare(String),
    /// The address, beside what BLIP-2 does not need.
    Named {
        /// The address.
        url: String,
        /// Is not read: every picture is seen in the one size of the model.
        #[serde(default)]
        #[schema(value_type = Value)]
        #[allow(dead_code, reason = "it is named to be allowed")]
        detail: Option<IgnoredAny>,
    },
}

/// A text or a picture.
#[derive(Clone, Debug)]
pub enum Thing {
    /// A text.
    Text(String),
    /// A picture.
    Picture(PictureIn),
}

impl Message {
    /// What somebody said, without what is not read.
    pub fn new(role: String, content: Option<Content>) -> Self {
        Self { role, content, name: None, refusal: None, annotations: None }
    }
}

impl Content {
    /// Its parts in order.
    pub fn things(self) -> Vec<Thing> {
        match self {
            Self::Text(text) => vec![Thing::Text(text)],
            Self::Parts(parts) => parts.into_iter().map(Part::thing).collect(),
        }
    }
}

impl Part {
    /// What it is.
    pub fn thing(self) -> Thing {
        match self {
            Self::Text { text } => Thing::Text(text),
            Self::ImageUrl { image_url: ImageUrl::Bare(url) | ImageUrl::Named { url, .. } } => Thing::Picture(at(url)),
        }
    }
}

fn at(url: String) -> PictureIn {
    match url.strip_prefix("image_id:") {
        Some(id) => PictureIn { image_id: Some(id.to_owned()), ..PictureIn::default() },
        None => PictureIn { url: Some(url), ..PictureIn::default() },
    }
}

/// What a conversation comes to: BLIP-2 sees one picture and answers one question, with those before it in sight.
#[derive(Debug)]
pub struct Conversation {
    /// The picture.
    pub picture: PictureIn,
    /// Questions with their answers.
    pub turns: Vec<(String, String)>,
    /// The last question; none where nothing is said beside the picture.
    pub question: Option<String>,
    /// The field of the request that it was read from.
    pub field: &'static str,
}

impl Conversation {
    /// Reads the messages of a field; an error for what BLIP-2 has no place for.
    pub fn read(messages: Vec<Message>, field: &'static str) -> Result<Self, ApiError> {
        let (mut pictures, mut turns, mut open) = (Vec::new(), Vec::new(), None::<String>);
        for (place, message) in messages.into_iter().enumerate() {
            let param = format!("{field}[{place}]");
            let (text, seen) = split(message.content);
            pictures.extend(seen);
            match message.role.as_str() {
                "user" if open.is_none() => open = Some(text),
                "assistant" => match open.take().filter(|question| !question.is_empty()) {
                    Some(question) => turns.push((question, text)),
                    None => return Err(ApiError::invalid("an answer stands behind a question").about(param)),
                },
                "user" => return Err(ApiError::invalid("a question stands behind the answer to the one before").about(param)),
                "system" | "developer" if text.is_empty() => {}
                "system" | "developer" => return Err(ApiError::invalid("BLIP-2 reads no system message").about(param)),
                _ => return Err(ApiError::invalid("a role is user or assistant").about(param)),
            }
        }
        let question = open.ok_or_else(|| ApiError::invalid("the last message is the user's").about(field))?;
        if pictures.len() != 1 {
            let message = format!("BLIP-2 sees one picture; there are {}", pictures.len());
            return Err(ApiError::invalid(message).about(field));
        }
        let question = Some(question).filter(|question| !question.is_empty());
        Ok(Self { picture: pictures.remove(0), turns, question, field })
    }

    /// The text around the question: the turns before it, each as the model's own prompt has it with its answer and a full stop behind.
    pub fn template(&self, own: &str) -> Option<String> {
        if self.turns.is_empty() {
            return None;
        }
        let turn = |(question, answer): &(String, String)| {
            let stop = if answer.trim_end().ends_with(['.', '!', '?']) { "" } else { "." };
            format!("{} {}{stop} ", own.replacen("{}", question, 1).trim_end(), answer.trim())
        };
        Some(self.turns.iter().map(turn).chain([own.to_owned()]).collect())
    }
}

/// The texts of a message, a line each, and its pictures.
fn split(content: Option<Content>) -> (String, Vec<PictureIn>) {
    let (mut texts, mut pictures) = (Vec::new(), Vec::new());
    for thing in content.map(Content::things).unwrap_or_default() {
        match thing {
            Thing::Text(text) => texts.push(text),
            Thing::Picture(picture) => pictures.push(picture),
        }
    }
    (texts.join("\n").trim().to_owned(), pictures)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(messages: Value) -> Result<Conversation, ApiError> {
        Conversation::read(serde_json::from_value(messages).unwrap(), "messages")
    }

    fn picture() -> Value {
        json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}})
    }

    #[test]
    fn a_picture_alone_asks_for_a_caption() {
        let found = read(json!([{"role": "user", "content": [picture()]}])).unwrap();
        assert_eq!((found.question.as_deref(), found.picture.url.as_deref()), (None, Some("data:image/png;base64,AAAA")));
    }

    #[test]
    fn earlier_turns_stand_before_the_question() {
        let found = read(json!([
            {"role": "user", "content": [picture(), {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": "a cat"},
            {"role": "user", "content": "which colour?"},
        ]))
        .unwrap();
        assert_eq!(found.question.as_deref(), Some("which colour?"));
        let template = found.template("Question: {} Answer:").unwrap();
        assert_eq!(template, "Question: what is it? Answer: a cat. Question: {} Answer:");
    }

    #[test]
    fn what_has_no_place_is_refused() {
        let user = |content: Value| json!({"role": "user", "content": content});
        let cases = [
            (json!([user(json!("hello"))]), "there are 0"),
            (json!([user(json!([picture(), picture()]))]), "there are 2"),
            (json!([{"role": "system", "content": "be brief"}, user(json!([picture()]))]), "system"),
            (json!([user(json!([picture()])), {"role": "assistant", "content": "a"}]), "behind a question"),
            (json!([user(json!([picture()])), user(json!("b"))]), "behind the answer"),
            (json!([]), "the last message"),
            (json!([{"role": "tool", "content": "x"}]), "a role is"),
        ];
        for (messages, said) in cases {
            let error = read(messages).unwrap_err().body().error.message;
            assert!(error.contains(said), "{error}");
        }
    }
}
