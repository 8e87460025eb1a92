//! Measuring in one go, or in turns with other processes, which whoever started this one gives out line by line.

use std::io::{Write as _, stdin, stdout};
use std::num::NonZeroU16;

use serde::{Deserialize, Serialize};

use super::Measure;
use super::plan::Plan;
use crate::bench::keep::Kept;
use crate::bench::load::{Length, Run};
use crate::bench::record::Record;
use crate::bench::turns::{Joined, Turn};

/// A line to whoever gives out turns.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Said {
    /// Loaded and warm.
    Ready,
    /// A turn has ended; nothing where none of its queries has an answer.
    Turn(Option<Turn>),
}

/// Whether all was measured: a stop ends it, and so does who gives out no more turns.
pub(super) fn measure(plan: &Plan, measure: &Measure, run: &mut Run<'_>, kept: &mut Kept) -> bool {
    let whole = Length { queries: measure.queries.get(), time: measure.duration };
    match measure.turns {
        Some(n) => in_turns(plan, (n, whole), run, kept),
        None => {
            run.each(&plan.load, whole, false, &mut |record| kept.add(record));
            !run.is_stopped()
        }
    }
}

fn in_turns(plan: &Plan, (n, whole): (NonZeroU16, Length), run: &mut Run<'_>, kept: &mut Kept) -> bool {
    let mut joined = Joined::default();
    if Said::Ready.say().is_err() {
        return false;
    }
    for (load, length) in plan.turns(n.get(), whole) {
        if !is_asked() || run.is_stopped() {
            return false;
        }
        let records: Vec<Record> = run.go(&load, length, false);
        let turn = Turn::of(&records);
        joined.next(records).into_iter().for_each(|record| kept.add(record));
        if Said::Turn(turn).say().is_err() {
            return false;
        }
    }
    !run.is_stopped()
}

impl Said {
    fn say(self) -> std::io::Result<()> {
        let mut out = stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&self).expect("it is JSON"))?;
        out.flush()
    }
}

/// For another turn; a closed or broken standard input asks for none.
fn is_asked() -> bool {
    stdin().read_line(&mut String::new()).is_ok_and(|n| n > 0)
}
