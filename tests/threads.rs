//! Threads of the process: alone in its file, because tests that run beside it would be counted too.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use blip2::Engine;
use blip2::runtime::{Provider, ProviderChoice, Runtime, RuntimeOptions};

fn options(threads: usize) -> RuntimeOptions {
    RuntimeOptions { provider: ProviderChoice::Only(Provider::Cpu), threads: threads.try_into().ok(), ..RuntimeOptions::default() }
}

fn count() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

#[test]
fn all_sessions_share_one_pool_of_threads() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo-opt");
    let _runtime = Runtime::load(&options(5)).unwrap();
    let Some(pool) = count() else { return eprintln!("skipped: this system does not list a process's threads") };
    assert!(pool > 4, "the thread that runs a graph is the fifth");
    let _engine = Engine::open(&demo, &options(5)).unwrap();
    assert_eq!(count(), Some(pool), "no session has threads of its own");
    let _other = Engine::open(&demo, &options(2)).unwrap();
    assert_eq!(count(), Some(pool + 3), "another number of threads is a pool for each of three sessions");
}
