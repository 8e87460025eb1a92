//! How long each stage took. Recorded always, returned with every answer; the command line, JSON and servers all read the same.

use std::time::{Duration, Instant};

use serde::ser::{Serialize, SerializeMap, Serializer};

/// A part of the way from bytes to text, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// In line, until somebody had time for the picture.
    Queue,
    /// Bytes → RGB.
    DecodeImage,
    /// RGB → normalised pixels.
    Preprocess,
    /// Image encoder.
    Vision,
    /// Q-Former and projection.
    Qformer,
    /// Pictures beside texts in the Q-Former of stage 1.
    Match,
    /// The text in front of the answer → token ids.
    Prompt,
    /// In line, until the language model had room and time.
    Waiting,
    /// Language model over query tokens and prompt, up to the first token.
    Prefill,
    /// Language model, one token at a time, up to the text.
    Decode,
}

impl Stage {
    /// The key in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::DecodeImage => "decode_image",
            Self::Preprocess => "preprocess",
            Self::Vision => "vision",
            Self::Qformer => "qformer",
            Self::Match => "match",
            Self::Prompt => "prompt",
            Self::Waiting => "waiting",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// Time per stage; a stage that ran several times is summed, one that did not run is absent. Serialises as milliseconds.
#[derive(Clone, Debug, Default)]
pub struct Timings(Vec<Span>);

/// A stage that ran.
#[derive(Clone, Copy, Debug)]
struct Span {
    stage: Stage,
    /// When it began first.
    begin: Instant,
    /// All its time.
    time: Duration,
}

impl Timings {
    /// Runs `work` and adds its time to `stage`.
    pub fn time<T>(&mut self, stage: Stage, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = work();
        self.add(stage, start, start.elapsed());
        done
    }

    /// Adds to a stage what began then.
    pub fn add(&mut self, stage: Stage, begin: Instant, time: Duration) {
        match self.0.binary_search_by_key(&(stage as usize), |span| span.stage as usize) {
            Ok(place) => {
                let span = &mut self.0[place];
                *span = Span { stage, begin: span.begin.min(begin), time: span.time + time };
            }
            Err(place) => self.0.insert(place, Span { stage, begin, time }),
        }
    }

    /// Adds every stage of `other`.
    pub fn merge(&mut self, other: &Self) {
        for (stage, begin, time) in other.spans() {
            self.add(stage, begin, time);
        }
    }

    /// The stages that ran, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Stage, Duration)> {
        self.spans().map(|(stage, _, time)| (stage, time))
    }

    /// The stages that ran, in order, with when each began first.
    pub fn spans(&self) -> impl Iterator<Item = (Stage, Instant, Duration)> {
        self.0.iter().map(|&Span { stage, begin, time }| (stage, begin, time))
    }

    /// All stages together.
    pub fn total(&self) -> Duration {
        self.iter().map(|(_, time)| time).sum()
    }
}

impl Serialize for Timings {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        for (stage, time) in self.iter() {
            map.serialize_entry(stage.name(), &milliseconds(time))?;
        }
        map.serialize_entry("total", &milliseconds(self.total()))?;
        map.end()
    }
}

/// Rounded to microseconds.
pub fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_in_order_summed_and_begin_with_the_first() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let (mut timings, mut other) = (Timings::default(), Timings::default());
        timings.add(Stage::Decode, start + 4 * second, second);
        timings.add(Stage::Queue, start + second, second);
        other.add(Stage::Queue, start, second);
        other.add(Stage::Vision, start + 2 * second, 2 * second);
        timings.merge(&other);
        let found: Vec<_> = timings.spans().map(|(stage, begin, time)| (stage, begin - start, time)).collect();
        let zero = Duration::ZERO;
        assert_eq!(
            found,
            [(Stage::Queue, zero, 2 * second), (Stage::Vision, 2 * second, 2 * second), (Stage::Decode, 4 * second, second)]
        );
        assert_eq!(timings.total(), 5 * second);
    }
}
