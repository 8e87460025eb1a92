//! The machine that a figure holds for, and what else it was doing. Whatever cannot be read is absent.

use std::fs;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::runtime::{Processor, default_threads, installed_bytes};

/// The machine, once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Machine {
    /// As the system calls it.
    pub processor: Option<String>,
    /// What the instruction set has, of what matters here.
    pub instruction_set: String,
    /// Processors that are there.
    pub processors: usize,
    /// Those that this process may use, control groups included.
    pub usable_processors: usize,
    /// Bytes.
    pub memory_bytes: Option<u64>,
    /// Operating system and kernel.
    pub system: String,
    /// How the clock is governed.
    pub governor: Option<String>,
    /// GPUs, as `nvidia-smi` tells: name, driver, power limit.
    pub gpus: Vec<String>,
    /// The power mode of a Jetson board.
    pub power_mode: Option<String>,
}

/// The machine at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Load {
    /// Mean number of running processes in the last minute.
    pub last_minute: Option<f64>,
    /// Mean clock of all processors, MHz.
    pub clock_mhz: Option<f64>,
    /// How often processors were throttled since the system started.
    pub throttled: Option<u64>,
    /// Share of processor time that others used, in this system and, where it is virtual, beside it; between two moments.
    pub taken_by_others: Option<f64>,
    #[serde(skip)]
    ticks: Option<Ticks>,
}

/// Processor time since the system started, in ticks.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ticks {
    busy: u64,
    stolen: u64,
    all: u64,
    own: u64,
}

impl Machine {
    /// This one.
    pub fn detect() -> Self {
        Self {
            gpus: said(&["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"])
                .map(|text| text.lines().map(str::to_owned).collect())
                .unwrap_or_default(),
            power_mode: said(&["nvpmodel", "-q"]).map(|text| text.lines().collect::<Vec<_>>().join(" ")),
            ..Self::without_tools()
        }
    }

    /// This one, as far as its files tell; asking tools takes longer than a caption.
    pub fn without_tools() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        Self {
            processor: cpuinfo.as_deref().and_then(|text| field(text, "model name")).or_else(|| read("/proc/device-tree/model")),
            instruction_set: Processor::detect().to_string(),
            processors: cpuinfo.map_or(0, |text| text.lines().filter(|line| line.starts_with("processor")).count()),
            usable_processors: default_threads().get(),
            memory_bytes: installed_bytes(),
            system: format!("{} {}", std::env::consts::OS, read("/proc/sys/kernel/osrelease").unwrap_or_default()),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            gpus: Vec::new(),
            power_mode: None,
        }
    }
}

impl Load {
    /// Now.
    pub fn now() -> Self {
        let cpus = || fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten().map(|entry| entry.path());
        let numbers = |name: &'static str| cpus().filter_map(move |cpu| read(cpu.join(name))?.parse::<f64>().ok());
        let clocks: Vec<f64> = numbers("cpufreq/scaling_cur_freq").map(|kilohertz| kilohertz / 1e3).collect();
        let throttled: Vec<f64> = numbers("thermal_throttle/core_throttle_count").collect();
        Self {
            last_minute: read("/proc/loadavg").and_then(|text| text.split(' ').next()?.parse().ok()),
            clock_mhz: mean(&clocks).or_else(|| mean(&told_clocks())),
            throttled: (!throttled.is_empty()).then(|| throttled.iter().sum::<f64>() as u64),
            taken_by_others: None,
            ticks: Ticks::now(),
        }
    }

    /// Now, with what others took since an earlier moment.
    pub fn since(earlier: &Self) -> Self {
        let now = Self::now();
        let taken_by_others = earlier.ticks.zip(now.ticks).and_then(|(before, after)| after.by_others(before));
        Self { taken_by_others, ..now }
    }
}

impl Ticks {
    fn now() -> Option<Self> {
        let all = read("/proc/stat")?;
        let ticks: Vec<u64> = all.lines().next()?.split_whitespace().skip(1).filter_map(|number| number.parse().ok()).collect();
        let [user, nice, system, idle, waiting, interrupts, soft, stolen, ..] = ticks[..] else { return None };
        let busy = user + nice + system + interrupts + soft;
        // Behind the name, which may have spaces, user and system time are the 12th and 13th field, and then those of children that ended.
        let own = read("/proc/self/stat")?;
        let fields: Vec<&str> = own.rsplit(')').next()?.split_whitespace().collect();
        let own = fields.get(11..15)?.iter().map(|ticks| ticks.parse::<u64>().ok()).sum::<Option<u64>>()?;
        Some(Self { busy, stolen, all: busy + idle + waiting + stolen, own })
    }

    fn by_others(self, before: Self) -> Option<f64> {
        let all = self.all.checked_sub(before.all).filter(|all| *all > 0)?;
        let (busy, own) = (self.busy.saturating_sub(before.busy), self.own.saturating_sub(before.own));
        Some((busy.saturating_sub(own) + self.stolen.saturating_sub(before.stolen)) as f64 / all as f64)
    }
}

/// The most memory that this process ever had resident, in bytes.
pub fn peak_resident_bytes() -> Option<u64> {
    kibibytes(&read("/proc/self/status")?, "VmHWM")
}

/// What it has resident now.
pub fn resident_bytes() -> Option<u64> {
    kibibytes(&read("/proc/self/status")?, "VmRSS")
}

fn told_clocks() -> Vec<f64> {
    let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("cpu MHz"))
        .filter_map(|line| line.split(':').nth(1)?.trim().parse().ok())
        .collect()
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Trimmed, without the zero byte that device trees end with; nothing of an empty file.
fn read(path: impl AsRef<Path>) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim_matches(|char: char| char.is_whitespace() || char == '\0');
    (!text.is_empty()).then(|| text.to_owned())
}

/// `name : value` or `name: value`, on the first line that has it.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn kibibytes(text: &str, name: &str) -> Option<u64> {
    field(text, name)?.strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kibibytes| kibibytes << 10)
}

/// What a tool of the system says, if it is there and succeeds.
fn said(command: &[&str]) -> Option<String> {
    let found = std::process::Command::new(command[0]).args(&command[1..]).output().ok().filter(|found| found.status.success())?;
    Some(String::from_utf8_lossy(&found.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_system_are_read() {
        assert_eq!(field("model name\t: AMD EPYC\nflags\t: avx2", "model name").as_deref(), Some("AMD EPYC"));
        assert_eq!(kibibytes("Name:\tx\nVmHWM:\t    2048 kB\n", "VmHWM"), Some(2 << 20));
        assert_eq!(field("a: b", "c"), None);
    }

    #[test]
    fn time_of_others_is_what_neither_this_process_nor_nobody_used() {
        let before = Ticks { busy: 100, stolen: 10, all: 1_000, own: 40 };
        let after = Ticks { busy: 180, stolen: 20, all: 1_200, own: 100 };
        assert_eq!(after.by_others(before), Some(0.15)); // (80 − 60 + 10) / 200
        assert_eq!(after.by_others(after), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_is_known() {
        let machine = Machine::detect();
        assert!(machine.processors >= 1 && machine.usable_processors >= 1 && machine.memory_bytes > Some(1 << 28), "{machine:?}");
        let peak = peak_resident_bytes().expect("Linux tells");
        assert!(peak >= resident_bytes().expect("Linux tells"));
        let earlier = Load::now();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let share = Load::since(&earlier).taken_by_others.expect("time passed");
        assert!((0.0..=1.0).contains(&share), "{share}");
    }
}
