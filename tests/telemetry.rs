//! Nothing is sent, and nothing kept, that could be.

#![allow(clippy::unwrap_used)]
#![cfg(unix)]

use std::process::Command;

#[test]
fn onnx_runtime_reports_to_nobody() {
    // It would keep an identity of the machine and of the session in the user's folders, and send from there.
    let home = std::env::temp_dir().join(format!("blip2-telemetry-{}", std::process::id()));
    std::fs::create_dir_all(&home).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(["caption", "--provider", "cpu", "--model", "tests/bundles/t5", "models/samples/0.png"]);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env("HOME", &home).env("TMPDIR", &home);
    command.env_remove("BLIP2_MODEL").env_remove("XDG_CACHE_HOME").env_remove("ORT_DISABLE_TELEMETRY");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let left: Vec<_> = std::fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
    std::fs::remove_dir_all(&home).unwrap();
}
