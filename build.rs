//! Makes Rust of the definition of gRPC's messages. Tells a release of which revision of its source it is, where that is known; other builds
//! are not told: they would be made anew after every commit.

use std::path::Path;
use std::process::Command;

/// Grows with every commit, and with every change to another one.
const LOG: &str = ".git/logs/HEAD";

/// The messages, and where they stand.
const MESSAGES: (&str, &str) = ("open_inference.proto", "src/server/kserve");

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    make_messages();
    if std::env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    if Path::new(LOG).exists() {
        println!("cargo::rerun-if-changed={LOG}");
    }
    let said = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output().ok().filter(|said| said.status.success());
    if let Some(revision) = said.and_then(|said| String::from_utf8(said.stdout).ok()) {
        println!("cargo::rustc-env=BLIP2_REVISION={}", revision.trim());
    }
}

/// Bytes stay where they came in; there are servers alone.
fn make_messages() {
    let (file, folder) = MESSAGES;
    println!("cargo::rerun-if-changed={folder}/{file}");
    let messages = protox::compile([file], [folder]).expect("the definition is one");
    let made = tonic_prost_build::configure().build_client(false).build_transport(false).bytes(".");
    made.compile_fds(messages).expect("what is made of it can be written");
}
