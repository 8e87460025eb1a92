//! A program that is started for every query, loads a bundle, answers and ends: what it costs to begin from nothing.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use serde::Deserialize;

use super::load::{Query, Target, Told, What};
use crate::timing::milliseconds;

/// The stage before the program's own ones: its start, and loading.
pub const LOADING: &str = "start_and_load";

/// How the program is started.
#[derive(Clone, Debug)]
pub struct Program {
    /// The program.
    pub path: PathBuf,
    /// What stands before and behind the picture.
    pub args: [Vec<OsString>; 2],
    /// Files that the page cache forgets before each start.
    pub forgets: Vec<PathBuf>,
}

/// The program with the pictures that it is given in turn.
pub struct Startup {
    program: Arc<Program>,
    pictures: Vec<PathBuf>,
}

/// What a line of JSON tells of times, in milliseconds.
#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    text: String,
    timings_ms: serde_json::Map<String, serde_json::Value>,
}

impl Startup {
    /// Pictures in files.
    pub fn new(program: Program, pictures: Vec<PathBuf>) -> Self {
        program.forget();
        Self { program: Arc::new(program), pictures }
    }
}

impl Target for Startup {
    fn send(&mut self, query: &Query, to: Told) {
        for (place, input) in query.inputs.iter().enumerate() {
            let (program, picture, told) = (self.program.clone(), self.pictures[*input].clone(), to.about(place));
            let began = Instant::now();
            std::thread::spawn(move || {
                let (answered, end) = program.answer(picture);
                let what = match end {
                    Ok(line) => What::Done { stages_ms: stages(&line, answered - began), output: line.text.into() },
                    Err(why) => What::Failed(why),
                };
                program.forget();
                told.tell_at(answered, what);
            });
        }
    }
}

impl Program {
    /// The first line that it writes, and when that was there; the program has ended then.
    fn answer(&self, picture: PathBuf) -> (Instant, Result<Line, String>) {
        let [before, behind] = &self.args;
        let mut command = Command::new(&self.path);
        command.args(before).arg(picture).args(behind).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return (Instant::now(), Err(format!("{}: {error}", self.path.display()))),
        };
        let mut line = String::new();
        // What it says beside that is short enough for a pipe to hold.
        let read = child.stdout.take().map(|out| BufReader::new(out).read_line(&mut line));
        let answered = Instant::now();
        let ended = child.wait_with_output();
        let found = read.and_then(|_| serde_json::from_str(&line).ok());
        let said = || ended.map(|ended| String::from_utf8_lossy(&ended.stderr).into_owned()).unwrap_or_default();
        (answered, found.ok_or_else(|| said().lines().last().unwrap_or("it said nothing").to_owned()))
    }

    /// Lets the page cache forget files. Where the system does not, the start is not cold, and nothing else is wrong.
    fn forget(&self) {
        for file in self.forgets.iter().filter_map(|path| File::open(path).ok()) {
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
        }
    }
}

/// What the program tells of the answer, behind what is left for its start.
fn stages(line: &Line, whole: Duration) -> Vec<(String, f64)> {
    let told = line.timings_ms.iter().filter(|(name, _)| *name != "total");
    let told: Vec<(String, f64)> = told.filter_map(|(name, time)| Some((name.clone(), time.as_f64()?))).collect();
    let loading = milliseconds(whole) - told.iter().map(|(_, time)| time).sum::<f64>();
    std::iter::once((LOADING.to_owned(), loading.max(0.0))).chain(told).collect()
}
