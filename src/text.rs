//! Text ↔ token ids. The only door to the `tokenizers` crate.

use std::sync::Arc;

use ndarray::Array2;
use tokenizers::tokenizer::step_decode_stream;
use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{ModelWrapper, PreTokenizerWrapper, Tokenizer};

use crate::bundle::{Bundle, BundleError, CutSide, MAX_TOKENIZER_BYTES, QformerTextFacts};
use crate::decode::TokenId;

/// A tokenizer.
#[derive(Debug)]
pub struct Text(Tokenizer);

/// Why a text cannot become token ids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// It would be read as a command to the model.
    #[error("the text contains `{0}`, which is a special token of this model")]
    SpecialToken(String),
    /// The vocabulary has nothing for it.
    #[error("the text contains `{0}`, which this model's vocabulary cannot write")]
    NotInVocabulary(String),
    /// The tokenizer gives up.
    #[error("the text cannot be tokenized: {0}")]
    Refused(String),
}

/// Token ids of several texts, `[texts, tokens]`, shorter ones filled up on the right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// Token ids.
    pub ids: Array2<i64>,
    /// 1 where a token is, 0 where none is.
    pub mask: Array2<i64>,
}

impl TokenBatch {
    /// Puts texts together.
    pub fn new(texts: &[Vec<TokenId>], pad: TokenId) -> Self {
        let shape = (texts.len(), texts.iter().map(Vec::len).max().unwrap_or(0));
        let token = |(text, at): (usize, usize)| texts[text].get(at).copied();
        Self {
            ids: Array2::from_shape_fn(shape, |place| i64::from(token(place).unwrap_or(pad))),
            mask: Array2::from_shape_fn(shape, |place| i64::from(token(place).is_some())),
        }
    }
}

impl Text {
    /// Loads one of a bundle's tokenizers.
    pub fn open(bundle: &Bundle, file: &str) -> Result<Self, BundleError> {
        let bytes = bundle.read(file, MAX_TOKENIZER_BYTES)?;
        Self::read(&bytes).map_err(|reason| BundleError::Tokenizer {
            folder: bundle.folder().to_path_buf(),
            file: file.into(),
            reason,
        })
    }

    fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
        // A tokenizer file may carry the settings of the program that saved it; a prompt is never cut or filled up quietly.
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        Ok(Self(tokenizer))
    }

    /// The largest token id, added tokens included; ids may have gaps, so there can be fewer tokens than that. Nothing if there are none.
    pub fn largest_id(&self) -> Option<TokenId> {
        self.0.get_vocab(true).into_values().max()
    }

    /// Whether the vocabulary has a token of this id.
    pub fn knows(&self, id: TokenId) -> bool {
        self.0.id_to_token(id).is_some()
    }

    /// Token ids with the tokenizer's own special tokens around them.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, TextError> {
        self.encoded(text, true)
    }

    /// Token ids without special tokens around them.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<TokenId>, TextError> {
        self.encoded(text, false)
    }

    /// Token ids of an answer as it stands behind a prompt: without special tokens, and set off by a space where tokens carry theirs.
    pub fn encode_answer(&self, answer: &str) -> Result<Vec<TokenId>, TextError> {
        let carries_spaces = matches!(self.0.get_pre_tokenizer(), Some(PreTokenizerWrapper::ByteLevel(_)));
        let answer = answer.trim();
        if carries_spaces { self.encoded(&format!(" {answer}"), false) } else { self.encoded(answer, false) }
    }

    fn encoded(&self, text: &str, with_special_tokens: bool) -> Result<Vec<TokenId>, TextError> {
        self.refuse_special_tokens(text)?;
        let encoding = self.0.encode(text, with_special_tokens).map_err(|error| TextError::Refused(error.to_string()))?;
        let mut covered = vec![false; text.len()];
        for (&(from, to), &special) in encoding.get_offsets().iter().zip(encoding.get_special_tokens_mask()) {
            if special == 0 {
                covered[from..to].fill(true);
            }
        }
        self.refuse_unknown(text, &covered, encoding.get_ids(), encoding.get_offsets())?;
        Ok(encoding.get_ids().to_vec())
    }

    fn refuse_special_tokens(&self, text: &str) -> Result<(), TextError> {
        let mut special: Vec<String> =
            self.0.get_added_tokens_decoder().into_values().filter(|t| t.special).map(|t| t.content).collect();
        special.sort();
        match special.into_iter().find(|token| !token.is_empty() && text.contains(token.as_str())) {
            Some(token) => Err(TextError::SpecialToken(token)),
            None => Ok(()),
        }
    }

    /// A tokenizer drops what it has no token for, or puts its unknown token there. Both would change the question unseen.
    fn refuse_unknown(&self, text: &str, covered: &[bool], ids: &[u32], offsets: &[(usize, usize)]) -> Result<(), TextError> {
        let unknown = match self.0.get_model() {
            ModelWrapper::BPE(model) => model.unk_token.as_deref().and_then(|token| self.0.token_to_id(token)),
            ModelWrapper::WordPiece(model) => self.0.token_to_id(&model.unk_token),
            ModelWrapper::WordLevel(model) => self.0.token_to_id(&model.unk_token),
            ModelWrapper::Unigram(_) => self.0.token_to_id("<unk>"),
        };
        if let Some((_, &(from, to))) = ids.iter().zip(offsets).find(|(id, (from, to))| Some(**id) == unknown && to > from) {
            return Err(TextError::NotInVocabulary(text[from..to].trim().into()));
        }
        match text.char_indices().find(|(at, char)| !char.is_whitespace() && !covered[*at]) {
            Some((_, char)) => Err(TextError::NotInVocabulary(char.into())),
            None => Ok(()),
        }
    }

    /// The text of `ids` without special tokens, trimmed.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        // Decoding fails for no input; ids without a token are left out.
        self.0.decode(ids, true).unwrap_or_default().trim_matches(is_space).to_owned()
    }

    /// One token as it is written in the vocabulary; empty for an id without one.
    pub fn token(&self, id: TokenId) -> String {
        self.0.decode(&[id], false).unwrap_or_default()
    }

    /// As [`encode`](Self::encode); what is longer than the Q-Former was trained on loses one end, special tokens stay.
    pub fn encode_cut(&self, text: &str, facts: &QformerTextFacts) -> Result<Vec<TokenId>, TextError> {
        let ids = self.encode(text)?;
        if ids.len() <= facts.max_tokens {
            return Ok(ids);
        }
        let refused = |error: tokenizers::Error| TextError::Refused(error.to_string());
        let mut content = self.0.encode(text, false).map_err(refused)?;
        let n_special = ids.len() - content.len();
        let side = match facts.truncation_side {
            CutSide::Left => TruncationDirection::Left,
            CutSide::Right => TruncationDirection::Right,
        };
        content.truncate(facts.max_tokens.saturating_sub(n_special), 0, side);
        Ok(self.0.post_process(content, None, true).map_err(refused)?.get_ids().to_vec())
    }
}

/// Pieces of text as tokens arrive. Together they are what [`Text::decode`] gives for all tokens at once.
pub struct TextStream {
    text: Arc<Text>,
    /// Tokens from `prefix_index` on, as the tokenizer's own streams keep them.
    ids: Vec<TokenId>,
    prefix: String,
    prefix_index: usize,
    started: bool,
    /// White space that is printed only if more text follows.
    held: String,
}

impl TextStream {
    /// A stream in front of its first token.
    pub fn new(text: Arc<Text>) -> Self {
        Self { text, ids: Vec::new(), prefix: String::new(), prefix_index: 0, started: false, held: String::new() }
    }

    /// The text that `token` completes; empty in the middle of a character.
    pub fn push(&mut self, token: TokenId) -> String {
        let Self { text, ids, prefix, prefix_index, .. } = self;
        let piece = step_decode_stream(&text.0, vec![token], true, ids, prefix, prefix_index).ok().flatten().unwrap_or_default();
        let piece = if self.started { piece.as_str() } else { piece.trim_start_matches(is_space) };
        let text = piece.trim_end_matches(is_space);
        if text.is_empty() {
            self.held.push_str(if self.started { piece } else { "" });
            return String::new();
        }
        self.started = true;
        let whole = std::mem::take(&mut self.held) + text;
        self.held.push_str(&piece[text.len()..]);
        whole
    }
}

/// What Python's `strip` removes, so that texts equal the reference's: white space and the four separators of ASCII.
fn is_space(char: char) -> bool {
    char.is_whitespace() || matches!(char, '\x1c'..='\x1f')
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: &str = r#"{"version": "1.0", "added_tokens": [
        {"id": 5, "content": "</s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}],
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"Ã": 0, "©": 1, "Ġ": 2, "a": 3, "Ċ": 4}, "merges": []}}"#;
    const WORDS: &str = r#"{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "red": 1, "star": 2}, "unk_token": "[UNK]"}}"#;

    fn text(json: &str) -> Text {
        Text(json.parse().unwrap())
    }

    #[test]
    fn what_the_vocabulary_lacks_is_refused_and_not_dropped() {
        assert_eq!(text(BYTES).encode("aé a"), Ok(vec![3, 0, 1, 2, 3]));
        assert_eq!(text(BYTES).encode("a b"), Err(TextError::NotInVocabulary("b".into())));
        assert_eq!(text(WORDS).encode("red star"), Ok(vec![1, 2]));
        assert_eq!(text(WORDS).encode("red moon"), Err(TextError::NotInVocabulary("moon".into())));
    }

    #[test]
    fn special_tokens_are_no_part_of_a_question() {
        assert_eq!(text(BYTES).encode("a </s>"), Err(TextError::SpecialToken("</s>".into())));
    }

    #[test]
    fn a_stream_gives_whole_characters_and_ends_as_the_whole_text() {
        let text = Arc::new(text(BYTES));
        let tokens = [2, 3, 0, 1, 2, 2, 3, 5, 4, 2];
        let mut stream = TextStream::new(text.clone());
        let pieces: Vec<String> = tokens.iter().map(|token| stream.push(*token)).collect();
        assert_eq!(pieces, ["", "a", "", "é", "", "", "  a", "", "", ""]);
        assert_eq!(pieces.concat(), text.decode(&tokens));
    }
}
