//! What goes wrong with one of several pictures or texts, while the others are done.

use super::plain::plain;
use super::{Failure, chain};
use crate::error::Error;
use crate::text::shortened;

/// Failures that do not end a command: printed as they happen; the first decides the exit code.
#[derive(Default)]
pub(super) struct Failures(Option<Failure>);

/// A text that can be used.
pub(super) struct Sound<'t, T> {
    /// Its place among those that were typed, from 0.
    pub index: usize,
    pub text: &'t str,
    /// What the check made of it.
    pub read: T,
}

impl Failures {
    /// Prints a failure and goes on.
    pub fn note(&mut self, failure: Failure) {
        eprintln!("blip2: {}", chain(&failure));
        self.0.get_or_insert(failure);
    }

    /// How the command ends.
    pub fn end(self) -> Result<(), Failure> {
        self.0.map_or(Ok(()), |failure| Err(Failure::Reported(Box::new(failure))))
    }

    /// The texts that pass `check`; `kind` is what messages call them, `failed` what becomes of the others.
    pub fn sift<'t, T>(
        &mut self,
        kind: &'static str,
        texts: &'t [String],
        check: impl Fn(&str) -> Result<T, Error>,
        failed: impl Fn(usize, Failure) -> Failure,
    ) -> Vec<Sound<'t, T>> {
        sift(kind, texts, check, |index, failure| self.note(failed(index, failure)))
    }
}

/// The texts that pass `check`; `kind` is what messages call them, and `failed` hears of the others.
pub(super) fn sift<'t, T>(
    kind: &'static str,
    texts: &'t [String],
    check: impl Fn(&str) -> Result<T, Error>,
    mut failed: impl FnMut(usize, Failure),
) -> Vec<Sound<'t, T>> {
    let mut sound = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        match check(text) {
            Ok(read) => sound.push(Sound { index, text, read }),
            Err(source) => failed(index, of_text(kind, index, text, source)),
        }
    }
    sound
}

/// What is wrong with a text.
pub(super) fn of_text(kind: &'static str, index: usize, text: &str, source: Error) -> Failure {
    Failure::Text { kind, place: index + 1, text: plain(&shortened(text)).into_owned(), source: Box::new(source) }
}

/// The failure as it is.
pub(super) fn as_it_is(_: usize, failure: Failure) -> Failure {
    failure
}
