//! A text on its way out: settled tokens → what can be said of them, and at the end the whole.

use std::sync::Arc;

use super::answer::{Alternative, Candidate, TokenLogProb};
use crate::decode::{Ended, Finish, LogProb, Stop, TokenId};
use crate::text::{Text, TextStream};

/// A text that is being written.
pub(super) struct Writing {
    text: Arc<Text>,
    stream: TextStream,
    eos: Vec<TokenId>,
    stop: Vec<String>,
    tokens: Vec<TokenId>,
    log_probs: Vec<TokenLogProb>,
    /// Everything decoded so far.
    decoded: String,
    /// How much of it was said.
    n_said: usize,
}

/// Ends a text once it holds one of `stop`.
pub(super) fn stop_at(stop: &[String], text: &Arc<Text>, eos: &[TokenId]) -> Option<Stop> {
    if stop.is_empty() {
        return None;
    }
    let (stop, text, eos) = (stop.to_vec(), text.clone(), eos.to_vec());
    Some(Stop(Arc::new(move |tokens| {
        let written = text.decode(&without(tokens, &eos));
        stop.iter().any(|stop| written.contains(stop.as_str()))
    })))
}

fn without(tokens: &[TokenId], eos: &[TokenId]) -> Vec<TokenId> {
    tokens.iter().copied().filter(|token| !eos.contains(token)).collect()
}

impl Writing {
    pub fn new(text: Arc<Text>, eos: &[TokenId], stop: &[String]) -> Self {
        let stream = TextStream::new(text.clone());
        let (eos, stop) = (eos.to_vec(), stop.to_vec());
        Self { text, stream, eos, stop, tokens: Vec::new(), log_probs: Vec::new(), decoded: String::new(), n_said: 0 }
    }

    /// Takes settled tokens; gives the piece of text that they settle.
    pub fn push(&mut self, tokens: &[TokenId], log_probs: &[TokenLogProb]) -> String {
        self.tokens.extend_from_slice(tokens);
        self.log_probs.extend_from_slice(log_probs);
        for token in tokens.iter().filter(|token| !self.eos.contains(token)) {
            let piece = self.stream.push(*token);
            self.decoded.push_str(&piece);
        }
        self.say(self.safe_length())
    }

    /// The texts that came of it, each with its log-probabilities, and the piece that was held back until now: what ended in the middle
    /// of a character, or could have become a stop string.
    pub fn end(&mut self, ended: &Ended) -> (Vec<(Candidate, Vec<TokenLogProb>)>, String) {
        let several = ended.hypotheses.iter().map(|found| {
            let log_probs = found.log_probs.iter().map(|log_prob| self.token(log_prob)).collect();
            (self.candidate(&found.tokens, found.score), log_probs)
        });
        let mut texts: Vec<_> = several.collect();
        if texts.is_empty() {
            texts.push((self.candidate(&self.tokens, None), self.log_probs.clone()));
        }
        let whole = &texts[0].0.text;
        if !whole.starts_with(&self.decoded[..self.n_said]) {
            return (texts, String::new());
        }
        self.decoded.clone_from(whole);
        let piece = self.say(self.decoded.len());
        (texts, piece)
    }

    /// What was written of a text that is given up.
    pub fn so_far(&self) -> (Candidate, Vec<TokenLogProb>) {
        let whole = self.candidate(&self.tokens, None);
        (Candidate { finish: Finish::Cancelled, ..whole }, self.log_probs.clone())
    }

    /// A log-probability with the tokens as the vocabulary writes them.
    pub fn token(&self, found: &LogProb) -> TokenLogProb {
        let text = |token| self.text.token(token);
        let alternative =
            |(token, log_prob): &(TokenId, f32)| Alternative { token: *token, text: text(*token), log_prob: *log_prob };
        let alternatives = found.alternatives.iter().map(alternative).collect();
        TokenLogProb { token: found.token, text: text(found.token), log_prob: found.log_prob, alternatives }
    }

    fn candidate(&self, tokens: &[TokenId], score: Option<f32>) -> Candidate {
        let mut text = self.text.decode(&without(tokens, &self.eos));
        let stopped = self.stop.iter().filter_map(|stop| text.find(stop.as_str())).min();
        if let Some(at) = stopped {
            text.truncate(at);
            text.truncate(text.trim_end().len());
        }
        let ended = stopped.is_some() || tokens.last().is_some_and(|last| self.eos.contains(last));
        let finish = if ended { Finish::Stop } else { Finish::Length };
        Candidate { text, tokens: tokens.to_vec(), finish, score, itm_probability: None }
    }

    /// How much of what was decoded can be said: nothing that is, or may become, a stop string.
    fn safe_length(&self) -> usize {
        let text = &self.decoded;
        let found = self.stop.iter().filter_map(|stop| text.find(stop.as_str())).min();
        let begun =
            |stop: &String| (1..=stop.len()).rev().find(|n| stop.is_char_boundary(*n) && text.ends_with(&stop[..*n])).unwrap_or(0);
        let held = self.stop.iter().map(begun).max().unwrap_or(0);
        let safe = found.unwrap_or(text.len() - held);
        if held > 0 || found.is_some() { text[..safe].trim_end().len() } else { safe }
    }

    fn say(&mut self, up_to: usize) -> String {
        let from = self.n_said;
        self.n_said = from.max(up_to);
        self.decoded[from..self.n_said].to_owned()
    }
}
