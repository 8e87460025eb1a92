//! Text ↔ token ids. The only door to the `tokenizers` crate.

use std::collections::HashSet;
use std::sync::Arc;

use ndarray::Array2;
use tokenizers::tokenizer::normalizer::Range;
use tokenizers::tokenizer::step_decode_stream;
use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{Encoding, ModelWrapper, NormalizedString, Normalizer, PreTokenizerWrapper, Tokenizer};

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
    /// The vocabulary has nothing for it, and a caller wants every character read.
    #[error("the text contains `{0}`, which this model's vocabulary cannot write")]
    NotInVocabulary(String),
    /// The tokenizer gives up.
    #[error("the text cannot be tokenized: {0}")]
    Refused(String),
}

/// What becomes of a text otherwise than its writer may think. In one line, but for control characters of the text itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// As the reference does it, the unknown token stands for these pieces of `text`, or nothing.
    NotInVocabulary {
        /// The pieces, in their order, none twice.
        pieces: Vec<String>,
        /// The text, shortened.
        text: String,
    },
    /// The Q-Former was trained on shorter texts.
    Cut {
        /// Tokens that are not read.
        n_cut: usize,
        /// The text, shortened.
        text: String,
    },
    /// The model has too few positions for the smallest length.
    NoRoom {
        /// Tokens that were to be written at least.
        wanted: usize,
        /// Tokens that fit.
        room: usize,
    },
}

/// Token ids of a text, and what they do not hold of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The ids.
    pub ids: Vec<TokenId>,
    /// Pieces that the vocabulary has nothing for, in their order, none twice: the unknown token stands for them, or nothing.
    pub unknown: Vec<String>,
    /// Tokens that were cut off.
    pub n_cut: usize,
}

/// Pieces that a warning spells out.
const NAMED: usize = 5;
/// Characters of a text that a message repeats.
const REPEATED: usize = 60;

/// The beginning of a text, for messages.
pub fn shortened(text: &str) -> String {
    match text.char_indices().nth(REPEATED) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

impl Warning {
    /// What there is to say about `text`.
    pub(crate) fn about(text: &str, unknown: Vec<String>, n_cut: usize) -> Vec<Self> {
        let unknown = (!unknown.is_empty()).then(|| Self::NotInVocabulary { pieces: unknown, text: shortened(text) });
        let cut = (n_cut > 0).then(|| Self::Cut { n_cut, text: shortened(text) });
        unknown.into_iter().chain(cut).collect()
    }

    /// Refuses what the vocabulary lacks, for callers that want every character read.
    pub fn refuse_unknown(warnings: &[Self]) -> Result<(), TextError> {
        let lacks = |warning: &Self| match warning {
            Self::NotInVocabulary { pieces, .. } => pieces.first().cloned(),
            Self::Cut { .. } | Self::NoRoom { .. } => None,
        };
        warnings.iter().find_map(lacks).map_or(Ok(()), |piece| Err(TextError::NotInVocabulary(piece)))
    }
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotInVocabulary { pieces, text } => {
                let named: Vec<String> = pieces.iter().take(NAMED).map(|piece| format!("`{piece}`")).collect();
                let more = pieces.len().saturating_sub(NAMED);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                let named = named.join(", ");
                write!(f, "not in the vocabulary, so read as the unknown token or not at all: {named}{more}, in: {text}")
            }
            Self::Cut { n_cut, text } => {
                write!(f, "a text is {n_cut} tokens longer than the Q-Former was trained on; the rest is not read: {text}")
            }
            Self::NoRoom { wanted, room } => {
                write!(f, "at least {wanted} new tokens are wanted; this model's positions leave room for {room}")
            }
        }
    }
}

impl serde::Serialize for Warning {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
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
    pub fn encode(&self, text: &str) -> Result<Encoded, TextError> {
        self.encoded(text, true)
    }

    /// Token ids without special tokens around them.
    pub fn encode_plain(&self, text: &str) -> Result<Encoded, TextError> {
        self.encoded(text, false)
    }

    /// Token ids of an answer as it stands behind a prompt: without special tokens, and set off by a space where tokens carry theirs.
    pub fn encode_answer(&self, answer: &str) -> Result<Encoded, TextError> {
        let carries_spaces = matches!(self.0.get_pre_tokenizer(), Some(PreTokenizerWrapper::ByteLevel(_)));
        let answer = answer.trim();
        if carries_spaces { self.encoded(&format!(" {answer}"), false) } else { self.encoded(answer, false) }
    }

    /// As [`encode`](Self::encode); what is longer than the Q-Former was trained on loses one end, special tokens stay.
    pub fn encode_cut(&self, text: &str, facts: &QformerTextFacts) -> Result<Encoded, TextError> {
        let whole = self.encode(text)?;
        let n_cut = whole.ids.len().saturating_sub(facts.max_tokens);
        if n_cut == 0 {
            return Ok(whole);
        }
        let mut content = self.encoding(text, false)?;
        let n_special = whole.ids.len() - content.len();
        let side = match facts.truncation_side {
            CutSide::Left => TruncationDirection::Left,
            CutSide::Right => TruncationDirection::Right,
        };
        content.truncate(facts.max_tokens.saturating_sub(n_special), 0, side);
        let cut = self.0.post_process(content, None, true).map_err(|error| TextError::Refused(error.to_string()))?;
        Ok(Encoded { ids: cut.get_ids().to_vec(), n_cut, ..whole })
    }

    fn encoded(&self, text: &str, with_special_tokens: bool) -> Result<Encoded, TextError> {
        self.refuse_special_tokens(text)?;
        let encoding = self.encoding(text, with_special_tokens)?;
        Ok(Encoded { ids: encoding.get_ids().to_vec(), unknown: self.unknown(text, &encoding), n_cut: 0 })
    }

    fn encoding(&self, text: &str, with_special_tokens: bool) -> Result<Encoding, TextError> {
        self.0.encode(text, with_special_tokens).map_err(|error| TextError::Refused(error.to_string()))
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

    /// Pieces for which the unknown token stands, and characters that no token covers. White space is no part of what a text says.
    fn unknown(&self, text: &str, encoding: &Encoding) -> Vec<String> {
        let (unknown, mut covered, mut found) = (self.unknown_token(), vec![false; text.len()], Vec::new());
        for (index, &(from, to)) in encoding.get_offsets().iter().enumerate() {
            if encoding.get_special_tokens_mask()[index] == 0 {
                covered[from..to].fill(true);
                let is_unknown = to > from && Some(encoding.get_ids()[index]) == unknown;
                found.extend(text.get(from..to).filter(|_| is_unknown).map(|piece| (from, trimmed(piece))));
            }
        }
        let (normal, mut kept) = (self.normal(text), vec![false; text.len()]);
        for (at, char) in normal.get().char_indices() {
            let from = normal.convert_offsets(Range::Normalized(at..at + char.len_utf8()));
            from.into_iter().for_each(|from| kept[from].fill(true));
        }
        let is_read = |(at, char): &(usize, char)| char.is_whitespace() || (covered[*at] && kept[*at]);
        for (at, char) in text.char_indices().filter(|place| !is_read(place)) {
            if self.drops(char, text, normal.get()) {
                found.push((at, &text[at..at + char.len_utf8()]));
            }
        }
        found.sort_unstable();
        let mut there = HashSet::new();
        found.into_iter().filter(|(_, piece)| there.insert(*piece)).map(|(_, piece)| piece.to_owned()).collect()
    }

    fn unknown_token(&self) -> Option<TokenId> {
        match self.0.get_model() {
            ModelWrapper::BPE(model) => model.unk_token.as_deref().and_then(|token| self.0.token_to_id(token)),
            ModelWrapper::WordPiece(model) => self.0.token_to_id(&model.unk_token),
            ModelWrapper::WordLevel(model) => self.0.token_to_id(&model.unk_token),
            ModelWrapper::Unigram(_) => self.0.token_to_id("<unk>"),
        }
    }

    /// Whether a character without a token is gone. A normaliser that made one character of it and its neighbour has read it.
    fn drops(&self, char: char, text: &str, normal: &str) -> bool {
        normal.contains(char) || self.normal(&text.replace(char, "")).get() == normal
    }

    fn normal(&self, text: &str) -> NormalizedString {
        let mut normal = NormalizedString::from(text);
        if let Some(normalizer) = self.0.get_normalizer() {
            // What cannot be normalised cannot be encoded either, which was reported before.
            let _ = normalizer.normalize(&mut normal);
        }
        normal
    }

    /// The text of `ids` without special tokens, trimmed.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        // Decoding fails for no input; ids without a token are left out.
        self.0.decode(ids, true).unwrap_or_default().trim_matches(is_space).to_owned()
    }

    /// Whether a token may change text before it: `transformers` takes the space away in front of a full stop, and within ` ' `.
    fn tidies(&self) -> bool {
        serde_json::to_string(&self.0.get_decoder()).is_ok_and(|decoder| decoder.contains(r#""pattern":{"String":" "#))
    }

    /// One token as it is written in the vocabulary; empty for an id without one.
    pub fn token(&self, id: TokenId) -> String {
        self.0.decode(&[id], false).unwrap_or_default()
    }
}

/// Pieces of text as tokens arrive. Together they are what [`Text::decode`] gives for all tokens at once, or the beginning of it.
pub struct TextStream {
    text: Arc<Text>,
    tidies: bool,
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
        let tidies = text.tidies();
        Self { text, tidies, ids: Vec::new(), prefix: String::new(), prefix_index: 0, started: false, held: String::new() }
    }

    /// The text that `token` completes; empty in the middle of a character.
    pub fn push(&mut self, token: TokenId) -> String {
        if self.tidies {
            return self.push_words(token);
        }
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

    /// The last word may still change; the end of the text is for the caller to add.
    fn push_words(&mut self, token: TokenId) -> String {
        self.ids.push(token);
        let whole = self.text.decode(&self.ids);
        let steady = whole[..whole.rfind(' ').unwrap_or(0)].trim_end_matches(is_space);
        let piece = steady.strip_prefix(self.prefix.as_str()).unwrap_or_default().to_owned();
        self.prefix.push_str(&piece);
        piece
    }
}

/// What Python's `strip` removes, so that texts equal the reference's: white space and the four separators of ASCII.
fn is_space(char: char) -> bool {
    char.is_whitespace() || matches!(char, '\x1c'..='\x1f')
}

/// A piece without the space that belongs to no word; white space alone stays.
fn trimmed(piece: &str) -> &str {
    match piece.trim_matches(' ') {
        "" => piece,
        trimmed => trimmed,
    }
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

    const LETTERS: &str = r#"{"version": "1.0", "added_tokens": [], "normalizer": NORMALIZER, "pre_tokenizer": null,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -1.0], ["e", -1.0], ["é", -1.0]]}}"#;

    fn found(text: &Text, written: &str) -> (Vec<TokenId>, Vec<String>) {
        let encoded = text.encode(written).unwrap();
        (encoded.ids, encoded.unknown)
    }

    fn pieces(all: &[&str]) -> Vec<String> {
        all.iter().map(|piece| (*piece).to_owned()).collect()
    }

    #[test]
    fn what_the_vocabulary_lacks_becomes_unknown_or_nothing_and_is_named() {
        assert_eq!(found(&text(BYTES), "aé a"), (vec![3, 0, 1, 2, 3], vec![]));
        assert_eq!(found(&text(BYTES), "a 🎉b🎉"), (vec![3, 2], pieces(&["🎉", "b"])));
        assert_eq!(found(&text(WORDS), "red star"), (vec![1, 2], vec![]));
        assert_eq!(found(&text(WORDS), "red moon star moon"), (vec![1, 0, 2, 0], pieces(&["moon"])));
        assert_eq!(found(&text(WORDS), ""), (vec![], vec![]));
        assert_eq!(found(&text(BYTES), "a\0"), (vec![3], pieces(&["\0"])));
    }

    #[test]
    fn what_a_normaliser_drops_is_named_and_what_it_joins_is_not() {
        let normalized = |kind: &str| text(&LETTERS.replace("NORMALIZER", kind));
        let bert = normalized(
            r#"{"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}"#,
        );
        assert_eq!(found(&bert, "a\u{200d}b"), (vec![1, 2], pieces(&["\u{200d}"])));
        assert_eq!(found(&bert, "Aé"), (vec![1, 3], vec![]));
        assert_eq!(found(&bert, "ae\u{301}\0"), (vec![1, 3], pieces(&["\u{301}", "\0"])));
        let composed = normalized(r#"{"type": "NFC"}"#);
        assert_eq!(found(&composed, "ae\u{301}"), (vec![1, 4], vec![]));
        assert_eq!(found(&composed, "a\nb"), (vec![1, 0, 2], pieces(&["\n"])));
    }

    #[test]
    fn a_warning_names_some_pieces_and_repeats_no_long_text() {
        let unknown: Vec<String> = ('α'..='ω').map(String::from).collect();
        let [warning] = &Warning::about(&"long ".repeat(1000), unknown, 0)[..] else { panic!("one warning") };
        let said = warning.to_string();
        assert!(said.contains("`α`, `β`, `γ`, `δ`, `ε` and 20 more") && said.chars().count() < 200, "{said}");
        let refused = Warning::refuse_unknown(std::slice::from_ref(warning));
        assert_eq!(refused, Err(TextError::NotInVocabulary("α".into())));
        let cut = Warning::about("short", vec![], 3);
        assert!(cut[0].to_string().ends_with("not read: short") && Warning::refuse_unknown(&cut).is_ok());
        assert_eq!(Warning::about("short", vec![], 0), []);
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

    #[test]
    fn a_stream_takes_nothing_back_that_it_gave() {
        let replaced = [" .", " ' ", " n't"]
            .map(|found| format!(r#"{{"type": "Replace", "pattern": {{"String": "{found}"}}, "content": "{}"}}"#, found.trim()));
        let decoder = format!(r#""decoder": {{"type": "Sequence", "decoders": [{{"type": "Fuse"}}, {}]}}"#, replaced.join(", "));
        let words = [" it", " '", " s", " do", " n't", " ."];
        let vocab: Vec<String> = words.iter().enumerate().map(|(id, word)| format!(r#""{word}": {id}"#)).collect();
        let json = format!(
            r#"{{"version": "1.0", "added_tokens": [], {decoder},
                "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": " it"}}}}"#,
            vocab.join(", ")
        );
        let text = Arc::new(text(&json));
        let mut stream = TextStream::new(text.clone());
        let pieces: Vec<String> = (0..words.len() as TokenId).map(|token| stream.push(token)).collect();
        let whole = text.decode(&[0, 1, 2, 3, 4, 5]);
        assert_eq!(whole, "it's don't.");
        assert_eq!(pieces, ["", "it", "", "'s", "", ""]);
        assert!(whole.starts_with(&pieces.concat()));
    }
}
