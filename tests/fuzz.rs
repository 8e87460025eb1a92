//! Damaged pictures of every format: none of them may cost more than itself. `cargo test` makes some thousands, `make fuzz` 100,000 or as
//! many as `FUZZ_COUNT` says, of the one that `FUZZ_FORMAT` names if it does; what fails is written to `target/fuzz`.

#![allow(clippy::unwrap_used)]

mod mutate;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use blip2::pixels::{Limits, Picture, Preprocess};
use mutate::{FORMATS, Format, Mutator, hostile};
use serde_json::json;

/// Nothing behind a panic hook of its own may see a panic.
static PANICKED: AtomicBool = AtomicBool::new(false);

const DECODER: &str = "decoder";

const MAX_KIB: u64 = 1_000_000_000 / 1024;

#[test]
fn some_damaged_pictures_of_every_format_are_refused_or_decoded() {
    for format in FORMATS {
        // Without optimisation the same work takes ten times as long, so pictures are smaller and there is more time.
        run(format, 500, Limits { max_pixels: 1 << 20, ..Limits::default() }, Duration::from_secs(20));
    }
}

#[test]
#[ignore = "minutes; `make fuzz` runs it"]
fn many_damaged_pictures_of_every_format_are_refused_or_decoded() {
    let count: usize = std::env::var("FUZZ_COUNT").map_or(100_000, |count| count.parse().unwrap());
    let only = std::env::var("FUZZ_FORMAT").ok();
    for format in FORMATS.into_iter().filter(|format| only.as_ref().is_none_or(|only| only == format.name)) {
        run(format, count.div_ceil(FORMATS.len()), Limits::default(), Duration::from_secs(2));
    }
}

#[test]
fn damaged_pictures_end_the_program_in_order() {
    let folder = tempdir("binary");
    for format in FORMATS {
        let mut mutator = Mutator::new(format, 77);
        let files: Vec<PathBuf> = (0..30).map(|n| folder.join(format!("{n}.{}", format.extensions[0]))).collect();
        files.iter().for_each(|file| std::fs::write(file, mutator.next()).unwrap());
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo-opt");
        let run = Command::new(env!("CARGO_BIN_EXE_blip2"))
            .args(["caption", "--max-new-tokens", "1", "--provider", "cpu", "--model"])
            .arg(model)
            .args(&files)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&run.stderr);
        assert!(matches!(run.status.code(), Some(0 | 3)), "{}: {:?} {errors}", format.name, run.status);
        assert!(!errors.contains("panicked"), "{errors}");
        let n_lines = errors.lines().count() + String::from_utf8_lossy(&run.stdout).lines().count();
        assert!(n_lines >= files.len(), "every picture has its line: {errors}");
    }
}

#[test]
#[ignore = "takes a release build; `make fuzz` runs it"]
fn small_files_that_declare_much_work_are_refused_or_decoded() {
    let mut faults = Vec::new();
    for (name, format, make) in hostile::all() {
        let bytes = make();
        _ = std::fs::write("/proc/self/clear_refs", "5");
        let begun = cpu_time();
        let is_decoded = look(&bytes, &Limits::default());
        let took = cpu_time() - begun;
        println!("{name}: {} bytes, decoded {is_decoded}, {} ms, {} MiB", bytes.len(), took.as_millis(), peak_kib() / 1024);
        // These are as large as a picture may be. Pillow takes 4.1 s for the PNG and 2.8 s for the WebP.
        let fault = fault(took, Duration::from_secs(6));
        faults.extend(fault.map(|fault| format!("{name} {fault}: {}", keep(format, &bytes).display())));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn work_out_of_nothing_is_refused() {
    for (file, reason) in
        [(hostile::many_scans(), "scans of 9459×9459 pixels are too many"), (hostile::tiny_tiles(), "14188500 strips or tiles")]
    {
        let error = Picture::decode(&file, &Limits::default()).unwrap_err();
        assert!(format!("{error:?}").contains(reason), "{error:?}");
    }
}

/// Hears of panics that nothing contains: set before the first picture, so that the decoders' own silence lies over it.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::panic::set_hook(Box::new(|panic| {
            let is_decoder = std::thread::current().name() == Some(DECODER);
            PANICKED.store(is_decoder || PANICKED.load(Ordering::SeqCst), Ordering::SeqCst);
            eprintln!("{panic}");
        }));
    });
}

/// What is decoded at the moment, and since when.
type Current = Arc<Mutex<Option<(Vec<u8>, Instant)>>>;

fn run(format: Format, count: usize, limits: Limits, longest: Duration) {
    watch_panics();
    let current = Current::default();
    let watched = Arc::clone(&current);
    let work = move || work(format, count, &limits, longest, &watched);
    let worker = std::thread::Builder::new().name(DECODER.into()).spawn(work).unwrap();
    while !worker.is_finished() {
        std::thread::sleep(Duration::from_millis(20));
        // The clock on the wall goes on while others have the processor.
        let stuck = current.lock().unwrap().take_if(|(_, since)| since.elapsed() > 60 * longest);
        if let Some((bytes, _)) = stuck {
            eprintln!("{} goes on and on: {}", format.name, keep(format, &bytes).display());
            std::process::exit(1);
        }
    }
    println!("{}", worker.join().unwrap());
}

fn work(format: Format, count: usize, limits: &Limits, longest: Duration, current: &Current) -> String {
    let mut mutator = Mutator::new(format, 1);
    let (mut n_decoded, mut slowest, mut faults) = (0, Duration::ZERO, Vec::new());
    for number in 0..count {
        let bytes = mutator.next();
        *current.lock().unwrap() = Some((bytes.clone(), Instant::now()));
        let begun = cpu_time();
        n_decoded += usize::from(look(&bytes, limits));
        let took = cpu_time() - begun;
        slowest = slowest.max(took);
        if let Some(fault) = fault(took, longest) {
            faults.push(format!("{} number {number} {fault}: {}", format.name, keep(format, &bytes).display()));
            eprintln!("{}", faults[faults.len() - 1]);
        }
    }
    assert!(faults.is_empty(), "{} faults, the first: {}", faults.len(), faults[0]);
    assert!(n_decoded > 0 && n_decoded < count, "{}: {n_decoded} of {count} decoded", format.name);
    let (name, peak, n_refused) = (format.name, peak_kib() / 1024, count - n_decoded);
    format!("{name}: {n_decoded} decoded, {n_refused} refused, slowest {} ms, peak {peak} MiB so far", slowest.as_millis())
}

fn fault(took: Duration, longest: Duration) -> Option<String> {
    if PANICKED.swap(false, Ordering::SeqCst) {
        return Some("panicked aloud".into());
    }
    let peak = peak_kib();
    if peak > MAX_KIB {
        // The next picture has a peak of its own.
        _ = std::fs::write("/proc/self/clear_refs", "5");
        return Some(format!("took {peak} KiB"));
    }
    (took > longest).then(|| format!("took {took:?}"))
}

/// Decodes, and resizes as one or another kind of bundle does.
fn look(bytes: &[u8], limits: &Limits) -> bool {
    let Ok(picture) = Picture::decode(bytes, limits) else { return false };
    assert_eq!(picture.rgb.len(), picture.width as usize * picture.height as usize * 3);
    assert!(picture.alpha().is_none_or(|alpha| alpha.len() * 3 == picture.rgb.len()));
    let resize = if bytes.len().is_multiple_of(2) { json!("square") } else { json!({"shortest_edge": 16}) };
    let how = json!({"size": 16, "alpha": "white", "resize": resize, "center_crop": true, "mean": [0, 0, 0], "std": [1, 1, 1],
        "rescale": 1, "resample": "bicubic"});
    let how: Preprocess = serde_json::from_value(how).unwrap();
    assert!(how.square(&picture).is_some());
    true
}

fn keep(format: Format, bytes: &[u8]) -> PathBuf {
    let path = tempdir("failed").join(format!("{}-{}.{}", format.name, bytes.len(), format.extensions[0]));
    std::fs::write(&path, bytes).unwrap();
    path
}

fn tempdir(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Of this thread: what others do on the machine does not count. Wall time where the system does not tell.
fn cpu_time() -> Duration {
    static BEGUN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let run = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = run.and_then(|run| run.split_whitespace().next()?.parse().ok());
    nanoseconds.map_or_else(|| BEGUN.get_or_init(Instant::now).elapsed(), Duration::from_nanos)
}

/// The most memory that the process ever held; nothing where the system does not tell.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
