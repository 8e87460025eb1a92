//! A conversation that is being answered, whatever the protocol: the model's turn.

use std::sync::Arc;

use super::messages::Conversation;
use crate::bundle::TaskName;
use crate::engine::{Answer, GenerationOptions};
use crate::prompt::Task;
use crate::server::App;
use crate::server::body::Room;
use crate::server::call::{self, Call};
use crate::server::error::ApiError;
use crate::server::keys::Caller;
use crate::server::picture;
use crate::server::worker::Ticket;
use crate::service::{Outcome, Want};

/// A text that is being written.
pub struct Turn {
    /// The request.
    pub call: Call,
    /// What comes of it.
    pub ticket: Ticket,
    /// Tokens of the prompt, those of the picture included.
    pub n_prompt: usize,
}

/// What is asked.
pub struct Opening<'a> {
    /// The model; the first that does it if absent.
    pub model: Option<&'a str>,
    /// What was said.
    pub conversation: Conversation,
    /// How the text is written.
    pub options: &'a GenerationOptions,
}

impl Turn {
    /// Answers the question, or describes the picture where there is none.
    pub async fn begin(
        app: &Arc<App>,
        caller: Caller,
        Opening { model, conversation, options }: Opening<'_>,
        room: Room,
    ) -> Result<Self, ApiError> {
        let task = if conversation.question.is_some() { TaskName::Ask } else { TaskName::Caption };
        let pictures = std::slice::from_ref(&conversation.picture);
        let call = Call::new(app, caller, (model, task, pictures), room)?;
        let generation = call.generation(task, options)?;
        let task = task_of(&call, &conversation)?;
        let n_prompt = n_prompt(&call, &task)?;
        let given = picture::one(app, conversation.picture).await.map_err(|error| error.about(conversation.field))?;
        let want = Want::Write(task, Box::new(generation));
        let ticket = call.submit(vec![call.asked(Ok(given), want)])?.remove(0)?;
        Ok(Self { call, ticket, n_prompt })
    }

    /// The whole answer.
    pub async fn answer(self) -> Result<Answer, ApiError> {
        written(self.call.ended(self.ticket).await)
    }
}

/// The text that was written.
pub fn written(end: Result<Outcome, ApiError>) -> Result<Answer, ApiError> {
    if let Outcome::Written(answer) = end? { Ok(*answer) } else { Err(ApiError::internal()) }
}

/// The question with the turns before it, as the model's own prompt has them.
fn task_of(call: &Call, conversation: &Conversation) -> Result<Task, ApiError> {
    let Some(question) = &conversation.question else { return call::caption(None) };
    let own = call.model.bundle.facts().prompts.get(&TaskName::Ask).map_or("{}", String::as_str);
    call::ask(question.clone(), conversation.template(own))
}

fn n_prompt(call: &Call, task: &Task) -> Result<usize, ApiError> {
    let context = call.model.worker.context()?;
    Ok(context.prompt(task)?.ids.len() + call.model.bundle.facts().qformer.n_queries)
}
