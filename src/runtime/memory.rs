//! Memory that is free, as far as the operating system says.

use std::fs::read_to_string;
use std::path::Path;

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

/// As far as the system tells; else a guess.
fn free_bytes() -> u64 {
    free().unwrap_or(UNKNOWN)
}

/// Bytes that a process may still take: the smaller of what the machine and what its control group has left.
pub fn free() -> Option<u64> {
    let machine = of_machine("MemAvailable:");
    let groups = GROUPS.iter().filter_map(|group| group.free(Path::new("/sys/fs/cgroup")));
    machine.into_iter().chain(groups).min()
}

/// Bytes of memory that the machine has.
pub fn installed_bytes() -> Option<u64> {
    of_machine("MemTotal:")
}

fn of_machine(key: &str) -> Option<u64> {
    value(&read_to_string("/proc/meminfo").ok()?, key)?.checked_mul(1024)
}

/// Files in which a control group says what it holds.
struct Group {
    limit: &'static str,
    used: &'static str,
    stat: &'static str,
    files: &'static str,
}

/// Of version 2, and of version 1.
const GROUPS: [Group; 2] = [
    Group { limit: "memory.max", used: "memory.current", stat: "memory.stat", files: "inactive_file" },
    Group {
        limit: "memory/memory.limit_in_bytes",
        used: "memory/memory.usage_in_bytes",
        stat: "memory/memory.stat",
        files: "total_inactive_file",
    },
];

impl Group {
    /// The limit less what is in use. Pages of files make room when they must.
    fn free(&self, root: &Path) -> Option<u64> {
        let read = |file: &str| read_to_string(root.join(file)).ok();
        let limit: u64 = read(self.limit)?.trim().parse().ok()?;
        let used: u64 = read(self.used)?.trim().parse().ok()?;
        let files = value(&read(self.stat)?, self.files).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(files)))
    }
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

    #[test]
    fn control_groups_of_both_versions_have_limits() {
        let root = std::env::temp_dir().join(format!("blip2-groups-{}", std::process::id()));
        std::fs::create_dir_all(root.join("memory")).unwrap();
        for group in &GROUPS {
            std::fs::write(root.join(group.used), "700\n").unwrap();
            std::fs::write(root.join(group.stat), format!("anon 1\n{} 200\n", group.files)).unwrap();
            std::fs::write(root.join(group.limit), "1000\n").unwrap();
            assert_eq!(group.free(&root), Some(500));
            std::fs::write(root.join(group.limit), "max\n").unwrap();
            assert_eq!(group.free(&root), None);
        }
        std::fs::remove_dir_all(root).unwrap();
    }
}
