//! Energy while something runs, from the counters and sensors that the machine has: RAPL, NVML, INA3221 (Jetson). Where it has none, or
//! does not let this process read them, nothing is said.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Sensors tell power, which is summed up this often. RAPL's counters start again after minutes, never within so little.
const EVERY: Duration = Duration::from_millis(100);

/// What one counter or sensor saw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Energy {
    /// Its name: `package-0`, `dram`, `gpu 0`, `VDD_IN`. Some hold what others count too, so that they have no sum.
    pub source: String,
    /// Of everything that ran there, this program or others.
    pub joules: f64,
    /// Divided by pictures with an answer.
    pub joules_per_image: f64,
}

/// Counts on a thread of its own until it is asked.
pub struct Meter {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Source>>,
}

/// A counter or sensor, with the joules that it has seen.
struct Source {
    name: String,
    kind: Kind,
    joules: f64,
}

enum Kind {
    /// Microjoules in a file, which start again from 0 behind `range`.
    Counter { file: PathBuf, range: f64, last: f64 },
    /// Millivolts and milliamperes.
    Sensor { files: [PathBuf; 2], watts: f64 },
    /// Millijoules since the driver was loaded.
    Gpu { nvml: Arc<Nvml>, index: u32, last: f64 },
}

impl Meter {
    /// Begins to count; nothing where nothing can be read.
    pub fn start() -> Option<Self> {
        let mut sources: Vec<Source> = of_system(Path::new("/sys")).into_iter().chain(gpus()).collect();
        if sources.is_empty() {
            return None;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut last = Instant::now();
            loop {
                let is_last = stopped.load(Ordering::Relaxed);
                let now = Instant::now();
                sources.iter_mut().for_each(|source| source.take(now - last));
                last = now;
                if is_last {
                    return sources;
                }
                std::thread::park_timeout(EVERY);
            }
        });
        Some(Self { stop, thread })
    }

    /// Ends counting, for so many pictures.
    pub fn stop(self, n_images: usize) -> Vec<Energy> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.thread().unpark();
        let sources = self.thread.join().unwrap_or_default();
        let energy = |Source { name, joules, .. }| Energy { source: name, joules, joules_per_image: joules / n_images as f64 };
        sources.into_iter().map(energy).collect()
    }
}

impl Source {
    /// Adds what went through since the last time. What cannot be read any more adds nothing.
    fn take(&mut self, passed: Duration) {
        self.joules += match &mut self.kind {
            Kind::Counter { file, range, last } => number(file).map_or(0.0, |now| replaced(last, now, *range) / 1e6),
            Kind::Gpu { nvml, index, last } => {
                let now = nvml.device_by_index(*index).and_then(|device| device.total_energy_consumption());
                now.map_or(0.0, |now| replaced(last, now as f64, 0.0) / 1e3)
            }
            Kind::Sensor { files, watts } => {
                let now = power(files).unwrap_or(*watts);
                (std::mem::replace(watts, now) + now) / 2.0 * passed.as_secs_f64()
            }
        };
    }
}

/// How much a counter grew since `last`, which becomes `now`.
fn replaced(last: &mut f64, now: f64, range: f64) -> f64 {
    let before = std::mem::replace(last, now);
    if now >= before { now - before } else { (now + range - before).max(0.0) }
}

/// Sources under the folder in which Linux shows devices.
fn of_system(root: &Path) -> Vec<Source> {
    let zones = entries(&root.join("class/powercap")).into_iter().filter_map(|zone| counter(&zone));
    let drivers = entries(&root.join("bus/i2c/drivers"));
    let boards = drivers.into_iter().filter(|driver| file_name(driver).starts_with("ina3221")).flat_map(|driver| entries(&driver));
    let monitors = boards.flat_map(|board| entries(&board.join("hwmon")));
    zones.chain(monitors.flat_map(|monitor| (1..=3).filter_map(move |channel| sensor(&monitor, channel)))).collect()
}

/// A zone of RAPL: a package or what lies beside it. Cores and the rest of a package are counted with it.
fn counter(zone: &Path) -> Option<Source> {
    let is_whole = file_name(zone).matches(':').count() == 1;
    let name = text(&zone.join("name")).filter(|name| is_whole || name == "dram")?;
    let (file, range) = (zone.join("energy_uj"), number(&zone.join("max_energy_range_uj"))?);
    let last = number(&file)?;
    Some(Source { name, kind: Kind::Counter { file, range, last }, joules: 0.0 })
}

fn sensor(monitor: &Path, channel: usize) -> Option<Source> {
    let name = text(&monitor.join(format!("in{channel}_label")))?;
    let files = [format!("in{channel}_input"), format!("curr{channel}_input")].map(|file| monitor.join(file));
    let watts = power(&files)?;
    Some(Source { name, kind: Kind::Sensor { files, watts }, joules: 0.0 })
}

fn gpus() -> Vec<Source> {
    let Ok(nvml) = Nvml::init().map(Arc::new) else { return Vec::new() };
    let gpu = |index: u32| {
        let last = nvml.device_by_index(index).and_then(|device| device.total_energy_consumption()).ok()? as f64;
        Some(Source { name: format!("gpu {index}"), kind: Kind::Gpu { nvml: nvml.clone(), index, last }, joules: 0.0 })
    };
    (0..nvml.device_count().unwrap_or(0)).filter_map(gpu).collect()
}

/// Watts of millivolts and milliamperes.
fn power(files: &[PathBuf; 2]) -> Option<f64> {
    Some(number(&files[0])? * number(&files[1])? / 1e6)
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn text(file: &Path) -> Option<String> {
    Some(fs::read_to_string(file).ok()?.trim().to_owned())
}

fn number(file: &Path) -> Option<f64> {
    text(file)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A system with two packages, memory beside one, and a board's sensor.
    fn system(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("blip2-energy-{}-{name}", std::process::id()));
        for (file, content) in [
            ("class/powercap/intel-rapl:0/name", "package-0"),
            ("class/powercap/intel-rapl:0/energy_uj", "900000"),
            ("class/powercap/intel-rapl:0/max_energy_range_uj", "1000000"),
            ("class/powercap/intel-rapl:0:0/name", "core"),
            ("class/powercap/intel-rapl:0:0/energy_uj", "1"),
            ("class/powercap/intel-rapl:0:0/max_energy_range_uj", "1000000"),
            ("class/powercap/intel-rapl:0:1/name", "dram"),
            ("class/powercap/intel-rapl:0:1/energy_uj", "0"),
            ("class/powercap/intel-rapl:0:1/max_energy_range_uj", "1000000"),
            ("class/powercap/intel-rapl:1/name", "package-1"),
            ("bus/i2c/drivers/ina3221x/7-0040/hwmon/hwmon3/in1_label", "VDD_IN"),
            ("bus/i2c/drivers/ina3221x/7-0040/hwmon/hwmon3/in1_input", "5000"),
            ("bus/i2c/drivers/ina3221x/7-0040/hwmon/hwmon3/curr1_input", "2000"),
        ] {
            let path = root.join(file);
            fs::create_dir_all(path.parent().expect("it has one")).expect("a temporary folder");
            fs::write(path, format!("{content}\n")).expect("a temporary file");
        }
        root
    }

    #[test]
    fn sources_are_those_that_can_be_read_and_hold_no_others() {
        let root = system("found");
        let names: Vec<String> = of_system(&root).into_iter().map(|source| source.name).collect();
        assert_eq!(names, ["package-0", "dram", "VDD_IN"]);
        assert!(of_system(&root.join("nowhere")).is_empty());
        fs::remove_dir_all(root).expect("it was made here");
    }

    #[test]
    fn counters_that_start_again_and_sensors_add_up() {
        let root = system("added");
        let mut sources = of_system(&root);
        let write = |file: &str, content: &str| fs::write(root.join(file), content).expect("a temporary file");
        let mut take = || sources.iter_mut().for_each(|source| source.take(Duration::from_millis(500)));
        write("class/powercap/intel-rapl:0/energy_uj", "950000");
        take();
        write("class/powercap/intel-rapl:0/energy_uj", "50000"); // behind the end of its range
        write("bus/i2c/drivers/ina3221x/7-0040/hwmon/hwmon3/curr1_input", "4000");
        take();
        fs::remove_file(root.join("class/powercap/intel-rapl:0/energy_uj")).expect("it was made here");
        take();
        let joules: Vec<f64> = sources.iter().map(|source| source.joules).collect();
        // 10 W, then from 10 to 20, then 20, half a second each.
        for (found, expected) in joules.iter().zip([0.15, 0.0, 5.0 + 7.5 + 10.0]) {
            assert!((found - expected).abs() < 1e-9, "{joules:?}");
        }
        fs::remove_dir_all(root).expect("it was made here");
    }
}
