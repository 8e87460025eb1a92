//! Threads inside operators: one pool for all sessions of a process.
//!
//! A pool a session would keep spinning after its run, on the cores that the next session needs: prefill right behind the image encoder
//! then takes twice as long as alone.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::Path;

use ort::environment::GlobalThreadPoolOptions;
use ort::session::builder::SessionBuilder;

/// How many threads there are, and what they do while they wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Threads {
    pub count: NonZeroUsize,
    /// Whether they wait for work busily. It makes a decode step faster, and slows down whoever else computes on the cores.
    pub spin: bool,
}

impl Threads {
    /// The pool of the environment. Graphs run node by node, so there is nothing for threads between operators.
    pub fn pool(self) -> Result<GlobalThreadPoolOptions, ort::Error> {
        let pool = GlobalThreadPoolOptions::default().with_inter_threads(1)?.with_spin_control(self.spin)?;
        pool.with_intra_threads(self.count.get())
    }

    /// Lets a session use the environment's pool if that is as wanted, or gives it one of its own.
    pub fn apply(self, environment: Self, builder: SessionBuilder) -> Result<SessionBuilder, ort::Error> {
        if self == environment {
            return Ok(builder);
        }
        let builder = builder.with_independent_thread_pool()?.with_intra_op_spinning(self.spin)?;
        Ok(builder.with_intra_threads(self.count.get())?)
    }
}

/// Threads where nobody names a number: one for each core that this process may use, as far as the quota of its control group goes. Two
/// threads that share the units of one core only take them from each other; ONNX Runtime, left alone, knows nothing of quotas.
pub fn default_threads() -> NonZeroUsize {
    let allowed = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    physical_cores().map_or(allowed, |cores| cores.min(allowed))
}

/// Cores among the processors that this process may run on, where the system tells.
fn physical_cores() -> Option<NonZeroUsize> {
    let status = read_to_string("/proc/self/status").ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    cores_of(allowed, Path::new("/sys/devices/system/cpu"))
}

/// Processors of one core name the same siblings.
fn cores_of(processors: &str, system: &Path) -> Option<NonZeroUsize> {
    let siblings = |processor: usize| read_to_string(system.join(format!("cpu{processor}/topology/thread_siblings_list"))).ok();
    let cores: Option<BTreeSet<String>> = listed(processors).flatten().map(siblings).collect();
    NonZeroUsize::new(cores?.len())
}

/// Numbers as the kernel lists them: `0-3,8`.
fn listed(text: &str) -> impl Iterator<Item = RangeInclusive<usize>> {
    text.trim().split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_one_core_count_once() {
        let system = std::env::temp_dir().join(format!("blip2-cores-{}", std::process::id()));
        for (processor, siblings) in ["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"].iter().enumerate() {
            let topology = system.join(format!("cpu{processor}/topology"));
            std::fs::create_dir_all(&topology).unwrap();
            std::fs::write(topology.join("thread_siblings_list"), siblings).unwrap();
        }
        let cores = |processors| cores_of(processors, &system).map(NonZeroUsize::get);
        assert_eq!([cores("\t0-7\n"), cores("0,4"), cores("0-2,5")], [Some(4), Some(1), Some(3)]);
        assert_eq!([cores(""), cores("0-8")], [None, None], "of a processor that is not described nothing is known");
        std::fs::remove_dir_all(system).unwrap();
    }

    #[test]
    fn there_are_no_more_threads_than_the_process_may_use() {
        assert!(default_threads() <= std::thread::available_parallelism().unwrap());
    }
}
