//! Memory that is free, as far as the operating system says.

use std::fs::read_to_string;

/// Where it says nothing.
const UNKNOWN: u64 = 16 << 30;

/// What of it texts may take.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Set by the user.
    pub(super) limit: Option<u64>,
    /// Whether it is the processor's; a GPU says itself when it is full.
    pub(super) is_host: bool,
}

impl Budget {
    /// Bytes that may be used, `held` included, which are taken already. Unless the user set it, three quarters of what is free.
    pub fn allowed(&self, held: u64) -> u64 {
        let free = || if self.is_host { free_bytes().saturating_add(held) / 4 * 3 } else { u64::MAX };
        self.limit.unwrap_or_else(free)
    }
}

/// Bytes that a process may still take: the smaller of what the machine and what its control group has left.
fn free_bytes() -> u64 {
    let machine = read_to_string("/proc/meminfo").ok().and_then(|text| Some(value(&text, "MemAvailable:")? * 1024));
    machine.into_iter().chain(group()).min().unwrap_or(UNKNOWN)
}

/// The limit of the control group (version 2) less what is in use. Pages of files make room when they must.
fn group() -> Option<u64> {
    let read = |file: &str| read_to_string(format!("/sys/fs/cgroup/memory.{file}")).ok();
    let limit: u64 = read("max")?.trim().parse().ok()?;
    let used: u64 = read("current")?.trim().parse().ok()?;
    let files = value(&read("stat")?, "inactive_file").unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

/// The number behind a key that begins a line.
fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_behind_their_keys() {
        let text = "MemTotal: 12 kB\nMemAvailable:   7 kB\n";
        assert_eq!((value(text, "MemAvailable:"), value(text, "Cached:")), (Some(7), None));
        assert!(free_bytes() > 0);
    }
}
