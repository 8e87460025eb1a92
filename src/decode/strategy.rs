//! Which search writes a text, and whether its options make sense.

use std::collections::HashSet;

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
    /// A limit below the least.
    #[error("at least {min} new tokens are wanted, and {max} at most (min-new-tokens, max-new-tokens)")]
    Lengths {
        /// Least number of new tokens.
        min: usize,
        /// Limit of new tokens.
        max: usize,
    },
    /// A token that there is none of.
    #[error("{name}: token {id} is not in the vocabulary, whose {vocabulary} tokens count from 0")]
    NoSuchToken {
        /// The option.
        name: &'static str,
        /// The token.
        id: TokenId,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// Nothing that is forced may be written.
    #[error("{0} forces tokens that are suppressed")]
    Contradiction(&'static str),
    /// Nothing may be written.
    #[error("every token of the vocabulary is suppressed, at the beginning at least")]
    NothingLeft,
    /// A text would end before it begins.
    #[error("a stop string is empty")]
    EmptyStop,
    /// Options of beam search in another.
    #[error("length-penalty and early-stopping are for beam search; ask for several beams")]
    OneBeam,
    /// Several texts of a search that finds one.
    #[error("several texts (num-return) need beams or sampling: greedy search writes one text")]
    OneText,
    /// More than the memory holds.
    #[error(
        "{rows} rows of {positions} positions at {position_bytes} bytes, with {row_bytes} bytes of logits and encoder states each, \
         need {} of memory, {} may be used; ask for fewer beams, texts or tokens, or allow more (max-cache-bytes)",
        readable(*.needed), readable(*.allowed)
    )]
    TooLarge {
        /// Rows side by side, all requests together.
        rows: u64,
        /// Positions of a row.
        positions: u64,
        /// Keys and values of a position.
        position_bytes: u64,
        /// What else a row takes.
        row_bytes: u64,
        /// Bytes of all.
        needed: u64,
        /// Bytes that may be used.
        allowed: u64,
    },
}

fn readable(bytes: u64) -> String {
    if bytes < 1_000_000_000 { format!("{:.1} MB", bytes as f64 / 1e6) } else { format!("{:.1} GB", bytes as f64 / 1e9) }
}

impl Strategy {
    /// Refuses options that make no sense, alone or together, for a vocabulary of this size where `end` ends a text.
    pub fn check(&self, processors: &Processors, vocabulary: usize, end: &[TokenId]) -> Result<(), StrategyError> {
        check_processors(processors, vocabulary)?;
        check_choice(processors, vocabulary, end)?;
        match self {
            Self::Greedy => Ok(()),
            Self::Sample { n_return: 0, .. } | Self::Beam { n_return: 0, .. } => Err(StrategyError::Zero("the number of texts")),
            Self::Beam { beams: 0, .. } => Err(StrategyError::Zero("the number of beams")),
            Self::Sample { warpers, .. } => check_warpers(warpers),
            Self::Beam { beams, n_return, .. } if n_return > beams => {
                Err(StrategyError::TooMany { n_return: *n_return, beams: *beams })
            }
            Self::Beam { length_penalty, sample, .. } => {
                let holds = (-10.0..=10.0).contains(length_penalty);
                in_range(("length penalty", *length_penalty, holds, "it must be from -10 to 10"))?;
                sample.as_ref().map_or(Ok(()), |(warpers, _)| check_warpers(warpers))
            }
        }
    }

    /// Rows that one request runs side by side.
    pub fn n_rows(&self) -> usize {
        match self {
            Self::Greedy => 1,
            Self::Sample { n_return, .. } => *n_return,
            Self::Beam { beams, .. } => *beams,
        }
    }

    /// The search that writes one request's texts behind `prompt`, image tokens included, and with `log_probs` records how probable their
    /// tokens are, each beside as many alternatives.
    pub fn search(
        &self,
        prompt: &[TokenId],
        processors: &Processors,
        ends: &Ends,
        log_probs: Option<usize>,
    ) -> Box<dyn Search + Send> {
        let (ends, processors) = (ends.clone(), processors.clone());
        match *self {
            Self::Greedy => Box::new(Greedy::new(prompt, GreedyOptions { ends, processors, log_probs })),
            Self::Sample { warpers, seed, n_return } => {
                let options = SampleOptions { ends, processors, warpers, seed, log_probs };
                Box::new(Sample::several(prompt, options, n_return))
            }
            Self::Beam { beams, length_penalty, early_stopping, sample, .. } => {
                let sample = sample.map(|(warpers, seed)| BeamSample { warpers, seed });
                let options = BeamOptions { beams, length_penalty, early_stopping, ends, processors, sample, log_probs };
                Box::new(Beam::new(prompt, options))
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

/// An option, its value, whether that is in the range, and the range.
type Range = (&'static str, f32, bool, &'static str);

fn in_range((name, found, holds, allowed): Range) -> Result<(), StrategyError> {
    if holds { Ok(()) } else { Err(StrategyError::OutOfRange { name, found, allowed }) }
}

fn check_warpers(warpers: &Warpers) -> Result<(), StrategyError> {
    let Warpers { temperature, top_p, min_p, typical_p, .. } = *warpers;
    // Divided by less, scores leave float32.
    let warms = temperature.is_finite() && temperature >= 1e-6;
    let checks = [
        ("temperature", temperature, warms, "it must be a number from 0.000001 up; greedy search needs none"),
        ("top-p", top_p, top_p > 0.0 && top_p <= 1.0, "it must be above 0 and at most 1"),
        ("min-p", min_p, (0.0..=1.0).contains(&min_p), "it must be from 0 to 1"),
        ("typical-p", typical_p, typical_p > 0.0 && typical_p <= 1.0, "it must be above 0 and at most 1"),
    ];
    checks.into_iter().try_for_each(in_range)
}

fn check_processors(processors: &Processors, vocabulary: usize) -> Result<(), StrategyError> {
    let Processors { suppressed, suppressed_first, forced_last, bad_words, .. } = processors;
    let penalty = processors.repetition_penalty;
    // Multiplied or divided by more, scores leave float32.
    in_range(("repetition penalty", penalty, (1e-6..=1e6).contains(&penalty), "it must be from 0.000001 to 1000000"))?;
    let forced_first = processors.forced_first.as_slice();
    for (name, ids) in [
        ("suppress-tokens", suppressed.as_slice()),
        ("begin-suppress-tokens", suppressed_first),
        ("forced-bos-token", forced_first),
        ("forced-eos-tokens", forced_last),
        ("bad-word", &bad_words.concat()),
    ] {
        if let Some(&id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            return Err(StrategyError::NoSuchToken { name, id, vocabulary });
        }
    }
    Ok(())
}

/// Something can be written, and what is forced is not suppressed.
fn check_choice(processors: &Processors, vocabulary: usize, end: &[TokenId]) -> Result<(), StrategyError> {
    let Processors { suppressed, suppressed_first, forced_last, .. } = processors;
    let forced_first = processors.forced_first.as_slice();
    let gone: HashSet<TokenId> = suppressed.iter().copied().collect();
    for (name, forced) in [("forced-bos-token", forced_first), ("forced-eos-tokens", forced_last)] {
        if !forced.is_empty() && forced.iter().all(|id| gone.contains(id)) {
            return Err(StrategyError::Contradiction(name));
        }
    }
    let waits = if processors.min_new_tokens > 0 { end } else { &[] };
    let gone_first: HashSet<TokenId> = gone.iter().chain(suppressed_first).chain(waits).copied().collect();
    if gone_first.len() == vocabulary { Err(StrategyError::NothingLeft) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Edit = fn(&mut Processors);

    #[test]
    fn every_token_id_is_one_of_the_vocabulary() {
        let cases: [(Edit, &str); 5] = [
            (|p| p.suppressed = vec![3, 10], "suppress-tokens"),
            (|p| p.suppressed_first = vec![10], "begin-suppress-tokens"),
            (|p| p.forced_first = Some(TokenId::MAX), "forced-bos-token"),
            (|p| p.forced_last = vec![999_999], "forced-eos-tokens"),
            (|p| p.bad_words = vec![vec![1], vec![2, 10]], "bad-word"),
        ];
        for (edit, wanted) in cases {
            let mut processors = Processors::default();
            edit(&mut processors);
            let found = Strategy::Greedy.check(&processors, 10, &[]);
            assert!(matches!(found, Err(StrategyError::NoSuchToken { name, vocabulary: 10, .. }) if name == wanted), "{found:?}");
            assert_eq!(Strategy::Greedy.check(&processors, usize::MAX, &[]), Ok(()));
        }
    }

    #[test]
    fn something_can_be_written() {
        let found = |edit: Edit| {
            let mut processors = Processors::default();
            edit(&mut processors);
            Strategy::Greedy.check(&processors, 3, &[2])
        };
        assert_eq!(found(|p| p.suppressed = vec![0, 1, 2, 2]), Err(StrategyError::NothingLeft));
        assert_eq!(found(|p| p.suppressed = vec![0, 1, 1]), Ok(()));
        assert_eq!(found(|p| p.suppressed_first = vec![2, 1, 0]), Err(StrategyError::NothingLeft));
        assert_eq!(found(|p| (p.suppressed, p.suppressed_first) = (vec![0], vec![1, 2])), Err(StrategyError::NothingLeft));
        assert_eq!(found(|p| (p.suppressed, p.min_new_tokens) = (vec![0, 1], 1)), Err(StrategyError::NothingLeft));
        let forced: Edit = |p| (p.suppressed, p.forced_last) = (vec![0, 1], vec![0, 1]);
        assert_eq!(found(forced), Err(StrategyError::Contradiction("forced-eos-tokens")));
        assert_eq!(found(|p| (p.suppressed, p.forced_last) = (vec![0], vec![0, 1])), Ok(()));
        let first: Edit = |p| (p.suppressed, p.forced_first) = (vec![0], Some(0));
        assert_eq!(found(first), Err(StrategyError::Contradiction("forced-bos-token")));
    }

    #[test]
    fn numbers_stay_where_float32_can_follow() {
        for penalty in [0.0, -1.0, 1e-7, 1e7, f32::NAN, f32::INFINITY] {
            let processors = Processors { repetition_penalty: penalty, ..Processors::default() };
            assert!(Strategy::Greedy.check(&processors, 3, &[]).is_err(), "{penalty}");
        }
        for temperature in [0.0, -1.0, 1e-40, f32::NAN, f32::INFINITY] {
            let warpers = Warpers { temperature, ..Warpers::default() };
            let sample = Strategy::Sample { warpers, seed: 0, n_return: 1 };
            assert!(sample.check(&Processors::default(), 3, &[]).is_err(), "{temperature}");
        }
        for length_penalty in [1e30, -11.0, f32::NAN, f32::NEG_INFINITY] {
            let beam =
                Strategy::Beam { beams: 2, length_penalty, early_stopping: EarlyStopping::default(), n_return: 1, sample: None };
            assert!(beam.check(&Processors::default(), 3, &[]).is_err(), "{length_penalty}");
        }
    }
}
