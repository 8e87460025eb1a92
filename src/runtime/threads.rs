//! Threads inside operators: one pool for all sessions of a process.
//!
//! A pool a session would keep spinning after its run, on the cores that the next session needs: prefill right behind the image encoder
//! then takes twice as long as alone.

use std::num::NonZeroUsize;

use ort::environment::GlobalThreadPoolOptions;
use ort::session::builder::SessionBuilder;

/// How many threads there are, and what they do while they wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Threads {
    /// One a core when absent.
    pub count: Option<NonZeroUsize>,
    /// Whether they wait for work busily. It makes a decode step faster, and slows down whoever else computes on the cores.
    pub spin: bool,
}

impl Threads {
    /// The pool of the environment. Graphs run node by node, so there is nothing for threads between operators.
    pub fn pool(self) -> Result<GlobalThreadPoolOptions, ort::Error> {
        let pool = GlobalThreadPoolOptions::default().with_inter_threads(1)?.with_spin_control(self.spin)?;
        pool.with_intra_threads(self.count.map_or(0, NonZeroUsize::get))
    }

    /// Lets a session use the environment's pool if that is as wanted, or gives it one of its own.
    pub fn apply(self, environment: Self, builder: SessionBuilder) -> Result<SessionBuilder, ort::Error> {
        if self == environment {
            return Ok(builder);
        }
        let builder = builder.with_independent_thread_pool()?.with_intra_op_spinning(self.spin)?;
        Ok(builder.with_intra_threads(self.count.map_or(0, NonZeroUsize::get))?)
    }
}
