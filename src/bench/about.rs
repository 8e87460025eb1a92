//! What records do not say of their run: who was measured, with what, where. The program that wrote them tells it in a document beside.

use std::path::Path;

use serde::Deserialize;

use super::BenchError;
use super::environment::{Load, Machine};
use super::limits::Limits;
use super::report::{Subject, Work};

/// As fields of the same name in a [`super::report::Report`]; each may be missing.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct About {
    /// What was typed.
    pub command: Option<Vec<String>>,
    /// Seconds since 1970, when the run began.
    pub started: Option<u64>,
    /// Seconds that it took.
    pub took_s: Option<f64>,
    /// Whether it came to its end. It did not where nothing is said.
    pub is_complete: bool,
    /// Where.
    pub machine: Option<Machine>,
    /// The machine's load before, and at the end.
    pub load: Option<[Load; 2]>,
    /// What was measured.
    pub subject: Option<Subject>,
    /// What it had to do.
    pub work: Option<Work>,
    /// The most memory that the measured process had resident.
    pub peak_resident_bytes: Option<u64>,
    /// How far stages are from what the machine can do, of each run that the records are from.
    pub limits: Vec<Limits>,
}

impl About {
    /// Of a JSON file.
    pub fn read(path: &Path) -> Result<Self, BenchError> {
        let content = std::fs::read(path).map_err(|source| BenchError::Unreadable { path: path.to_owned(), source })?;
        serde_json::from_slice(&content).map_err(|error| BenchError::NoAbout { path: path.to_owned(), why: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_told_is_missing_and_what_is_misspelt_is_refused() {
        let told: About = serde_json::from_str(r#"{"took_s": 2.5, "is_complete": true}"#).expect("two fields");
        assert_eq!(told, About { took_s: Some(2.5), is_complete: true, ..About::default() });
        let said = serde_json::from_str::<About>(r#"{"complete": true}"#).expect_err("no such field").to_string();
        assert!(said.contains("unknown field `complete`"), "{said}");
    }
}
