//! Threads of the process: alone in its file, because tests that run beside it would be counted too.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use blip2::Engine;
use blip2::runtime::{Provider, ProviderChoice, Runtime, RuntimeOptions};

fn options(threads: usize) -> RuntimeOptions {
    RuntimeOptions { provider: ProviderChoice::Only(Provider::Cpu), threads: threads.try_into().ok(), ..RuntimeOptions::default() }
}

fn count() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

/// How many threads there are once those that opened an engine are gone: the kernel lists a thread for a moment after it was joined.
fn count_at_rest(expected: usize) -> Option<usize> {
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end && count() != Some(expected) {
        std::thread::sleep(Duration::from_millis(5));
    }
    count()
}

#[test]
fn all_sessions_share_one_pool_of_threads() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo-opt");
    let _runtime = Runtime::load(&options(5)).unwrap();
    let Some(pool) = count() else { return eprintln!("skipped: this system does not list a process's threads") };
    assert!(pool > 4, "the thread that runs a graph is the fifth");
    let _engine = Engine::open(&demo, &options(5)).unwrap();
    assert_eq!(count_at_rest(pool), Some(pool), "no session has threads of its own");
    let _other = Engine::open(&demo, &options(2)).unwrap();
    assert_eq!(count_at_rest(pool + 3), Some(pool + 3), "another number of threads is a pool for each of three sessions");
}
