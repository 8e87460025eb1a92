//! What happened to one query: when it was due, sent, answered, and where its time went. Everything reported is made of these.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::truths::Truth;
use crate::decode::TokenId;
use crate::timing::{Timings, milliseconds};

/// One query. Times are milliseconds from the start of the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    /// Its place in the schedule, from 0.
    pub index: usize,
    /// Whether it came before the measurement began to count.
    #[serde(default)]
    pub warm_up: bool,
    /// What it was about: a picture's name, with the question if there is one.
    pub input: String,
    /// Pictures in it.
    pub n_pictures: usize,
    /// When it was due. Latency counts from here.
    pub scheduled_ms: f64,
    /// When it was sent.
    pub sent_ms: f64,
    /// When its first token, or several at once, were settled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<f64>,
    /// From each settled token to the next.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gaps_ms: Vec<f64>,
    /// When all of it was there.
    pub done_ms: f64,
    /// Tokens that were written, end tokens included.
    pub n_tokens: usize,
    /// Where the time from `sent_ms` to `done_ms` went, in order, as far as the engine tells.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages_ms: Vec<(String, f64)>,
    /// What was written, or a digest of what was computed.
    pub output: String,
    /// The tokens of each picture's text, end tokens included, where the engine tells them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<Vec<TokenId>>,
    /// How many of its answers are true, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truth: Option<Truth>,
    /// Why there is no answer, if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Record {
    /// From when it was due to its end: what somebody who waits for it sees, whether or not it could be sent in time.
    pub fn latency_ms(&self) -> f64 {
        self.done_ms - self.scheduled_ms
    }

    /// From when it was due to its first token.
    pub fn time_to_first_token_ms(&self) -> Option<f64> {
        Some(self.first_token_ms? - self.scheduled_ms)
    }

    /// From the first token to the last, by those behind the first; none where all were settled at once, as beam search does.
    pub fn time_per_output_token_ms(&self) -> Option<f64> {
        let behind_first = self.n_tokens.checked_sub(1).filter(|n| *n > 0 && !self.gaps_ms.is_empty())?;
        Some(self.gaps_ms.iter().sum::<f64>() / behind_first as f64)
    }

    /// How late it was sent.
    pub fn lag_ms(&self) -> f64 {
        self.sent_ms - self.scheduled_ms
    }

    /// What no stage accounts for.
    pub fn unaccounted_ms(&self) -> f64 {
        self.done_ms - self.sent_ms - self.stages_ms.iter().map(|(_, time)| time).sum::<f64>()
    }

    /// Whether it has an answer.
    pub fn is_answered(&self) -> bool {
        self.error.is_none()
    }
}

/// The engine's stages as a record has them.
pub fn stages(timings: &Timings) -> Vec<(String, f64)> {
    timings.iter().map(|(stage, time)| (stage.name().to_owned(), milliseconds(time))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            scheduled_ms: 100.0,
            sent_ms: 150.0,
            first_token_ms: Some(170.0),
            gaps_ms: vec![5.0, 7.0],
            done_ms: 183.0,
            n_tokens: 3,
            stages_ms: vec![("vision".into(), 15.0), ("prefill".into(), 5.0), ("decode".into(), 12.0)],
            ..Record::default()
        }
    }

    #[test]
    fn latency_counts_from_when_a_query_was_due() {
        let record = record();
        assert_eq!((record.latency_ms(), record.time_to_first_token_ms(), record.lag_ms()), (83.0, Some(70.0), 50.0));
    }

    #[test]
    fn time_per_token_leaves_out_the_first() {
        assert_eq!(record().time_per_output_token_ms(), Some(6.0));
        assert_eq!(Record { n_tokens: 1, gaps_ms: Vec::new(), ..record() }.time_per_output_token_ms(), None);
    }

    #[test]
    fn what_no_stage_accounts_for_is_left_over() {
        assert!((record().unaccounted_ms() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_line_of_json_comes_back() {
        let line = serde_json::to_string(&record()).expect("a record is JSON");
        assert_eq!(serde_json::from_str::<Record>(&line).expect("it was written here"), record());
    }
}
