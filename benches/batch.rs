//! Pictures a second through the binary, start included, by batch: what `DEFAULT_BATCH` of the command line rests on. `BLIP2_MODEL` names
//! another bundle than the demo, `PICTURES` a file with other pictures than the samples, one path a line.

#![allow(missing_docs)]

use std::process::{Command, Stdio};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Each sample so often, that the start hardly counts; once where it is only tried.
const ROUNDS: usize = if cfg!(debug_assertions) { 1 } else { 8 };
const BATCHES: [usize; 4] = [1, 4, 8, 16];

fn samples() -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/samples");
    (0..6 * ROUNDS).map(|index| format!("{folder}/{}.png\n", index % 6)).collect()
}

fn run(list: &str, options: &[&str]) {
    let args = ["caption", "--images-from", list, "--provider", "cpu"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    let done = command.args(args).args(options).current_dir(env!("CARGO_MANIFEST_DIR")).stdout(Stdio::null()).status();
    assert!(done.is_ok_and(|status| status.success()), "the captions are written");
}

fn batches(c: &mut Criterion) {
    let own = std::env::temp_dir().join(format!("blip2-bench-{}.txt", std::process::id()));
    let list = std::env::var("PICTURES").unwrap_or_else(|_| {
        std::fs::write(&own, samples()).expect("the temporary folder takes a list of pictures");
        own.to_string_lossy().into_owned()
    });
    let n_pictures = std::fs::read_to_string(&list).expect("PICTURES names a list").lines().filter(|line| !line.is_empty()).count();
    for (name, search) in [("the bundle's beams", &[][..]), ("greedy", &["--beams", "1"])] {
        let mut group = c.benchmark_group(format!("batch: captions, {name}"));
        group.throughput(Throughput::Elements(n_pictures as u64));
        for batch in BATCHES {
            let batch_option = format!("--batch={batch}");
            let options = [search, &[batch_option.as_str()]].concat();
            group.bench_function(BenchmarkId::from_parameter(batch), |b| b.iter(|| run(&list, &options)));
        }
        group.finish();
    }
    let _ = std::fs::remove_file(own);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_secs(1));
    targets = batches
}
criterion_main!(benches);
