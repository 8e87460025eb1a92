//! JSON files that say what they are and in which version.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::BenchError;

/// What every one of them begins with.
#[derive(Deserialize)]
struct Head {
    schema: String,
    version: u32,
}

/// What a file of this schema and version holds. `none` makes an error of why it is no such file, `otherwise` says so of one without a head.
pub(super) fn read<T: DeserializeOwned>(
    path: &Path,
    (schema, version): (&str, u32),
    otherwise: &str,
    none: impl Fn(String) -> BenchError,
) -> Result<T, BenchError> {
    let content = std::fs::read(path).map_err(|source| BenchError::Unreadable { path: path.to_owned(), source })?;
    let head: Head = serde_json::from_slice(&content).map_err(|_| none(otherwise.into()))?;
    if head.schema != schema || head.version != version {
        let found = format!("it is {} version {}", head.schema, head.version);
        return Err(none(format!("{found}, and this program reads {schema} version {version}")));
    }
    serde_json::from_slice(&content).map_err(|error| none(error.to_string()))
}
