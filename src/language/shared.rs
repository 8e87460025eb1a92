//! Query tokens that several prompts stand behind, as where many questions are asked of one picture: the language model reads them once.

use super::cache::Cache;
use super::decoder::Opening;
use crate::qformer::Queries;

/// Query tokens that were read without a prompt, a slot each.
#[derive(Debug)]
pub struct Shared {
    queries: Vec<Queries>,
    cache: Cache,
}

impl Shared {
    /// What was read of these.
    pub fn new(queries: &[&Queries], cache: Cache) -> Self {
        Self { queries: queries.iter().copied().cloned().collect(), cache }
    }

    /// Their keys and values.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The slot of these query tokens, if they were read.
    pub fn slot(&self, queries: &Queries) -> Option<usize> {
        self.queries.iter().position(|known| known.is(queries))
    }

    /// Whether all of these were read.
    pub fn has(&self, queries: &[&Queries]) -> bool {
        queries.iter().all(|queries| self.slot(queries).is_some())
    }
}

/// The query tokens that each of these begins with; nothing where one begins otherwise, or ends with them.
pub fn beginnings<'a>(openings: &[Opening<'a>]) -> Option<Vec<&'a Queries>> {
    openings.iter().map(|opening| opening.queries.filter(|_| opening.cached.is_none() && !opening.tokens.is_empty())).collect()
}

/// Each of these once.
pub fn distinct<'a>(queries: &[&'a Queries]) -> Vec<&'a Queries> {
    let mut found: Vec<&Queries> = Vec::new();
    for queries in queries {
        if found.iter().all(|known| !known.is(queries)) {
            found.push(queries);
        }
    }
    found
}
