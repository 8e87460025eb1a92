//! One request on its way: from what it says to what the workers find.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::App;
use super::body::Room;
use super::error::ApiError;
use super::fleet::Model;
use super::keys::Caller;
use super::picture::{Given, PictureIn};
use super::worker::{Asked, Ticket};
use crate::bundle::TaskName;
use crate::engine::{Generation, GenerationOptions};
use crate::prompt::Task;
use crate::service::{Gone, Outcome, Source, Terms, Want};

/// A longer text is none that these models read.
const LONGEST_TEXT: usize = 16 << 10;

/// Whose request it is, and the model that it is for.
pub struct Call {
    /// The server.
    pub app: Arc<App>,
    /// Who asks.
    pub caller: Caller,
    /// The model.
    pub model: Model,
    /// Whether what is made of its pictures is kept.
    pub keeps: bool,
    /// Of its body.
    #[expect(dead_code, reason = "it is held")]
    room: Room,
}

impl Call {
    /// For the named model; without a name for the one that has looked at the picture, or the first that does the task.
    pub fn new(
        app: &Arc<App>,
        caller: Caller,
        (model, task, pictures): (Option<&str>, TaskName, &[PictureIn]),
        room: Room,
    ) -> Result<Self, ApiError> {
        let id = pictures.first().and_then(|picture| picture.image_id.as_deref());
        let looked = id.filter(|_| model.is_none()).and_then(|id| app.images.get(caller.owner, id));
        let model = app.fleet.pick(model.or(looked.as_ref().map(|image| image.model.as_str())), task)?.clone();
        let keeps = caller.keeps && app.config.cache.bytes > 0;
        Ok(Self { app: app.clone(), caller, model, keeps, room })
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        self.model.worker.name()
    }

    /// On whose behalf, and until when.
    pub fn terms(&self) -> Terms {
        let deadline = Instant::now() + Duration::from_secs_f64(self.app.config.limits.max_wait_s);
        let Caller { owner, priority, .. } = self.caller;
        Terms { owner, priority, deadline: Some(deadline), gone: Gone::default(), keeps: self.keeps }
    }

    /// How a text for a task is written; an error if it makes no sense, or is more than a request may ask for.
    pub fn generation(&self, task: TaskName, options: &GenerationOptions) -> Result<Generation, ApiError> {
        let context = self.model.worker.context()?;
        let generation = context.generation(task, options)?;
        let defaults = self.model.bundle.facts().generation.get(&task).map_or(1, |defaults| defaults.max_new_tokens);
        let default = defaults.max(generation.processors.min_new_tokens);
        let wanted = generation.max_new_tokens.unwrap_or(default).min(self.model.bundle.room_behind(0));
        let (cost, most) = (generation.strategy.n_rows().saturating_mul(wanted), self.app.config.limits.max_cost);
        if cost > most {
            let message = format!(
                "{cost} tokens in all rows are more than the {most} that one text may cost; ask for fewer beams, texts or tokens"
            );
            return Err(ApiError::invalid(message));
        }
        Ok(generation)
    }

    /// What a job for this picture is about.
    pub fn source(&self, given: Given) -> Result<Source, ApiError> {
        match given {
            Given::Bytes(bytes) => Ok(Source::Encoded(bytes, self.app.config.picture_limits())),
            Given::Seen(sight) => Ok(Source::Seen(sight)),
            Given::Id(id) => {
                let image = self.app.images.get(self.caller.owner, &id);
                let image =
                    image.ok_or_else(|| ApiError::not_found("there is no such image_id, or no more; send the picture again"))?;
                if image.model != self.name() {
                    return Err(
                        ApiError::invalid(format!("another model, `{}`, looked at this picture", image.model)).about("model")
                    );
                }
                Ok(Source::Seen(Box::new(image.sight)))
            }
        }
    }

    /// Pictures of which several things are wanted each: they are looked at once, before anything is asked.
    pub async fn looked(&self, pictures: Vec<Result<Given, ApiError>>) -> Result<Vec<Result<Given, ApiError>>, ApiError> {
        let ends = self.finish(pictures.into_iter().map(|given| self.asked(given, Want::See)).collect()).await?;
        let seen = |end: Result<Outcome, ApiError>| match end? {
            Outcome::Seen(sight) => Ok(Given::Seen(sight)),
            _ => Err(ApiError::internal()),
        };
        Ok(ends.into_iter().map(seen).collect())
    }

    /// What is wanted of a picture, or why it cannot be asked.
    pub fn asked(&self, given: Result<Given, ApiError>, want: Want) -> Result<Asked, ApiError> {
        Ok(Asked { source: self.source(given?)?, want, terms: self.terms() })
    }

    /// Takes in hand what can be asked; each has a ticket, or why it has none.
    pub fn submit(&self, asked: Vec<Result<Asked, ApiError>>) -> Result<Vec<Result<Ticket, ApiError>>, ApiError> {
        let (mut sound, mut found) = (Vec::new(), Vec::with_capacity(asked.len()));
        for one in asked {
            found.push(one.map(|asked| sound.push(asked)));
        }
        let mut tickets = self.model.worker.ask(sound)?.into_iter();
        let mut ticket = || Ok(tickets.next().expect("each was asked")?);
        Ok(found.into_iter().map(|one| one.and_then(|()| ticket())).collect())
    }

    /// What comes of everything that was asked, in its order.
    pub async fn finish(&self, asked: Vec<Result<Asked, ApiError>>) -> Result<Vec<Result<Outcome, ApiError>>, ApiError> {
        let tickets = self.submit(asked)?;
        let mut found = Vec::with_capacity(tickets.len());
        for ticket in tickets {
            found.push(match ticket {
                Ok(ticket) => self.ended(ticket).await,
                Err(error) => Err(error),
            });
        }
        Ok(found)
    }

    /// What comes of one of them.
    pub async fn ended(&self, ticket: Ticket) -> Result<Outcome, ApiError> {
        let outcome = ticket.end().await?;
        self.took(&outcome);
        Ok(outcome)
    }

    /// Counts what came of a job, and where its time went.
    pub fn took(&self, outcome: &Outcome) {
        self.model.worker.metrics().ended(outcome);
        if let Some(trace) = &self.caller.trace {
            trace.took(self.name(), outcome);
        }
    }
}

/// A caption's task, with another prompt if there is one.
pub fn caption(prompt: Option<String>) -> Result<Task, ApiError> {
    prompt.as_deref().map_or(Ok(()), |prompt| check_text(prompt, "prompt"))?;
    Ok(prompt.map_or(Task::Caption, |prompt| Task::Raw(TaskName::Caption, prompt)))
}

/// A question's task, with another text around it if there is one.
pub fn ask(question: String, template: Option<String>) -> Result<Task, ApiError> {
    check_text(&question, "question")?;
    template.as_deref().map_or(Ok(()), |template| check_text(template, "prompt"))?;
    Ok(match template {
        Some(template) => Task::AskAs(question, template),
        None => Task::Ask(question),
    })
}

/// Refuses a text that is longer than any that is read.
pub fn check_text(text: &str, param: &str) -> Result<(), ApiError> {
    if text.len() <= LONGEST_TEXT {
        return Ok(());
    }
    Err(ApiError::invalid(format!("the text has more than the {LONGEST_TEXT} bytes allowed")).about(param))
}

/// Refuses a list that is empty or too long.
pub fn check_list(app: &App, texts: &[String], param: &str) -> Result<(), ApiError> {
    let most = app.config.limits.max_texts;
    match texts.len() {
        0 => Err(ApiError::invalid(format!("{param} has nothing in it")).about(param)),
        n if n > most => {
            Err(ApiError::invalid(format!("{n} {param} are more than the {most} that a request may have")).about(param))
        }
        _ => texts.iter().try_for_each(|text| check_text(text, param)),
    }
}
