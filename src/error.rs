//! The one error that callers match on, sorted by what they can do next.

use crate::bundle::BundleError;
use crate::decode::{RequestId, StrategyError};
use crate::pixels::PixelsError;
use crate::prompt::PromptError;
use crate::runtime::{RuntimeError, UnavailableError};

/// Why the engine cannot do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The picture is at fault: give another one.
    #[error(transparent)]
    Picture(#[from] PixelsError),
    /// The text is at fault: ask otherwise.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The options of the search are at fault.
    #[error(transparent)]
    Strategy(#[from] StrategyError),
    /// The bundle is at fault: copy or convert it again, or choose another.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The machine lacks something: install it, or choose another provider.
    #[error(transparent)]
    Unavailable(#[from] UnavailableError),
    /// There is no such request, or no more.
    #[error("there is no request {0} here, or it has ended")]
    NoSuchRequest(RequestId),
    /// As much is in hand as may be: come again later.
    #[error("as many requests are in hand as may be")]
    Overloaded,
    /// It waited for longer than it may.
    #[error("the request waited in line for longer than it may")]
    Late,
    /// Whoever asked has gone away.
    #[error("whoever asked has gone away")]
    Gone,
    /// What measures an engine or compares it needs it for itself: step until it is idle, or let the requests leave.
    #[error("requests are in hand, and this needs the engine for itself")]
    Busy,
    /// Something is wanted of a picture, and there is none.
    #[error("there is no picture to do this with")]
    NoPicture,
    /// The thread that had it in hand is gone.
    #[error("the engine stopped working: one of its threads panicked, and said why on standard error")]
    Lost,
    /// A graph failed while it ran.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}
