//! On what terms a job is in hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::error::Error;

/// What a caller may say about a job beside what is wanted. The default waits for ever, before nobody and behind nobody.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// Whose job it is: of those in line, owners have their turns one after another.
    pub owner: u64,
    /// Jobs of a higher one come first; the default is 0.
    pub priority: i8,
    /// When it is no longer worth beginning.
    pub deadline: Option<Instant>,
    /// Whether its caller still waits.
    pub gone: Gone,
    /// Whether what is made of the picture may be kept, and taken from what was kept.
    pub keeps: bool,
}

/// Tells the threads of a service that a caller has gone away. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Gone(Arc<AtomicBool>);

impl Terms {
    /// Why the job should not be begun now, if there is a reason.
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.gone.is_gone() {
            return Err(Error::Gone);
        }
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) { Err(Error::Late) } else { Ok(()) }
    }
}

impl Gone {
    /// The caller goes: no more is done for it.
    pub fn leave(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it has gone.
    pub fn is_gone(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
