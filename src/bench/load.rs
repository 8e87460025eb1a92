//! Sends queries to a target and makes records of what comes back: a few at a time, or at the times of a schedule.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::record::Record;
use super::truths::{Truth, Truths};
use crate::decode::TokenId;
use crate::timing::milliseconds;

/// What answers queries: an engine in this process, or a server.
pub trait Target {
    /// Begins to answer; every part of it is told to `to`.
    fn send(&mut self, query: &Query, to: Told);
}

/// What is sent at a time.
#[derive(Clone, Debug)]
pub struct Query {
    /// Its place in the run, from 0.
    pub index: usize,
    /// Which of the inputs, one a picture.
    pub inputs: Vec<usize>,
}

/// How queries come.
#[derive(Clone, Debug)]
pub enum Load {
    /// As soon as one of so many has ended.
    Closed(usize),
    /// At these times from the start, whatever has ended.
    Open(Vec<Duration>),
}

/// How long queries are sent.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    /// Until so many were sent at least,
    pub queries: usize,
    /// and so much time has passed.
    pub time: Duration,
}

/// Takes what becomes of one query, on any thread.
#[derive(Clone)]
pub struct Told {
    index: usize,
    /// Of the picture, in the query.
    place: usize,
    to: Sender<News>,
}

/// What became of a picture of a query, and when.
struct News {
    index: usize,
    place: usize,
    at: Instant,
    what: What,
}

/// What becomes of one picture of a query.
#[derive(Clone, Debug)]
pub enum What {
    /// So many tokens were settled.
    Tokens(usize),
    /// So many were settled besides, nobody knows when.
    More(usize),
    /// Its end: what was written, and where the time went.
    Done {
        /// What was written or computed.
        output: Output,
        /// Stages as [`Record::stages_ms`] has them.
        stages_ms: Vec<(String, f64)>,
    },
    /// There is no answer.
    Failed(String),
}

/// What comes of a picture.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// What was written, or a digest of what was computed.
    pub text: String,
    /// The text's tokens, where they are told.
    pub tokens: Vec<TokenId>,
}

impl From<String> for Output {
    /// Of a target that tells no tokens.
    fn from(text: String) -> Self {
        Self { text, tokens: Vec::new() }
    }
}

impl Told {
    /// For one of the query's pictures, by its place from 0.
    pub fn about(&self, place: usize) -> Self {
        Self { place, ..self.clone() }
    }

    /// Notes it with the present time.
    pub fn tell(&self, what: What) {
        self.tell_at(Instant::now(), what);
    }

    /// Notes it with an earlier time.
    pub fn tell_at(&self, at: Instant, what: What) {
        // After a run that was stopped nobody listens.
        let _ = self.to.send(News { index: self.index, place: self.place, at, what });
    }
}

/// One run of a load.
pub struct Run<'a> {
    /// What answers.
    pub target: &'a mut dyn Target,
    /// Names of the inputs, which queries take in turn.
    pub inputs: &'a [String],
    /// Pictures in a query.
    pub n_pictures: usize,
    /// Set from outside, it ends the run after what is under way.
    pub stop: &'a AtomicBool,
    /// What is true of the inputs, as far as it is known.
    pub truths: Option<&'a Truths>,
    /// Is shown every record when its query has ended.
    pub on_record: &'a mut dyn FnMut(&Record),
}

struct Pending {
    record: Record,
    inputs: Vec<usize>,
    n_open: usize,
    last_token: Option<Instant>,
    /// Of each picture that has an answer.
    outputs: Vec<Option<Output>>,
}

struct Clock(Instant);

impl Clock {
    fn at(&self, instant: Instant) -> f64 {
        milliseconds(instant.saturating_duration_since(self.0))
    }
}

impl Run<'_> {
    /// Sends queries until `length` is reached, or the schedule ends, and waits for all of them. `warm_up` marks the records.
    pub fn go(&mut self, load: &Load, length: Length, warm_up: bool) -> Vec<Record> {
        let mut ended = Vec::new();
        self.each(load, length, warm_up, &mut |record| ended.push(record));
        ended
    }

    /// The same, where whoever takes the records need not keep them.
    pub fn each(&mut self, load: &Load, length: Length, warm_up: bool, take_over: &mut dyn FnMut(Record)) {
        let (to, told) = channel();
        let clock = Clock(Instant::now());
        let (mut pending, mut n_sent) = (HashMap::new(), 0);
        let mut schedule: VecDeque<Duration> = match load {
            Load::Open(schedule) => schedule.iter().copied().collect(),
            Load::Closed(_) => VecDeque::new(),
        };
        loop {
            while let Some(due) = self.due(load, length, &clock, (pending.len(), n_sent), &mut schedule) {
                let query = self.query(n_sent);
                pending.insert(n_sent, Pending::new(&query, self.inputs, clock.at(due), warm_up));
                let told = Told { index: n_sent, place: 0, to: to.clone() };
                pending.get_mut(&n_sent).expect("it was put there").record.sent_ms = clock.at(Instant::now());
                self.target.send(&query, told);
                n_sent += 1;
            }
            let next = schedule.front().filter(|_| !self.is_stopped()).map(|at| clock.0 + *at);
            if pending.is_empty() && next.is_none() {
                return;
            }
            if let Some(news) = wait(&told, next)
                && let Some(query) = take(&mut pending, news, &clock)
            {
                let record = query.end(self.truths);
                (self.on_record)(&record);
                take_over(record);
            }
        }
    }

    /// Whether it was stopped from outside.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// When the next query was due, if it is.
    fn due(
        &self,
        load: &Load,
        length: Length,
        clock: &Clock,
        (n_pending, n_sent): (usize, usize),
        schedule: &mut VecDeque<Duration>,
    ) -> Option<Instant> {
        let now = Instant::now();
        if self.is_stopped() {
            return None;
        }
        match load {
            Load::Closed(n) => {
                let goes_on = n_sent < length.queries || now - clock.0 < length.time;
                (n_pending < *n && goes_on).then_some(now)
            }
            Load::Open(_) => {
                let due = clock.0 + *schedule.front()?;
                (due <= now).then(|| schedule.pop_front()).map(|_| due)
            }
        }
    }

    fn query(&self, index: usize) -> Query {
        let first = index * self.n_pictures;
        Query { index, inputs: (first..first + self.n_pictures).map(|i| i % self.inputs.len()).collect() }
    }
}

/// What comes next, at the latest until `next`.
fn wait(told: &Receiver<News>, next: Option<Instant>) -> Option<News> {
    // A stop from outside is seen this soon.
    let limit = next
        .map_or(Duration::from_millis(50), |next| next.saturating_duration_since(Instant::now()).min(Duration::from_millis(50)));
    match told.recv_timeout(limit) {
        Ok(found) => Some(found),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => unreachable!("`go` holds a sender"),
    }
}

/// The query, once it has ended.
fn take(pending: &mut HashMap<usize, Pending>, news: News, clock: &Clock) -> Option<Pending> {
    let (index, query) = (news.index, pending.get_mut(&news.index)?);
    query.take(news, clock);
    (query.n_open == 0).then(|| pending.remove(&index).expect("it is there"))
}

impl Pending {
    fn new(query: &Query, inputs: &[String], due: f64, warm_up: bool) -> Self {
        let names: Vec<&str> = query.inputs.iter().map(|input| inputs[*input].as_str()).collect();
        let n_pictures = names.len();
        let record =
            Record { index: query.index, warm_up, input: names.join(" "), n_pictures, scheduled_ms: due, ..Record::default() };
        Self { record, inputs: query.inputs.clone(), n_open: n_pictures, last_token: None, outputs: vec![None; n_pictures] }
    }

    fn take(&mut self, News { place, at, what, .. }: News, clock: &Clock) {
        let record = &mut self.record;
        match what {
            What::Tokens(n) => {
                record.n_tokens += n;
                match self.last_token.replace(at) {
                    Some(last) => record.gaps_ms.push(milliseconds(at.saturating_duration_since(last))),
                    None => record.first_token_ms = Some(clock.at(at)),
                }
            }
            What::More(n) => record.n_tokens += n,
            What::Done { output, stages_ms } => {
                // Of several pictures the stages overlap, so that no sum of them is the query's time.
                record.stages_ms = if record.n_pictures == 1 { stages_ms } else { Vec::new() };
                self.outputs[place] = Some(output);
                self.n_open -= 1;
            }
            What::Failed(why) => {
                record.error.get_or_insert(why);
                self.n_open -= 1;
            }
        }
        record.done_ms = clock.at(at);
    }

    fn end(self, truths: Option<&Truths>) -> Record {
        let answers = || self.inputs.iter().zip(&self.outputs).filter_map(|(input, output)| Some((*input, output.as_ref()?)));
        let known = answers().filter_map(|(input, output)| truths?.holds(input, &output.text));
        let truth = Truth::of(known);
        let output = answers().map(|(_, output)| output.text.as_str()).collect::<Vec<_>>().join("\n");
        let tokens = answers().map(|(_, output)| output.tokens.clone()).filter(|tokens| !tokens.is_empty()).collect();
        Record { output, tokens, truth, ..self.record }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use rand_distr::{Distribution, StandardNormal};

    use super::super::statistics::{PERCENTILES, Percentile, Sample};
    use super::*;

    /// Answers one query after another, each in its time.
    struct Synthetic {
        line: Sender<(Duration, Told)>,
    }

    impl Synthetic {
        fn new() -> Self {
            let (line, queries) = channel::<(Duration, Told)>();
            std::thread::spawn(move || {
                for (time, told) in queries {
                    std::thread::sleep(time);
                    told.tell(What::Tokens(1));
                    told.tell(What::Done { output: "text".to_owned().into(), stages_ms: Vec::new() });
                }
            });
            Self { line }
        }
    }

    /// How long each query takes.
    struct Timed(Synthetic, fn(usize) -> u64);

    impl Target for Timed {
        fn send(&mut self, query: &Query, to: Told) {
            let time = Duration::from_micros(self.1(query.index));
            query.inputs.iter().for_each(|_| self.0.line.send((time, to.clone())).expect("the thread lives"));
        }
    }

    fn go(load: &Load, length: Length, time: fn(usize) -> u64, n_pictures: usize) -> Vec<Record> {
        let (stop, inputs) = (AtomicBool::new(false), ["a".to_owned(), "b".to_owned(), "c".to_owned()]);
        let mut target = Timed(Synthetic::new(), time);
        Run { target: &mut target, inputs: &inputs, n_pictures, stop: &stop, truths: None, on_record: &mut |_| {} }
            .go(load, length, false)
    }

    #[test]
    fn a_closed_load_sends_the_next_when_one_has_ended() {
        let found = go(&Load::Closed(1), Length { queries: 20, time: Duration::ZERO }, |_| 2_000, 1);
        assert_eq!(found.len(), 20);
        for pair in found.windows(2) {
            assert!(pair[1].sent_ms >= pair[0].done_ms, "{pair:?}");
        }
        assert!(found.iter().all(|record| record.latency_ms() >= 2.0 && record.n_tokens == 1));
    }

    #[test]
    fn a_schedule_does_not_wait_and_latency_counts_from_it() {
        let schedule = (0..50).map(|i| Duration::from_millis(i * 4)).collect();
        // The tenth holds up the line for 60 ms.
        let found =
            go(&Load::Open(schedule), Length { queries: 0, time: Duration::ZERO }, |i| if i == 10 { 60_000 } else { 500 }, 1);
        assert_eq!(found.len(), 50);
        let behind = &found[11];
        assert!(behind.latency_ms() > 50.0, "{behind:?}");
        // Had it waited for answers, all behind the tenth would be late; a busy machine delays a few.
        assert!(found.iter().filter(|record| record.lag_ms() < 20.0).count() > 40, "{found:?}");
    }

    #[test]
    fn a_query_of_several_pictures_ends_with_the_last() {
        let found = go(&Load::Closed(1), Length { queries: 2, time: Duration::ZERO }, |_| 1_000, 4);
        assert_eq!((found[0].n_pictures, found[0].n_tokens, found[1].input.as_str()), (4, 4, "b c a b"));
        assert!(found[0].latency_ms() >= 4.0);
    }

    #[test]
    fn a_stop_from_outside_keeps_what_was_measured() {
        let (stop, inputs) = (AtomicBool::new(false), ["a".to_owned()]);
        let mut target = Timed(Synthetic::new(), |_| 1_000);
        let mut n = 0;
        let mut on_record = |_: &Record| {
            n += 1;
            stop.store(n == 3, Ordering::Relaxed);
        };
        let mut run =
            Run { target: &mut target, inputs: &inputs, n_pictures: 1, stop: &stop, truths: None, on_record: &mut on_record };
        let found = run.go(&Load::Closed(1), Length { queries: 1_000, time: Duration::ZERO }, true);
        assert!((3..=4).contains(&found.len()), "{}", found.len());
        assert!(found[0].warm_up);
    }

    /// Is done with each query at a known time, whatever the machine is busy with.
    struct Known<F>(F);

    impl<F: FnMut(&Query, Instant) -> Instant> Target for Known<F> {
        fn send(&mut self, query: &Query, to: Told) {
            let end = (self.0)(query, Instant::now());
            to.tell_at(end, What::Done { output: "text".to_owned().into(), stages_ms: Vec::new() });
        }
    }

    fn latencies(target: &mut dyn Target, load: &Load, queries: usize) -> Sample {
        let (stop, inputs) = (AtomicBool::new(false), ["a".to_owned()]);
        let length = Length { queries, time: Duration::ZERO };
        let mut run = Run { target, inputs: &inputs, n_pictures: 1, stop: &stop, truths: None, on_record: &mut |_| {} };
        Sample::new(run.go(load, length, false).iter().map(Record::latency_ms))
    }

    #[test]
    fn intervals_hold_the_percentiles_of_an_engine_that_is_known() {
        // Lognormal, as latencies are: a median of 50 ms, and what lies that many deviations above it.
        let latency = |deviations: f64| 50.0 * (0.4 * deviations).exp();
        let truth = [0.0, 1.281_551_565_5, 1.644_853_627, 2.326_347_874, 3.090_232_306].map(latency);
        let (mut random, n_runs, mut n_held) = (StdRng::seed_from_u64(0), 200, [0; 5]);
        for _ in 0..n_runs {
            let mut engine = Known(|_: &Query, sent: Instant| {
                let deviations: f64 = StandardNormal.sample(&mut random);
                sent + Duration::from_secs_f64(latency(deviations) / 1e3)
            });
            let found = latencies(&mut engine, &Load::Closed(4), 700);
            for ((rank, truth), n_held) in PERCENTILES.into_iter().zip(truth).zip(&mut n_held) {
                let Percentile { interval: [low, high], certified, .. } = found.percentile(rank);
                // Of 700 values none need lie beyond 99.9 %: then the interval ends with the largest.
                let is_open = certified.is_none() && high == found.percentile(100.0).value;
                *n_held += usize::from(low <= truth && (truth <= high || is_open));
            }
        }
        assert!(n_held.iter().all(|n_held| *n_held >= n_runs * 93 / 100), "of {n_runs}: {n_held:?}");
    }

    #[test]
    fn a_stall_of_a_second_shows_in_the_percentiles_of_a_schedule() {
        // One query every 5 ms for 3 s, one after another in 2 ms; at 1 s the engine stands still until 2 s.
        let schedule: Vec<_> = (0..600).map(|i| Duration::from_millis(i * 5)).collect();
        let (start, mut free) = (Instant::now(), Instant::now());
        let stall = [1.0, 2.0].map(|second| start + Duration::from_secs_f64(second));
        let mut engine = Known(|_: &Query, sent: Instant| {
            let begin = sent.max(free);
            let begin = if begin > stall[0] { begin.max(stall[1]) } else { begin };
            free = begin + Duration::from_millis(2);
            free
        });
        let found = latencies(&mut engine, &Load::Open(schedule), 0);
        // 200 came meanwhile and waited a second less what had passed of it, and those that came until the line was empty.
        let [p50, p99, max] = [50.0, 99.0, 100.0].map(|rank| found.percentile(rank).value);
        assert!((950.0..1_050.0).contains(&p99) && max < 1_100.0 && p50 > 100.0, "{p50} {p99} {max}");
    }
}
