//! Records of a run that may go on for hours: all are counted, and as many are kept as fit.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::figures::{Figures, Objectives, Totals, figures_of};
use super::record::Record;

/// Records of a long run that are kept, some ten megabytes. As many certify a p99.9.
pub const MOST_OF_LONG_RUNS: usize = 8_192;

/// What is kept of a run.
pub struct Kept {
    totals: Totals,
    records: Vec<Record>,
    /// Records that count, of those kept.
    n_counted: usize,
    most: usize,
    random: StdRng,
}

impl Kept {
    /// `most`: records that are kept besides those of the warm-up. Of more, each is kept with the same probability (Vitter 1985, algorithm R).
    pub fn new(objectives: Objectives, most: usize) -> Self {
        let random = StdRng::seed_from_u64(0);
        Self { totals: Totals::new(objectives), records: Vec::new(), n_counted: 0, most, random }
    }

    /// One more. Those of the warm-up come first.
    pub fn add(&mut self, record: Record) {
        self.totals.add(&record);
        if record.warm_up || self.n_counted < self.most {
            self.n_counted += usize::from(!record.warm_up);
            return self.records.push(record);
        }
        let place = self.random.random_range(0..self.totals.n_sent());
        let first = self.records.len() - self.n_counted;
        if place < self.most {
            self.records[first + place] = record;
        }
    }

    /// Those that are kept.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Pictures that were answered, of all.
    pub fn n_images(&self) -> usize {
        self.totals.n_images()
    }

    /// Of all; nothing if no query has an answer.
    pub fn figures(&self) -> Option<Figures> {
        figures_of(&self.records, &self.totals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(index: usize) -> Record {
        Record {
            index,
            input: format!("{}.png", index % 7),
            n_pictures: 2,
            n_tokens: 3,
            scheduled_ms: index as f64 * 10.0,
            sent_ms: index as f64 * 10.0,
            done_ms: (index + 1) as f64 * 10.0,
            warm_up: index < 5,
            error: (index == 11).then(|| "device lost".into()),
            ..Record::default()
        }
    }

    #[test]
    fn a_sample_is_kept_and_all_are_counted() {
        let (mut few, mut all) = (Kept::new(Objectives::default(), 100), Kept::new(Objectives::default(), usize::MAX));
        (0..10_005).for_each(|index| {
            few.add(record(index));
            all.add(record(index));
        });
        assert_eq!((few.records().len(), all.records().len()), (105, 10_005));
        assert!(few.records()[..5].iter().all(|record| record.warm_up));
        let (some, whole) = (few.figures().expect("answers"), all.figures().expect("answers"));
        assert_eq!((some.counts, some.rates, &some.outputs), (whole.counts, whole.rates, &whole.outputs));
        assert_eq!(some.objections, ["1 of 10000 queries failed"]);
        // Early and late ones are kept alike.
        let early = few.records().iter().filter(|record| !record.warm_up && record.index < 5_005).count();
        assert!((30..=70).contains(&early), "{early} of 100");
    }
}
