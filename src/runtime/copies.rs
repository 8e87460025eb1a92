//! What goes between host and device. It does so where tensors are bound to graphs and nowhere else, so it is counted there.

use std::sync::atomic::{AtomicU64, Ordering};

/// Copies since the runtime was loaded; all zero where graphs run on the processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copies {
    /// Tensors that went to the device.
    pub n_up: u64,
    /// Their bytes.
    pub bytes_up: u64,
    /// Tensors that came to the host.
    pub n_down: u64,
    /// Their bytes.
    pub bytes_down: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    n_up: AtomicU64,
    bytes_up: AtomicU64,
    n_down: AtomicU64,
    bytes_down: AtomicU64,
}

impl Counters {
    pub fn up(&self, bytes: usize) {
        self.n_up.fetch_add(1, Ordering::Relaxed);
        self.bytes_up.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn down(&self, bytes: usize) {
        self.n_down.fetch_add(1, Ordering::Relaxed);
        self.bytes_down.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn read(&self) -> Copies {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Copies {
            n_up: read(&self.n_up),
            bytes_up: read(&self.bytes_up),
            n_down: read(&self.n_down),
            bytes_down: read(&self.bytes_down),
        }
    }
}

impl std::ops::Sub for Copies {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            n_up: self.n_up - before.n_up,
            bytes_up: self.bytes_up - before.bytes_up,
            n_down: self.n_down - before.n_down,
            bytes_down: self.bytes_down - before.bytes_down,
        }
    }
}
