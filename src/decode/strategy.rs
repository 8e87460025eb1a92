//! Which search writes a text, and whether its options make sense.

use super::{
    Beam, BeamOptions, BeamSample, EarlyStopping, Ends, Greedy, GreedyOptions, Processors, Sample, SampleOptions, Search, TokenId,
    Warpers,
};

/// How tokens are chosen.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Strategy {
    /// The most probable token.
    #[default]
    Greedy,
    /// A token drawn from the shaped distribution.
    Sample {
        /// How the distribution is shaped.
        warpers: Warpers,
        /// The same seed gives the same texts; the k-th of several is drawn with seed + k.
        seed: u64,
        /// How many texts.
        n_return: usize,
    },
    /// Several rows side by side, the best text of all.
    Beam {
        /// Rows.
        beams: usize,
        /// Exponent of the length that sums are divided by.
        length_penalty: f32,
        /// When to end.
        early_stopping: EarlyStopping,
        /// How many texts.
        n_return: usize,
        /// Draws continuations with this shape and seed.
        sample: Option<(Warpers, u64)>,
    },
}

/// Options that make no sense.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum StrategyError {
    /// A number outside its range.
    #[error("{name} is {found}; {allowed}")]
    OutOfRange {
        /// The option.
        name: &'static str,
        /// Its value.
        found: f32,
        /// What it may be.
        allowed: &'static str,
    },
    /// More texts than there are.
    #[error("{n_return} texts are wanted of {beams} beams; there is one a beam at most")]
    TooMany {
        /// Texts.
        n_return: usize,
        /// Beams.
        beams: usize,
    },
    /// None of something.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
}

impl Strategy {
    /// Refuses options that make no sense.
    pub fn check(&self, processors: &Processors) -> Result<(), StrategyError> {
        let in_range = |name, found: f32, holds: bool, allowed| match holds {
            true => Ok(()),
            false => Err(StrategyError::OutOfRange { name, found, allowed }),
        };
        let penalty = processors.repetition_penalty;
        in_range("repetition penalty", penalty, penalty.is_finite() && penalty > 0.0, "it must be a number above 0")?;
        match self {
            Self::Greedy => Ok(()),
            Self::Sample { n_return: 0, .. } | Self::Beam { n_return: 0, .. } => Err(StrategyError::Zero("the number of texts")),
            Self::Beam { beams: 0, .. } => Err(StrategyError::Zero("the number of beams")),
            Self::Sample { warpers, .. } => check_warpers(warpers),
            Self::Beam { beams, n_return, .. } if n_return > beams => {
                Err(StrategyError::TooMany { n_return: *n_return, beams: *beams })
            }
            Self::Beam { length_penalty, sample, .. } => {
                in_range("length penalty", *length_penalty, length_penalty.is_finite(), "it must be a number")?;
                sample.as_ref().map_or(Ok(()), |(warpers, _)| check_warpers(warpers))
            }
        }
    }

    /// The searches that write one request's texts behind `prompt`, image tokens included.
    pub fn searches(&self, prompt: &[TokenId], processors: &Processors, ends: &Ends) -> Vec<Box<dyn Search + Send>> {
        let (ends, processors) = (ends.clone(), processors.clone());
        match *self {
            Self::Greedy => vec![Box::new(Greedy::new(prompt, GreedyOptions { ends, processors }))],
            Self::Sample { warpers, seed, n_return } => {
                let options = SampleOptions { ends, processors, warpers, seed };
                let seeds = (0..n_return as u64).map(|k| seed.wrapping_add(k));
                let sample =
                    |seed| Box::new(Sample::new(prompt, SampleOptions { seed, ..options.clone() })) as Box<dyn Search + Send>;
                seeds.map(sample).collect()
            }
            Self::Beam { beams, length_penalty, early_stopping, sample, .. } => {
                let sample = sample.map(|(warpers, seed)| BeamSample { warpers, seed });
                let options = BeamOptions { beams, length_penalty, early_stopping, ends, processors, sample };
                vec![Box::new(Beam::new(prompt, options))]
            }
        }
    }

    /// How many texts one request gets at most.
    pub fn n_return(&self) -> usize {
        match self {
            Self::Greedy => 1,
            Self::Sample { n_return, .. } | Self::Beam { n_return, .. } => *n_return,
        }
    }
}

fn check_warpers(warpers: &Warpers) -> Result<(), StrategyError> {
    let Warpers { temperature, top_p, min_p, typical_p, .. } = *warpers;
    let checks = [
        (
            "temperature",
            temperature,
            temperature.is_finite() && temperature > 0.0,
            "it must be a number above 0; greedy search needs none",
        ),
        ("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "it must be above 0 and at most 1"),
        ("min-p", min_p, (0.0..=1.0).contains(&min_p), "it must be from 0 to 1"),
        ("typical-p", typical_p, typical_p > 0.0 && typical_p <= 1.0, "it must be above 0 and at most 1"),
    ];
    match checks.into_iter().find(|(_, _, holds, _)| !holds) {
        Some((name, found, _, allowed)) => Err(StrategyError::OutOfRange { name, found, allowed }),
        None => Ok(()),
    }
}
