//! Who may use a provider's library, and when.

use std::sync::{MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// To be held while a provider is used.
#[derive(Debug)]
#[expect(dead_code, reason = "guards are held, not read")]
pub(super) enum Turn {
    /// Whoever wants to may use it at the same time.
    Free,
    /// Nobody else does.
    Only(MutexGuard<'static, ()>),
    /// Others do, but nobody records.
    Shared(RwLockReadGuard<'static, ()>),
    /// What starts on an NVIDIA GPU is recorded, and nobody else starts anything.
    Recording(RwLockWriteGuard<'static, ()>),
}

/// While CUDA records one thread's work, what another thread allocates or copies makes the recording fail.
static RECORDING: RwLock<()> = RwLock::new(());

impl Turn {
    /// For work on an NVIDIA GPU.
    pub fn shared() -> Self {
        Self::Shared(RECORDING.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// For work that is recorded there.
    pub fn recording() -> Self {
        Self::Recording(RECORDING.write().unwrap_or_else(PoisonError::into_inner))
    }
}
