//! A file of records, one a line → records: what a run wrote with every query, or what another program wrote in the same form.

use std::path::Path;

use super::BenchError;
use super::record::Record;

/// Records as a file has them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Log {
    /// In the order of the file.
    pub records: Vec<Record>,
    /// Whether its last line ends in the middle, as where a program was killed; that line is left out.
    pub is_cut: bool,
}

impl Log {
    /// Every line must hold a record, but a last one that was cut short.
    pub fn read(path: &Path) -> Result<Self, BenchError> {
        let content = std::fs::read(path).map_err(|source| BenchError::Unreadable { path: path.to_owned(), source })?;
        let n_lines = content.split(|byte| *byte == b'\n').count();
        let mut log = Self::default();
        for (i, line) in content.split(|byte| *byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice::<Record>(line) {
                Err(error) if error.is_eof() && i + 1 == n_lines => log.is_cut = true,
                Err(error) => return Err(no_record(path, i, without_place(&error))),
                Ok(record) => log.records.push(in_order(record).map_err(|why| no_record(path, i, why.into()))?),
            }
        }
        Ok(log)
    }
}

fn no_record(path: &Path, i: usize, why: String) -> BenchError {
    BenchError::NoRecord { path: path.to_owned(), line: i + 1, why }
}

/// Lines are counted here, not by who reads one.
fn without_place(error: &serde_json::Error) -> String {
    let said = error.to_string();
    said.split(" at line ").next().unwrap_or_default().to_owned()
}

/// Nothing is sent before it is due, or ends before it is sent.
fn in_order(record: Record) -> Result<Record, &'static str> {
    if record.sent_ms < record.scheduled_ms {
        return Err("`sent_ms` lies before `scheduled_ms`");
    }
    if record.done_ms < record.sent_ms || record.first_token_ms.is_some_and(|first| first < record.sent_ms) {
        return Err("it ends before `sent_ms`");
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str =
        r#"{"index":0,"input":"é.png","n_pictures":1,"scheduled_ms":1,"sent_ms":2,"done_ms":12,"n_tokens":0,"output":""}"#;

    /// What is read of a file with this content.
    fn read(name: &str, content: &[u8]) -> Result<Log, String> {
        let path = std::env::temp_dir().join(format!("blip2-log-{}-{name}.jsonl", std::process::id()));
        std::fs::write(&path, content).expect("a temporary file");
        let read = Log::read(&path).map_err(|error| error.to_string());
        std::fs::remove_file(path).expect("it was written");
        read
    }

    #[test]
    fn a_log_that_ends_anywhere_keeps_its_whole_lines() {
        let two = format!("{LINE}\n{LINE}\n");
        for n in 0..=two.len() {
            let log = read("cut", &two.as_bytes()[..n]).expect("whole lines and a part of one");
            // The line's end is no part of its record.
            let (n_whole, left) = ((n + 1) / (LINE.len() + 1), (n + 1) % (LINE.len() + 1));
            assert_eq!((log.records.len(), log.is_cut), (n_whole, left > 1), "{n}");
        }
    }

    #[test]
    fn a_line_that_is_no_record_is_named() {
        for (line, part) in [
            ("{}", "line 2 is no record: missing field `index`"),
            ("nonsense", "line 2 is no record: expected"),
            (&LINE[..40], "line 2 is no record: EOF"),
            (&LINE.replace(r#""sent_ms":2"#, r#""sent_ms":0"#), "`sent_ms` lies before `scheduled_ms`"),
            (&LINE.replace(r#""done_ms":12"#, r#""done_ms":1.5"#), "it ends before `sent_ms`"),
        ] {
            let said = read("bad", format!("{LINE}\n{line}\n{LINE}\n").as_bytes()).expect_err(line);
            assert!(said.contains(part) && !said.contains("column"), "{said}");
        }
    }
}
