//! Texts that are told as they are written, as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{Stream, unfold};
use serde::Serialize;

use crate::server::call::Call;
use crate::server::error::ApiError;
use crate::server::worker::{Ticket, Told};
use crate::service::Outcome;

/// Between two signs of life, where nothing is settled: beam search settles everything at its end.
const ALIVE: Duration = Duration::from_secs(10);

/// What a stream says of a text.
pub trait Say: Send + 'static {
    /// Before anything is settled.
    fn first(&mut self) -> Vec<Event>;
    /// A piece of the text, and the number of its tokens.
    fn piece(&mut self, text: String, n_tokens: usize) -> Option<Event>;
    /// The last that is said, whether it went well or not.
    fn last(&mut self, end: Result<Outcome, ApiError>) -> Vec<Event>;
}

struct State<S> {
    say: S,
    /// None once it has ended. It goes with the stream when its reader does.
    running: Option<(Call, Ticket)>,
    ready: std::collections::VecDeque<Event>,
}

/// Streams one text. When its reader goes away, the text is given up.
pub fn stream(call: Call, ticket: Ticket, mut say: impl Say) -> Response {
    let ready = say.first().into();
    let state = State { say, running: Some((call, ticket)), ready };
    let keep = KeepAlive::new().interval(ALIVE);
    let mut response = Sse::new(events(state)).keep_alive(keep).into_response();
    // Proxies that collect answers would hold it back.
    response.headers_mut().insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    response
}

fn events<S: Say>(state: State<S>) -> impl Stream<Item = Result<Event, Infallible>> {
    unfold(state, |mut state| async move {
        loop {
            if let Some(event) = state.ready.pop_front() {
                return Some((Ok(event), state));
            }
            let (call, ticket) = state.running.as_mut()?;
            match ticket.next().await {
                Told::Settled(n_tokens, text) => state.ready.extend(state.say.piece(text, n_tokens)),
                Told::End(end) => {
                    if let Ok(outcome) = &end {
                        call.took(outcome);
                    }
                    state.running = None;
                    state.ready.extend(state.say.last(end.map_err(ApiError::from)));
                }
            }
        }
    })
}

/// An event with JSON.
pub fn json(value: &impl Serialize) -> Event {
    Event::default().json_data(value).expect("it is made of strings and numbers")
}

/// An event with a name beside its JSON.
pub fn named(name: &str, value: &impl Serialize) -> Event {
    Event::default().event(name).json_data(value).expect("it is made of strings and numbers")
}

/// What ends a stream, as OpenAI's servers say it.
pub fn done() -> Event {
    Event::default().data("[DONE]")
}
