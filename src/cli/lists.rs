//! Files that name pictures: one path a line, or pairs of a picture and texts as JSON. They are read as they are needed, so a pipe may
//! bring them line by line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, stdin};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Failure;
use crate::pixels::PixelsError;

/// A picture, or why a list cannot be read there.
pub(super) struct Named {
    pub path: PathBuf,
    /// That stand beside it.
    pub texts: Option<Vec<String>>,
    pub failure: Option<Failure>,
}

impl Named {
    pub fn alone(path: PathBuf) -> Self {
        Self { path, texts: None, failure: None }
    }
}

/// The paths in a file, one a line.
pub(super) fn paths(file: &Path) -> Result<impl Iterator<Item = Named> + Send + use<>, Failure> {
    let (lines, file) = (lines(file)?, file.to_path_buf());
    Ok(lines.filter(|line| line.as_ref().map_or(true, |line| !line.is_empty())).map(move |line| match line {
        Ok(line) => Named::alone(listed(line)),
        Err(error) => broken(&file, error),
    }))
}

/// Pictures and texts in a file of JSON lines, with `image` and the texts' `key`.
pub(super) fn pairs(file: &Path, key: &'static str) -> Result<impl Iterator<Item = Named> + Send + use<>, Failure> {
    let (lines, file) = (lines(file)?.zip(1..), if file == Path::new("-") { "standard input".into() } else { file.to_path_buf() });
    let is_there = |line: &std::io::Result<Vec<u8>>| line.as_ref().map_or(true, |line| !line.trim_ascii().is_empty());
    Ok(lines.filter(move |(line, _)| is_there(line)).map(move |(line, number)| match line {
        Ok(bytes) => pair(&bytes, key).unwrap_or_else(|why| {
            let failure = Some(Failure::Pair { file: file.clone(), line: number, why });
            Named { path: file.clone(), texts: None, failure }
        }),
        Err(error) => broken(&file, error),
    }))
}

fn pair(line: &[u8], key: &str) -> Result<Named, String> {
    let wanted = || format!("a pair is {{\"image\": \"FILE\", \"{key}\": \"TEXT\"}}, with one text or a list of them");
    let Ok(Value::Object(mut found)) = serde_json::from_slice(line) else { return Err(format!("no JSON object; {}", wanted())) };
    let Some(Value::String(image)) = found.remove("image") else { return Err(format!("no `image`; {}", wanted())) };
    let text = |value| if let Value::String(text) = value { Some(text) } else { None };
    let texts = match found.remove(key) {
        Some(Value::Array(texts)) => texts.into_iter().map(text).collect(),
        Some(one) => text(one).map(|text| vec![text]),
        None => None,
    };
    let texts = texts.filter(|texts| !texts.is_empty()).ok_or_else(|| format!("no `{key}`; {}", wanted()))?;
    Ok(Named { texts: Some(texts), ..Named::alone(beside_input(image.into())) })
}

/// Lines without their ends, up to the first that cannot be read.
fn lines(file: &Path) -> Result<impl Iterator<Item = std::io::Result<Vec<u8>>> + Send + use<>, Failure> {
    let lines: Box<dyn Read + Send> = match file == Path::new("-") {
        true => Box::new(stdin()),
        false => match File::open(file) {
            Ok(file) => Box::new(file),
            Err(error) => return Err(Failure::Picture { path: file.to_path_buf(), source: PixelsError::Io(error) }),
        },
    };
    let mut is_broken = false;
    Ok(BufReader::new(lines).split(b'\n').take_while(move |line| !std::mem::replace(&mut is_broken, line.is_err())))
}

fn broken(file: &Path, error: std::io::Error) -> Named {
    let path = file.to_path_buf();
    let failure = Some(Failure::Picture { path: path.clone(), source: PixelsError::Io(error) });
    Named { path, texts: None, failure }
}

fn listed(line: Vec<u8>) -> PathBuf {
    #[cfg(unix)]
    let path = PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(line));
    #[cfg(not(unix))]
    let path = PathBuf::from(String::from_utf8_lossy(&line).trim_end_matches('\r'));
    beside_input(path)
}

/// In a list, `-` is a file like others.
fn beside_input(path: PathBuf) -> PathBuf {
    if path == Path::new("-") { Path::new(".").join(path) } else { path }
}
