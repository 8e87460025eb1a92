//! This program once more, for one setting: it loads, warms up, and measures a turn whenever it is told to.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use super::turns::Said;
use crate::bench::turns::Turn;

/// How it ends where it was stopped before all turns.
const STOPPED: i32 = 130;

pub(super) struct Process {
    child: Child,
    input: ChildStdin,
    out: BufReader<ChildStdout>,
    complaints: JoinHandle<Vec<u8>>,
}

impl Process {
    /// `args` stand behind `bench`.
    pub fn start(args: &[OsString]) -> std::io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("bench").args(args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let input = child.stdin.take().expect("it is piped");
        let out = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut err = child.stderr.take().expect("it is piped");
        let complaints = std::thread::spawn(move || {
            let mut all = Vec::new();
            // What cannot be read is not shown.
            let _ = err.read_to_end(&mut all);
            all
        });
        Ok(Self { child, input, out, complaints })
    }

    /// Waits until it is loaded and warm; false where it has ended instead.
    pub fn is_ready(&mut self) -> bool {
        matches!(self.hear(), Some(Said::Ready))
    }

    /// Lets it measure a turn; nothing where it has ended, or none of the turn's queries has an answer.
    pub fn turn(&mut self) -> Option<Turn> {
        self.input.write_all(b"turn\n").and_then(|()| self.input.flush()).ok()?;
        match self.hear()? {
            Said::Turn(turn) => turn,
            Said::Ready => None,
        }
    }

    /// Lets it write its report, and waits; else why it failed.
    pub fn end(self) -> Result<(), String> {
        let Self { mut child, input, mut out, complaints } = self;
        drop(input);
        // The table, which nobody reads.
        let _ = std::io::copy(&mut out, &mut std::io::sink());
        let said = complaints.join().unwrap_or_default();
        let status = child.wait().map_err(|error| error.to_string())?;
        if status.success() || status.code() == Some(STOPPED) {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&said);
        let last = said.lines().rfind(|line| !line.trim().is_empty()).map(|line| line.trim_start_matches("blip2: ").to_owned());
        Err(match status.code() {
            Some(_) => last.unwrap_or_else(|| format!("it ended with {status}")),
            None => format!("it ended by {status}"),
        })
    }

    fn hear(&mut self) -> Option<Said> {
        let mut line = String::new();
        match self.out.read_line(&mut line) {
            Ok(n) if n > 0 => serde_json::from_str(&line).ok(),
            _ => None,
        }
    }
}
