//! What a text looks like on standard output.

use std::borrow::Cow;
use std::io::{IsTerminal, StdoutLock, Write as _, stdout};
use std::path::Path;

use serde::Serialize;

use super::args::Write;
use super::{Failure, chain};
use crate::engine::{Answer, Candidate, Generation};
use crate::pixels::{Limits, Picture};
use crate::timing::{Stage, Timings};

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
    pub timings_ms: &'a Timings,
}

/// Standard output with the form that was asked for.
pub(super) struct Printer<'a> {
    write: &'a Write,
    out: StdoutLock<'static>,
    pub streams: bool,
}

impl<'a> Printer<'a> {
    pub fn new(write: &'a Write) -> Self {
        Self { write, out: stdout().lock(), streams: stdout().is_terminal() && !write.json }
    }

    /// Text in front of a streamed line.
    pub fn begin(&mut self, label: &str) -> std::io::Result<()> {
        write!(self.out, "{label}")?;
        self.out.flush()
    }

    /// A piece of a streamed line.
    pub fn piece(&mut self, piece: &str) -> std::io::Result<()> {
        self.out.write_all(piece.as_bytes())?;
        self.out.flush()
    }

    /// A finished text; of a streamed one only the end of the line is missing.
    pub fn finish(&mut self, label: &str, line: &Line<'_>) -> std::io::Result<()> {
        if self.write.json {
            serde_json::to_writer(&mut self.out, line)?;
            writeln!(self.out)?;
        } else {
            let first = if self.streams { String::new() } else { format!("{label}{}", line.text) };
            writeln!(self.out, "{first}")?;
            for candidate in line.candidates.iter().skip(1) {
                writeln!(self.out, "{label}{}", candidate.text)?;
            }
        }
        self.out.flush()?;
        if self.write.timings {
            self.timings(line.timings_ms, line.tokens.len());
        }
        Ok(())
    }

    fn timings(&self, timings: &Timings, n_tokens: usize) {
        for (stage, time) in timings.iter() {
            let each = if stage == Stage::Decode { format!("  {n_tokens} tokens") } else { String::new() };
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
            timings_ms: &answer.timings,
        }
    }
}

/// Opens a picture, `-` from standard input, and times it.
pub(super) fn picture(path: &Path, limits: &Limits) -> Result<(Picture, Timings), Failure> {
    let mut timings = Timings::default();
    let opened = timings.time(Stage::DecodeImage, || {
        if path == Path::new("-") { Picture::read(std::io::stdin().lock(), limits) } else { Picture::open(path, limits) }
    });
    match opened {
        Ok(picture) => Ok((picture, timings)),
        Err(source) => Err(Failure::Picture { path: path.to_path_buf(), source }),
    }
}

/// What was typed, ready for the engine.
pub(super) fn options(write: &Write) -> Result<(Generation, Limits), Failure> {
    Ok((Generation::try_from(write)?, Limits::from(write)))
}

/// Goes through a list to its end; failures are printed as they happen, and the first of them decides how the command ends.
/// Output that cannot be written ends it at once.
pub(super) fn each<T>(items: &[T], mut work: impl FnMut(&T) -> Result<(), Failure>) -> Result<(), Failure> {
    let mut first = None;
    for item in items {
        match work(item) {
            Ok(()) => {}
            Err(failure @ Failure::Output(_)) => return Err(failure),
            Err(failure) => {
                eprintln!("blip2: {}", chain(&failure));
                first.get_or_insert(failure);
            }
        }
    }
    first.map_or(Ok(()), |failure| Err(Failure::Reported(Box::new(failure))))
}
