//! An engine in this process as a target.

use std::ops::ControlFlow;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::load::{Output, Query, Target, Told, What};
use super::record;
use crate::bundle::hexadecimal;
use crate::pixels::Limits;
use crate::service::{Job, Outcome, Progress, Service, Source, Terms, Want};

/// A service with the pictures that queries are about, and what is wanted of each.
pub struct Local {
    service: Service,
    pictures: Vec<Arc<[u8]>>,
    wants: Vec<Want>,
}

impl Local {
    /// Pictures are encoded; of each of them one thing is wanted.
    pub fn new(service: Service, inputs: Vec<(Arc<[u8]>, Want)>) -> Self {
        let (pictures, wants) = inputs.into_iter().unzip();
        Self { service, pictures, wants }
    }
}

impl Target for Local {
    fn send(&mut self, query: &Query, to: Told) {
        for (place, input) in query.inputs.iter().enumerate() {
            let (picture, want, told) = (self.pictures[*input].clone(), self.wants[*input].clone(), to.about(place));
            let tell = Box::new(move |progress: Progress<'_>| {
                told.tell(what(progress));
                ControlFlow::Continue(())
            });
            let job = Job { source: Source::Encoded(picture, Limits::default()), want, terms: Terms::default(), tell };
            if let Err(error) = self.service.submit(job) {
                to.about(place).tell(What::Failed(error.to_string()));
            }
        }
    }
}

fn what(progress: Progress<'_>) -> What {
    match progress {
        Progress::Settled(tokens, _) => What::Tokens(tokens.len()),
        Progress::End(Err(error)) => What::Failed(error.to_string()),
        Progress::End(Ok(outcome)) => What::Done { stages_ms: record::stages(outcome.timings()), output: output(&outcome) },
    }
}

/// Of the first six digits of each number, so that the last bits of other kernels are no other output.
pub(super) fn digest(numbers: &[f32]) -> String {
    let mut hash = Sha256::new();
    numbers.iter().for_each(|number| hash.update(format!("{number:.5e} ")));
    hexadecimal(&hash.finalize()[..8])
}

/// A text as it is; of numbers a digest.
fn output(outcome: &Outcome) -> Output {
    match outcome {
        Outcome::Written(answer) => return Output { text: answer.text.clone(), tokens: answer.tokens.clone() },
        Outcome::Matched(found, _) => {
            found.iter().map(|one| format!("{:.4} {:.4}", one.itm_probability, one.itc_similarity)).collect::<Vec<_>>().join(" ")
        }
        Outcome::Embedded(vector, _) => digest(vector),
        Outcome::Texts(vectors, _) => digest(&vectors.concat()),
        Outcome::Ranked(ranked, _) => ranked.iter().map(|one| format!("{:.4}", one.log_likelihood)).collect::<Vec<_>>().join(" "),
        Outcome::Seen(_) => String::new(),
    }
    .into()
}
