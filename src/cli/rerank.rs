//! `--rerank itm`: several texts in the order in which another bundle's matching head finds them fitting.

use super::Failure;
use super::args::{Model, Write};
use crate::bundle::{Bundle, TaskName};
use crate::engine::{Answer, Engine};
use crate::error::Error;
use crate::pixels::Pixels;

/// The second bundle.
pub(super) struct Reranker(Engine);

/// Opens the second bundle's facts, where one is asked for.
pub(super) fn bundle(write: &Write) -> Result<Option<Bundle>, Failure> {
    let Some(folder) = &write.itm_model else { return Ok(None) };
    let bundle = Bundle::open(folder).map_err(Error::from)?;
    bundle.require(TaskName::Match).map_err(Error::from)?;
    Ok(Some(bundle))
}

impl Reranker {
    /// Loads its graphs.
    pub fn load(bundle: Bundle, model: &Model) -> Result<Self, Error> {
        model.load(bundle).map(Self)
    }

    /// Puts each answer's candidates in order, the best match first.
    pub fn order(&mut self, picture: &Pixels, answers: &mut [Answer]) -> Result<(), Error> {
        let sight = self.0.seer().see_each(&[picture]).remove(0)?;
        for answer in answers.iter_mut().filter(|answer| !answer.candidates.is_empty()) {
            // A model may write nothing at all, or what the other bundle cannot read; that matches no picture.
            let is_readable = |k: &usize| self.0.context().reading(&answer.candidates[*k].text).is_ok();
            let written: Vec<usize> = (0..answer.candidates.len()).filter(is_readable).collect();
            let pairs: Vec<_> = written.iter().map(|k| (&sight, answer.candidates[*k].text.as_str())).collect();
            let found: Vec<f32> = self.0.seer().match_texts(&pairs)?.iter().map(|found| found.itm_probability).collect();
            answer.candidates.iter_mut().for_each(|candidate| candidate.itm_probability = Some(0.0));
            for (k, probability) in written.into_iter().zip(found) {
                answer.candidates[k].itm_probability = Some(probability);
            }
            answer.reorder(|a, b| b.itm_probability.unwrap_or(0.0).total_cmp(&a.itm_probability.unwrap_or(0.0)));
        }
        Ok(())
    }
}
