//! What Prometheus is told.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::worker::{State, Worker};
use crate::bench::environment::resident_bytes;
use crate::service::{Outcome, Watch};
use crate::timing::Timings;

/// From a tenth of a millisecond to a minute and a half, so that a page of a demo and an answer of a large model both have their place.
const SECONDS: [f64; 18] =
    [1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 90.0];
const COUNTS: [f64; 10] = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0];

/// All there is, of every model.
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    rejected: Family<ReasonLabels, Counter>,
    latency: Family<RouteLabels, Histogram>,
    of_models: Families,
}

/// Of one model.
pub struct ModelMetrics {
    queue: Histogram,
    first_token: Histogram,
    between_tokens: Histogram,
    pictures: Histogram,
    texts: Histogram,
    tokens: Counter,
    stages: Family<StageLabels, Histogram>,
    model: String,
}

struct Families {
    ready: Family<ModelLabels, Gauge>,
    in_hand: Family<ModelLabels, Gauge>,
    waiting: Family<ModelLabels, Gauge>,
    hits: Family<ModelLabels, Gauge>,
    misses: Family<ModelLabels, Gauge>,
    kept: Family<ModelLabels, Gauge>,
    queue: Family<ModelLabels, Histogram>,
    first_token: Family<ModelLabels, Histogram>,
    between_tokens: Family<ModelLabels, Histogram>,
    stages: Family<StageLabels, Histogram>,
    pictures: Family<ModelLabels, Histogram>,
    texts: Family<ModelLabels, Histogram>,
    tokens: Family<ModelLabels, Counter>,
    memory: Gauge,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteLabels {
    route: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ModelLabels {
    model: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StageLabels {
    model: String,
    stage: &'static str,
}

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

fn counts() -> Histogram {
    Histogram::new(COUNTS)
}

impl Metrics {
    /// Nothing has happened yet.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let requests = Family::<RequestLabels, Counter>::default();
        let rejected = Family::<ReasonLabels, Counter>::default();
        let latency = Family::<RouteLabels, Histogram>::new_with_constructor(seconds);
        registry.register("blip2_requests", "Requests that were answered, by route and status", requests.clone());
        registry.register("blip2_requests_rejected", "Requests that were refused, by reason", rejected.clone());
        registry.register("blip2_e2e_request_latency_seconds", "From a request's head to the end of its answer", latency.clone());
        let of_models = Families::register(&mut registry);
        Self { registry, requests, rejected, latency, of_models }
    }

    /// Of a model, which may have been counted before.
    pub fn model(&self, name: &str) -> ModelMetrics {
        let (families, labels) = (&self.of_models, ModelLabels { model: name.to_owned() });
        ModelMetrics {
            queue: families.queue.get_or_create(&labels).clone(),
            first_token: families.first_token.get_or_create(&labels).clone(),
            between_tokens: families.between_tokens.get_or_create(&labels).clone(),
            pictures: families.pictures.get_or_create(&labels).clone(),
            texts: families.texts.get_or_create(&labels).clone(),
            tokens: families.tokens.get_or_create(&labels).clone(),
            stages: families.stages.clone(),
            model: labels.model,
        }
    }

    /// A request was answered.
    pub fn answered(&self, route: &str, status: u16, time: Duration) {
        self.requests.get_or_create(&RequestLabels { route: route.to_owned(), status }).inc();
        self.latency.get_or_create(&RouteLabels { route: route.to_owned() }).observe(time.as_secs_f64());
    }

    /// A request was refused.
    pub fn refused(&self, reason: &'static str) {
        self.rejected.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Everything in the text form of OpenMetrics, with what workers say of themselves now.
    pub fn text<'a>(&self, workers: impl Iterator<Item = &'a Worker>) -> String {
        workers.for_each(|worker| self.of_models.look_at(worker));
        self.of_models.memory.set(resident_bytes().unwrap_or(0) as i64);
        let mut text = String::new();
        // Into a string nothing fails.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// OpenMetrics' text in Prometheus' older form: there the name of a counter ends as those of its samples do, and nothing marks the end.
pub fn plain(text: &str) -> String {
    let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"));
    let counters: Vec<String> = names.map(|name| format!("{name} ")).collect();
    let line = |line: &str| {
        let about = line.split_at_checked("# TYPE ".len()).filter(|(start, _)| ["# TYPE ", "# HELP "].contains(start));
        let counter = about.and_then(|(_, rest)| counters.iter().find(|name| rest.starts_with(*name)));
        match (about, counter) {
            (Some((start, rest)), Some(name)) => format!("{start}{}_total{}\n", name.trim_end(), &rest[name.len() - 1..]),
            _ => format!("{line}\n"),
        }
    };
    text.lines().filter(|line| *line != "# EOF").map(line).collect()
}

impl Families {
    fn register(registry: &mut Registry) -> Self {
        let families = Self {
            ready: Family::default(),
            in_hand: Family::default(),
            waiting: Family::default(),
            hits: Family::default(),
            misses: Family::default(),
            kept: Family::default(),
            queue: Family::new_with_constructor(seconds),
            first_token: Family::new_with_constructor(seconds),
            between_tokens: Family::new_with_constructor(seconds),
            stages: Family::new_with_constructor(seconds),
            pictures: Family::new_with_constructor(counts),
            texts: Family::new_with_constructor(counts),
            tokens: Family::default(),
            memory: Gauge::default(),
        };
        families.register_gauges(registry);
        families.register_times(registry);
        families
    }

    fn register_gauges(&self, registry: &mut Registry) {
        registry.register("blip2_model_ready", "Whether a model answers", self.ready.clone());
        registry.register("blip2_num_requests_running", "Texts and pictures in hand", self.in_hand.clone());
        registry.register("blip2_num_requests_waiting", "Of them, those that nobody works on yet", self.waiting.clone());
        registry.register("blip2_image_cache_hits", "Pictures whose features were kept", self.hits.clone());
        registry.register("blip2_image_cache_misses", "Pictures whose features were not kept", self.misses.clone());
        registry.register("blip2_image_cache_bytes", "Memory of kept features", self.kept.clone());
        registry.register("process_resident_memory_bytes", "Resident memory", self.memory.clone());
    }

    fn register_times(&self, registry: &mut Registry) {
        registry.register("blip2_request_queue_time_seconds", "In line, before anything was done", self.queue.clone());
        registry.register("blip2_time_to_first_token_seconds", "From joining the language model", self.first_token.clone());
        registry.register("blip2_inter_token_latency_seconds", "From a settled token to the next", self.between_tokens.clone());
        registry.register("blip2_stage_seconds", "Stages of a request", self.stages.clone());
        registry.register("blip2_vision_batch_size", "Pictures that were looked at in one run", self.pictures.clone());
        registry.register("blip2_decode_batch_size", "Texts that were live after a step", self.texts.clone());
        registry.register("blip2_generation_tokens", "Tokens that were written", self.tokens.clone());
    }

    fn look_at(&self, worker: &Worker) {
        let labels = ModelLabels { model: worker.name().to_owned() };
        let set = |family: &Family<ModelLabels, Gauge>, value: u64| {
            family.get_or_create(&labels).set(value as i64);
        };
        set(&self.ready, matches!(worker.now(), State::Ready(_)).into());
        set(&self.in_hand, worker.n_in_hand() as u64);
        set(&self.waiting, worker.n_waiting() as u64);
        let kept = worker.kept();
        set(&self.hits, kept.hits);
        set(&self.misses, kept.misses);
        set(&self.kept, kept.bytes);
    }
}

impl ModelMetrics {
    /// What came of a job.
    pub fn ended(&self, outcome: &Outcome) {
        self.staged(outcome.timings());
        if let Outcome::Written(answer) = outcome {
            self.tokens.inc_by(answer.tokens.len() as u64);
            if let Some(first) = answer.first_token {
                self.first_token.observe(first.as_secs_f64());
            }
            answer.gaps.iter().for_each(|gap| self.between_tokens.observe(gap.as_secs_f64()));
        }
    }

    fn staged(&self, timings: &Timings) {
        for (stage, time) in timings.iter() {
            if stage == crate::timing::Stage::Queue {
                self.queue.observe(time.as_secs_f64());
            }
            let labels = StageLabels { model: self.model.clone(), stage: stage.name() };
            self.stages.get_or_create(&labels).observe(time.as_secs_f64());
        }
    }
}

impl Watch for ModelMetrics {
    fn looked(&self, n_pictures: usize, _: Duration) {
        self.pictures.observe(n_pictures as f64);
    }

    fn stepped(&self, n_live: usize, _: Duration) {
        self.texts.observe(n_live as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_the_names_of_their_samples_in_the_plain_form() {
        let open = "# HELP a Says # TYPE.\n# TYPE a counter\na_total{b=\"c\"} 1\n# HELP ab Other.\n# TYPE ab gauge\nab 2\n# EOF\n";
        let wanted =
            "# HELP a_total Says # TYPE.\n# TYPE a_total counter\na_total{b=\"c\"} 1\n# HELP ab Other.\n# TYPE ab gauge\nab 2\n";
        assert_eq!(plain(open), wanted);
    }
}
