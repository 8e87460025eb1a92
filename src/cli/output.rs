//! What a text looks like on standard output.

use std::borrow::Cow;
use std::io::{IsTerminal, StdoutLock, Write as _, stdout};
use std::path::Path;

use serde::Serialize;

use super::args::Show;
use super::plain::plain;
use crate::engine::{Answer, Candidate, TokenLogProb};
use crate::text::Warning;
use crate::timing::{Stage, Timings, milliseconds};

/// One line of `--json`. README.md documents the keys.
#[derive(Serialize)]
pub(super) struct Line<'a> {
    pub image: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub question: Option<&'a str>,
    pub text: &'a str,
    pub tokens: &'a [u32],
    pub finish_reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub candidates: &'a [Candidate],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub log_probs: &'a [TokenLogProb],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub warnings: &'a [Warning],
    pub timings_ms: &'a Timings,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub token_gaps_ms: Vec<f64>,
}

/// Standard output with the form that was asked for.
pub(super) struct Printer<'a> {
    show: &'a Show,
    out: StdoutLock<'static>,
    /// What was said on standard error, and is not said again.
    warned: Vec<Warning>,
    pub streams: bool,
}

impl<'a> Printer<'a> {
    pub fn new(show: &'a Show) -> Self {
        Self { show, out: stdout().lock(), warned: Vec::new(), streams: stdout().is_terminal() && !show.json }
    }

    /// One result that is complete: as JSON, or as the text that `plain` writes.
    pub fn row(&mut self, row: &impl Serialize, plain: &str, timings: &Timings) -> std::io::Result<()> {
        if self.show.json {
            serde_json::to_writer(&mut self.out, row)?;
            writeln!(self.out)?;
        } else {
            writeln!(self.out, "{}", self::plain(plain))?;
        }
        self.out.flush()?;
        if self.show.timings {
            self.timings(timings, None);
        }
        Ok(())
    }

    /// Warns of what was not warned of before.
    pub fn warn(&mut self, warnings: &[Warning]) {
        for warning in warnings {
            if !self.warned.contains(warning) {
                warn(std::slice::from_ref(warning));
                self.warned.push(warning.clone());
            }
        }
    }

    /// Shows a piece of a text as it comes, where it is shown so.
    pub fn piece(&mut self, piece: &str) -> std::io::Result<()> {
        if !self.streams || piece.is_empty() {
            return Ok(());
        }
        self.out.write_all(plain(piece).as_bytes())?;
        self.out.flush()
    }

    /// A finished text; of a streamed one only the end of the line is missing.
    pub fn finish(&mut self, label: &str, line: &Line<'_>) -> std::io::Result<()> {
        if self.show.json {
            serde_json::to_writer(&mut self.out, line)?;
            writeln!(self.out)?;
        } else {
            let first = if self.streams { String::new() } else { format!("{label}{}", line.text) };
            writeln!(self.out, "{}", plain(&first))?;
            for candidate in line.candidates.iter().skip(1) {
                writeln!(self.out, "{}", plain(&format!("{label}{}", candidate.text)))?;
            }
        }
        self.out.flush()?;
        self.warn(line.warnings);
        if self.show.timings {
            self.timings(line.timings_ms, Some(line.tokens.len()));
        }
        Ok(())
    }

    fn timings(&self, timings: &Timings, n_tokens: Option<usize>) {
        for (stage, time) in timings.iter() {
            let written = n_tokens.filter(|_| stage == Stage::Decode);
            let each = written.map_or(String::new(), |n_tokens| format!("  {n_tokens} tokens"));
            eprintln!("{:>14} {:9.2} ms{each}", stage.name(), time.as_secs_f64() * 1e3);
        }
        eprintln!("{:>14} {:9.2} ms", "total", timings.total().as_secs_f64() * 1e3);
    }
}

impl<'a> Line<'a> {
    pub fn new(image: &'a Path, question: Option<&'a str>, answer: &'a Answer) -> Self {
        Self {
            image: image.to_string_lossy(),
            question,
            text: &answer.text,
            tokens: &answer.tokens,
            finish_reason: answer.finish.to_string(),
            score: answer.score,
            candidates: &answer.candidates,
            log_probs: &answer.log_probs,
            warnings: &answer.warnings,
            timings_ms: &answer.timings,
            first_token_ms: answer.first_token.map(milliseconds),
            token_gaps_ms: answer.gaps.iter().copied().map(milliseconds).collect(),
        }
    }
}

/// Says on standard error what of a text is not read as it stands.
pub(super) fn warn(warnings: &[Warning]) {
    for warning in warnings {
        eprintln!("blip2: warning: {}", plain(&warning.to_string()));
    }
}
