//! Traces for an OpenTelemetry collector, where one is named: a span for every request, below it one for each picture or text that was in
//! hand, and below that its stages. Names and attributes are those of the semantic conventions for HTTP and generative AI.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use axum::http::{HeaderMap, Method};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span as _, SpanBuilder, SpanKind, Status, TraceContextExt, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{Bytes, HeaderExtractor, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use url::Url;

use super::ServeError;
use super::config::TraceConfig;
use crate::service::Outcome;
use crate::timing::Timings;

/// A collector that takes longer gets nothing.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where spans go.
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// The trace of one request.
#[derive(Clone)]
pub struct Trace(Arc<Begun>);

struct Begun {
    tracer: SdkTracer,
    /// With the request's span.
    context: Context,
    /// One moment on both clocks.
    moment: (SystemTime, Instant),
}

impl Traces {
    /// None where no collector is named. Nothing is sent before there are spans.
    pub fn start(config: &TraceConfig) -> Result<Option<Self>, ServeError> {
        let Some(endpoint) = &config.endpoint else { return Ok(None) };
        let agent = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false).build();
        let sender = Sender { agent: agent.into(), is_failing: AtomicBool::new(false) };
        let exporter = SpanExporter::builder().with_http().with_http_client(sender).with_endpoint(of_traces(endpoint));
        let exporter = exporter.with_timeout(PATIENCE).build();
        let exporter = exporter.map_err(|error| ServeError::Value(format!("traces.endpoint {endpoint}: {error}")))?;
        let provider = SdkTracerProvider::builder()
            .with_resource(resource())
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.share))))
            .with_batch_exporter(exporter)
            .build();
        let tracer = provider.tracer("blip2");
        Ok(Some(Self { provider, tracer }))
    }

    /// Begins the span of a request, below the one that its client names.
    pub fn begin(&self, (method, route): (&Method, &str), headers: &HeaderMap, start: Instant) -> Trace {
        let parent = TraceContextPropagator::new().extract(&HeaderExtractor(headers));
        let moment = (SystemTime::now() - start.elapsed(), start);
        let attributes = [KeyValue::new("http.request.method", method.to_string()), KeyValue::new("http.route", route.to_owned())];
        let span = SpanBuilder::from_name(format!("{method} {route}"))
            .with_kind(SpanKind::Server)
            .with_start_time(moment.0)
            .with_attributes(attributes)
            .start_with_context(&self.tracer, &parent);
        Trace(Arc::new(Begun { tracer: self.tracer.clone(), context: parent.with_span(span), moment }))
    }

    /// Sends what has not been sent; waits for that, but not for long.
    pub fn finish(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(PATIENCE) {
            tracing::warn!(%error, "the last traces are lost");
        }
    }
}

impl Trace {
    /// By which the request is found in the collector, if it is recorded.
    pub fn id(&self) -> Option<String> {
        let span = self.0.context.span();
        span.is_recording().then(|| span.span_context().trace_id().to_string())
    }

    /// What came of a picture or a text.
    pub fn took(&self, model: &str, outcome: &Outcome) {
        let Begun { tracer, context, moment } = &*self.0;
        if !context.span().is_recording() {
            return;
        }
        let at = |instant: Instant| moment.0 + instant.saturating_duration_since(moment.1);
        let timings = outcome.timings();
        let begin = timings.spans().map(|(_, begin, _)| at(begin)).min().unwrap_or_else(|| at(Instant::now()));
        let job = SpanBuilder::from_name(format!("{} {model}", outcome.name())).with_start_time(begin);
        let job = job.with_attributes(attributes(model, outcome)).start_with_context(tracer, context);
        let context = context.with_span(job);
        let end = stages(tracer, &context, timings, at).unwrap_or(begin);
        context.span().end_with_timestamp(end);
    }

    /// Ends the request's span.
    pub fn end(&self, status: u16, id: &str, caller: &str) {
        let span = self.0.context.span();
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
        span.set_attribute(KeyValue::new("http.request.header.x-request-id", id.to_owned()));
        span.set_attribute(KeyValue::new("enduser.id", caller.to_owned()));
        if status >= 500 {
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

/// A span for each stage; when the last ended.
fn stages(tracer: &SdkTracer, job: &Context, timings: &Timings, at: impl Fn(Instant) -> SystemTime) -> Option<SystemTime> {
    let ends = timings.spans().map(|(stage, begin, time)| {
        let (begin, end) = (at(begin), at(begin) + time);
        let mut span = SpanBuilder::from_name(stage.name()).with_start_time(begin).start_with_context(tracer, job);
        span.end_with_timestamp(end);
        end
    });
    ends.max()
}

fn attributes(model: &str, outcome: &Outcome) -> Vec<KeyValue> {
    let mut all = vec![
        KeyValue::new("gen_ai.operation.name", outcome.name()),
        KeyValue::new("gen_ai.provider.name", "blip2"),
        KeyValue::new("gen_ai.request.model", model.to_owned()),
    ];
    if let Outcome::Written(answer) = outcome {
        all.push(KeyValue::new("gen_ai.usage.output_tokens", answer.tokens.len() as i64));
    }
    all
}

/// What all spans say of this process: its name and version, and what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES add.
fn resource() -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let builder = Resource::builder().with_attribute(version);
    if std::env::var_os("OTEL_SERVICE_NAME").is_some() { builder.build() } else { builder.with_service_name("blip2").build() }
}

/// A collector's address has a path of its own for traces, unless it names one.
fn of_traces(endpoint: &Url) -> String {
    let mut address = endpoint.clone();
    if address.path() == "/" {
        address.set_path("/v1/traces");
    }
    address.into()
}

/// Sends spans, and says once that it cannot, and once that it can again.
#[derive(Debug)]
struct Sender {
    agent: ureq::Agent,
    is_failing: AtomicBool,
}

impl Sender {
    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, ureq::Error> {
        let response = self.agent.run(request.map(|body| body.to_vec()))?;
        let (head, mut body) = response.into_parts();
        Ok(Response::from_parts(head, body.read_to_vec()?.into()))
    }

    fn tell(&self, why: Option<String>) {
        if self.is_failing.swap(why.is_some(), Ordering::Relaxed) != why.is_some() {
            match why {
                Some(why) => tracing::warn!(why, "traces cannot be sent; requests are answered as before"),
                None => tracing::info!("traces are sent again"),
            }
        }
    }
}

#[async_trait::async_trait]
impl HttpClient for Sender {
    /// Called on the thread of the exporter, which has nothing else to do.
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.send(request);
        self.tell(match &sent {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(format!("the collector answers {}", response.status())),
            Err(error) => Some(error.to_string()),
        });
        Ok(sent?)
    }
}
