//! The program, and folders for what it writes.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

pub fn blip2(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
    command.args(args).env_remove("BLIP2_MODEL").env_remove("BLIP2_SETTINGS").env("BLIP2_PROVIDER", "cpu");
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

pub fn bench(args: &[&str]) -> Command {
    blip2(&[&["bench"], args].concat())
}

#[track_caller]
pub fn ends(output: &Output, code: i32) -> (String, String) {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert_eq!(output.status.code(), Some(code), "{out}{err}");
    assert!(!err.contains("panicked"), "{err}");
    (out, err)
}

pub fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// A folder of a test's own.
pub fn folder(name: &str) -> PathBuf {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or_default().replace("::", "-");
    let folder = std::env::temp_dir().join(format!("blip2-{}-{test}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// The same, which goes with this.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        Self(folder(name))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn file(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub fn write(&self, name: &str, content: &str) -> String {
        std::fs::write(self.file(name), content).unwrap();
        self.file(name)
    }

    /// What a run prints, and its report.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> (String, Value) {
        let json = self.file("report.json");
        let (out, _) = ends(&bench(&[args, &["--json", &json]].concat()).output().unwrap(), 0);
        (out, serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
