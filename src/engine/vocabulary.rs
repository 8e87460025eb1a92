//! Tokenizers against the tables that their ids choose from, and against the bundle's own prompts.

use crate::bundle::{Bundle, BundleError, TaskName};
use crate::prompt::{Task, Tokenizers};
use crate::text::Text;

/// `text` belongs to what writes, `read` to what the Q-Former reads.
pub(super) fn check(bundle: &Bundle, text: Option<&Text>, read: Option<&Text>) -> Result<(), BundleError> {
    let facts = bundle.facts();
    if let (Some(text), Some(language)) = (text, &facts.language) {
        check_ids(bundle, bundle.tokenizer(), text, language.vocab_size)?;
        let unknown = language.token_ids.eos.iter().find(|id| !text.knows(**id));
        let without = unknown.map(|id| (format!("end token {id}"), format!("{} has no such token", bundle.tokenizer())));
        without.map_or(Ok(()), |(said, but)| Err(inconsistent(bundle, said, but)))?;
        check_prompts(bundle, text)?;
    }
    let (Some(read), Some(facts)) = (read, &facts.qformer.text) else { return Ok(()) };
    if let Some(n_words) = bundle.n_qformer_words() {
        check_ids(bundle, &facts.tokenizer, read, n_words)?;
    }
    let n_special = read.encode("").map_or(usize::MAX, |read| read.ids.len());
    if facts.max_tokens > n_special {
        return Ok(());
    }
    let said = format!("qformer.text.max_tokens is {}", facts.max_tokens);
    Err(inconsistent(bundle, said, format!("an empty text has {n_special} tokens of {} already", facts.tokenizer)))
}

fn check_ids(bundle: &Bundle, file: &str, text: &Text, room: usize) -> Result<(), BundleError> {
    match text.largest_id() {
        Some(largest) if (largest as usize) < room => Ok(()),
        Some(largest) => {
            Err(inconsistent(bundle, format!("a vocabulary of {room}"), format!("but {file} has a token of id {largest}")))
        }
        None => Err(inconsistent(bundle, format!("a vocabulary of {room}"), format!("but {file} has no tokens"))),
    }
}

/// The bundle's own words must leave room for an answer.
fn check_prompts(bundle: &Bundle, text: &Text) -> Result<(), BundleError> {
    let facts = bundle.facts();
    for task in facts.tasks.iter().filter(|task| matches!(task, TaskName::Caption | TaskName::Ask)) {
        let template = facts.prompts.get(task).map_or("", String::as_str);
        let said = || format!("a prompt for task {task}");
        let prompt = Task::Raw(*task, template.replacen("{}", "", 1)).prompt(bundle, Tokenizers { text, qformer: None });
        let prompt = prompt.map_err(|error| inconsistent(bundle, said(), format!("but {error}")))?;
        if bundle.room_behind(prompt.ids.len()) == 0 {
            return Err(inconsistent(bundle, said(), "which leaves no room for an answer".into()));
        }
    }
    Ok(())
}

fn inconsistent(bundle: &Bundle, said: String, but: String) -> BundleError {
    BundleError::Inconsistent { folder: bundle.folder().to_path_buf(), said, but }
}
