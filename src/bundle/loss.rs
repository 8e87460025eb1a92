//! What a bundle of fewer bits loses against float32, as its conversion measured it.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::json::unique;
use super::{Bundle, BundleError};

/// Most pictures that a conversion measures on, and tokens that it compares.
const MAX_MEASURED: usize = 1 << 30;

/// Against the same checkpoint in float32, on pictures that calibration did not see.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossFacts {
    /// How many pictures.
    pub pictures: usize,
    /// Of every stage.
    #[serde(deserialize_with = "unique")]
    pub stages: BTreeMap<String, StageLoss>,
    /// Absent where nothing writes.
    pub tokens: Option<TokenLoss>,
    /// Of the texts that float32 wrote; absent where nothing writes.
    pub perplexity: Option<Compared>,
    /// Shares of true captions, right answers and the like, where they were evaluated.
    #[serde(default, deserialize_with = "unique")]
    pub tasks: BTreeMap<String, Compared>,
}

/// One stage.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageLoss {
    /// With float32's own input.
    pub alone: Difference,
    /// From the picture on.
    pub end_to_end: Difference,
}

/// How far values are from those of float32.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Difference {
    /// Largest difference, relative to the largest value.
    pub error: f64,
    /// Cosine of a row on average.
    pub cosine: f64,
    /// Of the row where it is smallest.
    pub least_cosine: f64,
}

/// Tokens that float32 wrote, chosen again behind the same text.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenLoss {
    /// How many.
    pub compared: usize,
    /// The share that is chosen too.
    pub agree: f64,
}

/// One figure of both.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct Compared {
    pub float32: f64,
    pub bundle: f64,
}

impl Bundle {
    pub(super) fn check_loss(&self) -> Result<(), BundleError> {
        let Some(loss) = &self.facts.loss else { return Ok(()) };
        self.ensure(!self.is_exact(), || ("a loss against float32".into(), "but every graph is float32".into()))?;
        let counts = [("pictures", Some(loss.pictures)), ("tokens.compared", loss.tokens.map(|tokens| tokens.compared))];
        for (name, count) in counts.into_iter().filter_map(|(name, count)| Some((name, count?))) {
            self.ensure((1..=MAX_MEASURED).contains(&count), || {
                (format!("loss.{name} is {count}"), format!("1 to {MAX_MEASURED} are possible"))
            })?;
        }
        loss.figures().into_iter().try_for_each(|(name, found, least, most)| {
            self.ensure((least..=most).contains(&found), || {
                (format!("loss.{name} is {found}"), format!("{least} to {most:.0} are possible"))
            })
        })
    }
}

impl LossFacts {
    /// Every figure: its name, itself, and between what it must lie.
    fn figures(&self) -> Vec<(String, f64, f64, f64)> {
        let mut figures = Vec::new();
        for (stage, loss) in &self.stages {
            for (way, Difference { error, cosine, least_cosine }) in [("alone", loss.alone), ("end_to_end", loss.end_to_end)] {
                figures.push((format!("stages.{stage}.{way}.error"), error, 0.0, f64::MAX));
                figures.push((format!("stages.{stage}.{way}.cosine"), cosine, -1.0, 1.0));
                figures.push((format!("stages.{stage}.{way}.least_cosine"), least_cosine, -1.0, 1.0));
            }
        }
        figures.extend(self.tokens.map(|tokens| ("tokens.agree".into(), tokens.agree, 0.0, 1.0)));
        if let Some(Compared { float32, bundle }) = self.perplexity {
            figures.extend([float32, bundle].map(|found| ("perplexity".into(), found, 1.0, f64::MAX)));
        }
        for (task, Compared { float32, bundle }) in &self.tasks {
            figures.extend([*float32, *bundle].map(|found| (format!("tasks.{task}"), found, 0.0, 1.0)));
        }
        figures
    }
}
