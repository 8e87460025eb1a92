//! What may truly be said of pictures, so that a benchmark tells a fast engine from one that is fast and wrong.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::BenchError;

/// How many answers are true.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Truth {
    /// That are true.
    pub n_true: usize,
    /// Whose truth is known.
    pub n_known: usize,
}

/// True answers of pictures, by the input that asks for them.
#[derive(Clone, Debug)]
pub struct Truths(Vec<Option<HashSet<String>>>);

impl Truth {
    /// Nothing where none is known.
    pub fn of(known: impl Iterator<Item = bool>) -> Option<Self> {
        Self::sum(known.map(|holds| Self { n_true: usize::from(holds), n_known: 1 }))
    }

    /// Of several together; nothing of none.
    pub fn sum(truths: impl Iterator<Item = Self>) -> Option<Self> {
        truths.reduce(|sum, one| Self { n_true: sum.n_true + one.n_true, n_known: sum.n_known + one.n_known })
    }

    /// From 0 to 1.
    pub fn share(self) -> f64 {
        self.n_true as f64 / self.n_known as f64
    }
}

impl Truths {
    /// The file of that name beside a picture is taken if none is named.
    pub const FILE: &'static str = "truths.json";

    /// Of a JSON object from pictures, `0.png` or with a question `0.png: how many are there?`, to lists of all that is true; `names` are
    /// inputs as it calls them. An error if it knows none of them.
    pub fn read(path: &Path, names: &[String]) -> Result<Self, BenchError> {
        let content = std::fs::read(path).map_err(|source| BenchError::Unreadable { path: path.to_owned(), source })?;
        let mut known: HashMap<String, HashSet<String>> = serde_json::from_slice(&content).map_err(|error| {
            BenchError::NoTruths { path: path.to_owned(), why: format!("it lists no answers of pictures: {error}") }
        })?;
        let found: Vec<_> = names.iter().map(|name| known.remove(name)).collect();
        if found.iter().all(Option::is_none) {
            let why = format!("it knows nothing of {}", names.first().map_or("pictures", String::as_str));
            return Err(BenchError::NoTruths { path: path.to_owned(), why });
        }
        Ok(Self(found))
    }

    /// The file beside a picture, if there is one.
    pub fn beside(picture: &Path) -> Option<PathBuf> {
        Some(picture.with_file_name(Self::FILE)).filter(|path| path.is_file())
    }

    /// Whether `answer` is true of an input; nothing where that is not known.
    pub fn holds(&self, input: usize, answer: &str) -> Option<bool> {
        Some(self.0.get(input)?.as_ref()?.contains(answer.trim()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &str, names: &[&str]) -> Result<Truths, BenchError> {
        let path = std::env::temp_dir().join(format!("blip2-truths-{}-{}.json", std::process::id(), content.len()));
        std::fs::write(&path, content).expect("a temporary file");
        let found = Truths::read(&path, &names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        std::fs::remove_file(path).expect("it was written");
        found
    }

    #[test]
    fn answers_are_true_of_the_input_that_they_belong_to() {
        let truths =
            read(r#"{"0.png": ["a star", "two objects"], "1.png: how many?": ["one"]}"#, &["0.png", "1.png", "1.png: how many?"])
                .expect("truths");
        for (input, answer, expected) in [
            (0, " a star ", Some(true)),
            (0, "one", Some(false)),
            (1, "one", None),
            (2, "one", Some(true)),
            (2, "a star", Some(false)),
            (3, "one", None),
        ] {
            assert_eq!(truths.holds(input, answer), expected, "{input} {answer}");
        }
    }

    #[test]
    fn files_that_say_nothing_of_these_pictures_are_refused() {
        for (content, part) in
            [("[]", "lists no answers"), (r#"{"9.png": ["a star"]}"#, "knows nothing of 0.png"), ("x", "lists no answers")]
        {
            let error = read(content, &["0.png"]).expect_err("nothing").to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
