//! Where a benchmark writes what it found.

use std::fs::File;
use std::io::{BufWriter, Write, stdout};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::bench::foreign::Format;
use crate::bench::html::page;
use crate::bench::record::Record;
use crate::bench::report::Report;
use crate::cli::Failure;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Output")]
pub(super) struct Outputs {
    /// The report, for `bench compare` and for machines
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Every query in a line of its own, written as it ends
    #[arg(long, value_name = "FILE")]
    jsonl: Option<PathBuf>,
    /// A line a figure
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// The table that standard output gets
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// A page with tables and plots that opens anywhere
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write --json, and --jsonl where there is such a file, as another tool does: aiperf, vllm
    #[arg(long, value_name = "TOOL", default_value_t = Format::Blip2)]
    format: Format,
}

/// Writes every query as it ends.
pub(super) struct Journal(Option<(PathBuf, BufWriter<File>)>, Format);

impl Outputs {
    /// Whether any was asked for.
    pub fn are_named(&self) -> bool {
        [&self.json, &self.jsonl, &self.csv, &self.markdown, &self.html].into_iter().any(Option::is_some)
    }

    /// Makes sure that all files can be written before anything is measured.
    pub fn open(&self) -> Result<Journal, Failure> {
        for path in [&self.json, &self.csv, &self.markdown, &self.html].into_iter().flatten() {
            can_be_written(path)?;
        }
        let journal = self.jsonl.as_ref().map(|path| {
            let file = File::create(path).map_err(|source| unwritable(path, source))?;
            Ok::<_, Failure>((path.clone(), BufWriter::new(file)))
        });
        Ok(Journal(journal.transpose()?, self.format))
    }

    /// Whether a file that is read would be written.
    pub fn are_over(&self, read: &Path) -> bool {
        let place = |path: &Path| path.canonicalize().ok();
        let written = [&self.json, &self.jsonl, &self.csv, &self.markdown, &self.html].into_iter().flatten();
        place(read).is_some_and(|read| written.filter_map(|path| place(path)).any(|path| path == read))
    }

    /// All that were asked for, the table on standard output among them; where one cannot be written, the others are.
    /// `records`: all of the run.
    pub fn write(&self, report: &Report, records: &[Record]) -> Result<(), Failure> {
        let table = report.markdown();
        let json = || match self.format {
            Format::Blip2 => serde_json::to_string_pretty(report).expect("a report is JSON") + "\n",
            format => format!("{:#}\n", format.document(report, records)),
        };
        let written = [
            write(self.json.as_deref(), json),
            write(self.csv.as_deref(), || report.csv()),
            write(self.markdown.as_deref(), || table.clone()),
            write(self.html.as_deref(), || page(std::slice::from_ref(report))),
            stdout().lock().write_all(table.as_bytes()).map_err(Failure::from),
        ];
        written.into_iter().collect() // the first failure
    }
}

impl Journal {
    /// Of a query that ends now.
    pub fn note(&mut self, record: &Record) -> Result<(), Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.note_from(record, now.saturating_sub(Duration::from_secs_f64(record.done_ms.max(0.0) / 1e3)))
    }

    /// `zero`: since 1970, when the record's times begin.
    pub fn note_from(&mut self, record: &Record, zero: Duration) -> Result<(), Failure> {
        let Some((path, file)) = &mut self.0 else { return Ok(()) };
        let line = self.1.line(record, zero);
        writeln!(file, "{line}").and_then(|()| file.flush()).map_err(|source| unwritable(path, source))
    }
}

fn write(path: Option<&Path>, content: impl FnOnce() -> String) -> Result<(), Failure> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, content()).map_err(|source| unwritable(path, source))
}

/// Before anything is measured; what it holds stays until then.
pub(super) fn can_be_written(path: &Path) -> Result<(), Failure> {
    File::options().append(true).create(true).open(path).map(drop).map_err(|source| unwritable(path, source))
}

pub(super) fn unwritable(path: &Path, source: std::io::Error) -> Failure {
    Failure::Report { path: path.to_path_buf(), source }
}
