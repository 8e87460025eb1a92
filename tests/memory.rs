//! Memory: what `inspect --memory` reckons is what the process takes, and a limit holds before anything is loaded.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn command<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(args).env_remove("BLIP2_MODEL").env("BLIP2_PROVIDER", "cpu").current_dir(root());
    command
}

fn said(output: &Output) -> (String, String) {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    (out, err)
}

/// Bytes that `inspect --memory` gives a line.
fn reckoned(model: &str, batch: &str, line: &str) -> f64 {
    let (out, err) = said(&command(["inspect", model, "--memory", "--batch", batch]).output().unwrap());
    let found = out.lines().find_map(|found| found.strip_prefix(line)).unwrap_or_else(|| panic!("no `{line}` in {out}{err}"));
    found.trim().split(' ').next().unwrap().parse::<f64>().unwrap() * 1e6
}

/// What the release and its libraries show of their files. A program that is not optimised shows more, and the system decides how much.
const FILES: f64 = 34e6;

/// Most bytes that a process of the release holds which writes captions of so many pictures; nothing where the system does not say.
fn measured(model: &str, batch: &str, n_pictures: usize) -> Option<f64> {
    let args = ["caption", "--model", model, "--batch", batch, "--images-from", "-"];
    let mut child = command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let list: String = (0..n_pictures).map(|index| format!("models/samples/{}.png\n", index % 6)).collect();
    let mut input = child.stdin.take().unwrap();
    input.write_all(list.as_bytes()).unwrap();
    let n_lines = BufReader::new(child.stdout.take().unwrap()).lines().take(n_pictures).count();
    assert_eq!(n_lines, n_pictures);
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).ok();
    drop(input);
    child.wait().unwrap();
    let status = status?;
    let kilobytes =
        |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse::<f64>().ok());
    Some((kilobytes("VmHWM:")? - kilobytes("RssFile:")?) * 1024.0 + FILES)
}

#[test]
fn what_is_reckoned_is_what_is_taken() {
    for (model, batch, n_pictures) in [("models/demo-opt", "8", 24), ("models/demo-opt", "1", 1), ("tests/bundles/t5", "8", 24)] {
        let Some(measured) = measured(model, batch, n_pictures) else { return eprintln!("skipped: no /proc/PID/status here") };
        let reckoned = reckoned(model, batch, "peak");
        let ratio = reckoned / measured;
        eprintln!("{model}, batch {batch}: {:.1} MB reckoned, {:.1} MB taken", reckoned / 1e6, measured / 1e6);
        assert!((0.85..1.15).contains(&ratio), "{model}, batch {batch}: {reckoned} bytes reckoned, {measured} taken");
    }
}

#[test]
fn a_limit_holds_before_anything_is_loaded() {
    // It is shown rounded.
    let peak = reckoned("models/demo-opt", "1", "peak") + 1e5;
    let run = |limit: &str, more: &[&str]| {
        let args = ["caption", "--memory-limit", limit, "models/samples/0.png", "models/samples/1.png"];
        let output = command(args.into_iter().chain(more.iter().copied())).output().unwrap();
        let (out, err) = said(&output);
        (output.status.code(), out, err)
    };
    let (code, out, err) = run("40MB", &[]);
    assert!(code == Some(5) && out.is_empty() && err.lines().count() == 1, "{err}");
    for part in ["models/demo-opt: it takes ", " for the program + 13 MB of weights + ", "; 40 MB may be taken (memory-limit); "] {
        assert!(err.contains(part), "`{part}` is not in: {err}");
    }
    let (code, out, err) = run(&format!("{peak}"), &["--beams", "1"]);
    assert!(code == Some(0) && out.lines().count() == 2, "{err}");
    let (code, out, err) = run(&format!("{peak}"), &["--batch", "1000"]);
    assert!(code == Some(0) && out.lines().count() == 2 && err.contains(" of 1000 pictures together"), "{err}");
    let (code, _, err) = run(&format!("{peak}"), &["--beams", "400"]);
    assert!(code == Some(2) && err.contains("400 rows of 64 positions"), "what is left is for keys and values: {err}");
    for limit in ["0", "much", "1 TB", "-1", "99999999999999GiB", ""] {
        let (code, _, err) = run(limit, &[]);
        let wanted = if limit == "0" { 5 } else { 2 };
        assert!(code == Some(wanted) && !err.contains("panicked"), "`{limit}`: {err}");
    }
    let bound = command(["caption", "models/samples/0.png"]).env("BLIP2_MEMORY_LIMIT", "1MiB").output().unwrap();
    assert_eq!(bound.status.code(), Some(5));
}
