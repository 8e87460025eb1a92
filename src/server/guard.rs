//! What every request passes: it gets a name, its caller is recognised, and it is counted when it has been answered.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HOST};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use http_body_util::{BodyExt, Limited};

use super::App;
use super::error::{ApiError, Refused};
use super::keys::Caller;
use super::traces::Trace;
use crate::timing::{Timings, milliseconds};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
/// A client's own name of a request, if it is longer or odd, gives way to ours.
const LONGEST_ID: usize = 128;

/// Bytes of a body that are passed over when a request is refused, and how long they may take.
const PASSED_OVER: usize = 1 << 20;
const PASSING: Duration = Duration::from_millis(100);

/// Where the time of an answer went, for the header that says so.
#[derive(Clone)]
pub struct Spent(pub Timings);

/// Whose request it was, for the log.
#[derive(Clone)]
struct Who(Arc<str>);

/// A request that is being answered; it is counted when this goes.
struct Counted {
    app: Arc<App>,
    start: Instant,
    id: HeaderValue,
    method: Method,
    route: String,
    status: u16,
    caller: Arc<str>,
    trace: Option<Trace>,
}

/// Names a request, and counts it once its answer has ended, or its client has gone.
pub async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let (start, id, method) = (Instant::now(), request_id(request.headers()), request.method().clone());
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let trace = app.traces.as_ref().map(|traces| traces.begin((&method, &route), request.headers(), start));
    if let Some(trace) = &trace {
        request.extensions_mut().insert(trace.clone());
    }
    let mut response = next.run(request).await;
    let refused = response.extensions().get::<Refused>().map(|Refused(error)| error);
    // Of gRPC, every answer is one of HTTP's good ones.
    let status = refused.map_or(response.status(), |error| error.status).as_u16();
    if let Some(error) = refused {
        app.metrics.refused(error.code);
    }
    let caller = response.extensions().get().map_or_else(|| "nobody".into(), |Who(name)| Arc::clone(name));
    let timing = server_timing(response.extensions().get::<Spent>(), milliseconds(start.elapsed()));
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id.clone());
    headers.insert(SERVER_TIMING, timing);
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    headers.entry("cache-control").or_insert(HeaderValue::from_static("no-store"));
    let counted = Counted { app, start, id, method, route, status, caller, trace };
    if is_stream(&response) { response.map(|body| until_its_end(body, counted)) } else { response }
}

/// Whether an answer goes on after its head.
fn is_stream(response: &Response) -> bool {
    response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"))
}

/// Counts a request when its body has been read, or nobody reads it any more.
fn until_its_end(body: Body, counted: Counted) -> Body {
    Body::from_stream(body.into_data_stream().inspect(move |_| {
        // It goes with the stream.
        let _ = &counted;
    }))
}

impl Drop for Counted {
    fn drop(&mut self) {
        let Self { app, start, id, method, route, status, caller, trace } = self;
        let time = start.elapsed();
        app.metrics.answered(route, *status, time);
        let (id, ms) = (id.to_str().unwrap_or_default(), milliseconds(time));
        let traced = trace.as_ref().and_then(Trace::id);
        tracing::info!(request = id, trace = traced, caller = &**caller, %method, route, status, ms, "answered");
        if let Some(trace) = trace {
            trace.end(*status, id, caller);
        }
    }
}

/// Lets in who has a key, or whoever is on this machine where there are none.
pub async fn admit(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    match caller(&app, request.headers()).and_then(counted) {
        Ok(mut caller) => {
            let who = Who(caller.name.clone());
            caller.keeps = !says_no_store(request.headers());
            caller.trace = request.extensions().get().cloned();
            request.extensions_mut().insert(caller);
            let mut response = next.run(request).await;
            response.extensions_mut().insert(who);
            response
        }
        Err(error) => refuse(request, error).await,
    }
}

/// Refuses at once, before a body is read, where nothing more may come in hand.
pub async fn make_room(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if app.is_draining() {
        return refuse(request, ApiError::unavailable("the server is stopping")).await;
    }
    match app.fleet.is_full() {
        Some(seconds) => refuse(request, ApiError::overloaded(seconds)).await,
        None => next.run(request).await,
    }
}

/// Answers without having read the body. What of it is here already is passed over: a connection that is closed before would be cut off, and
/// the client might never read why.
async fn refuse(request: Request, error: ApiError) -> Response {
    let passing = Limited::new(request.into_body(), PASSED_OVER).collect();
    // The rest is the client's loss.
    let _ = tokio::time::timeout(PASSING, passing).await;
    error.into_response()
}

fn caller(app: &App, headers: &HeaderMap) -> Result<Caller, ApiError> {
    if let Some(keys) = &app.keys {
        return bearer(headers).and_then(|key| keys.caller(key)).ok_or_else(ApiError::unauthorized);
    }
    if app.is_private() && !comes_from_here(headers) {
        return Err(ApiError::forbidden());
    }
    Ok(app.anybody.clone())
}

fn counted(caller: Caller) -> Result<Caller, ApiError> {
    match caller.count() {
        Ok(()) => Ok(caller),
        Err(seconds) => Err(ApiError::too_often(seconds)),
    }
}

/// Whether nothing of a request may be kept.
fn says_no_store(headers: &HeaderMap) -> bool {
    let said = headers.get_all(CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    said.flat_map(|value| value.split(',')).any(|directive| directive.trim().eq_ignore_ascii_case("no-store"))
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

/// A page elsewhere may send its visitors' browsers here, under a name that it has pointed at this machine; such requests say so.
fn comes_from_here(headers: &HeaderMap) -> bool {
    let host = headers.get(HOST).map_or(Some("localhost"), |host| host.to_str().ok());
    let is_elsewhere = headers.get("sec-fetch-site").is_some_and(|site| site == "cross-site");
    host.is_some_and(is_loopback) && !is_elsewhere
}

/// Whether this names the machine itself, whatever the port.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_plain = |id: &&HeaderValue| id.len() <= LONGEST_ID && id.as_bytes().iter().all(u8::is_ascii_graphic) && !id.is_empty();
    let drawn = || HeaderValue::try_from(format!("{:032x}", rand::random::<u128>())).expect("digits are a value");
    headers.get(REQUEST_ID).filter(is_plain).cloned().unwrap_or_else(drawn)
}

/// As the Server-Timing specification of the W3C has it, in milliseconds.
fn server_timing(spent: Option<&Spent>, total_ms: f64) -> HeaderValue {
    let stages =
        spent.map(|Spent(timings)| timings.iter().map(|(stage, time)| format!("{};dur={}", stage.name(), milliseconds(time))));
    let all: Vec<_> = stages.into_iter().flatten().chain([format!("total;dur={total_ms}")]).collect();
    HeaderValue::try_from(all.join(", ")).expect("names and numbers are a value")
}

/// What a handler that panicked becomes.
pub fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    tracing::error!("a handler panicked");
    ApiError::internal().into_response()
}

/// Where nothing is.
pub async fn nowhere() -> Response {
    ApiError::not_found("there is no such route; /openapi.json lists them").into_response()
}

/// Where another method is.
pub async fn otherwise() -> Response {
    ApiError::method().into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(headers: &[(&'static str, &'static str)]) -> bool {
        let headers = headers.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        comes_from_here(&headers.collect())
    }

    #[test]
    fn names_of_this_machine_are_known_and_others_are_not() {
        for host in ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "[::1]"] {
            assert!(from(&[("host", host)]), "{host}");
        }
        for host in ["evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]", "", "0.0.0.0"]
        {
            assert!(!from(&[("host", host)]), "{host}");
        }
        assert!(!from(&[("host", "localhost"), ("sec-fetch-site", "cross-site")]));
        assert!(from(&[("host", "localhost"), ("sec-fetch-site", "same-origin")]));
    }

    #[test]
    fn a_request_keeps_its_own_name_if_that_is_one() {
        let named = |id: &str| request_id(&HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_str(id).unwrap())]));
        assert_eq!(named("abc-1"), "abc-1");
        for odd in ["", "a b", &"x".repeat(200)] {
            assert_eq!(named(odd).len(), 32, "{odd}");
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
