//! A browser without a window, as `make setup-browser` unpacks one.

use std::path::{Path, PathBuf};
use std::process::Command;

pub struct Browser(PathBuf);

impl Browser {
    /// Nothing where it was not unpacked, which is said.
    pub fn find() -> Option<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/browser/unpacked/usr/lib/chromium/chromium-headless-shell");
        if !path.is_file() {
            eprintln!("skipped: there is no browser; `make setup-browser` unpacks one");
        }
        path.is_file().then_some(Self(path))
    }

    /// What stands in a page after its scripts ran. `folder` is for the browser's own files.
    pub fn drawn(&self, folder: &Path, page: &Path, args: &[String]) -> String {
        let mut command = Command::new(&self.0);
        let libraries = self.0.ancestors().nth(2).unwrap().join(format!("{}-linux-gnu", std::env::consts::ARCH));
        // Some of what it loads has a folder of its own there.
        let libraries = format!("{}:{}", libraries.display(), libraries.join("pulseaudio").display());
        command.env("LD_LIBRARY_PATH", libraries).args([
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=5000",
            "--dump-dom",
        ]);
        command.arg(format!("--user-data-dir={}", folder.join("profile").display())).args(args);
        let output = command.arg(format!("file://{}", page.display())).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}
