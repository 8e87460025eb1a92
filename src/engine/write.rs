//! Texts about what was seen.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Engine, Reader, Sight};
use crate::decode::{Ends, Event, Finish, Processors, RequestId, Stop, Strategy, TokenId, log_softmax};
use crate::error::Error;
use crate::language::{Prefix, Seen};
use crate::pixels::Picture;
use crate::prompt::{Prompt, Task};
use crate::text::{Text, TextStream, TokenBatch, Warning};
use crate::timing::{Stage, Timings};
use crate::vision::ImageFeatures;

/// One text that is wanted.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The picture.
    pub sight: &'a Sight,
    /// What is asked of it.
    pub task: Task,
    /// How to write it.
    pub generation: Generation,
}

/// How a text is written. Whatever is absent comes from the bundle.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// Tokens to write at most. The model's positions limit it further.
    pub max_new_tokens: Option<usize>,
    /// What changes scores before a token is chosen.
    pub processors: Processors,
    /// How tokens are chosen.
    pub strategy: Strategy,
    /// The text ends before the first of these.
    pub stop: Vec<String>,
    /// Log-probabilities of the tokens, each with as many alternatives.
    pub log_probs: Option<usize>,
}

/// A finished text.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The text, trimmed.
    pub text: String,
    /// Its tokens, the end token included.
    pub tokens: Vec<TokenId>,
    /// Why it ended.
    pub finish: Finish,
    /// Sum of log-probabilities / length ^ penalty, where beam search found the text.
    pub score: Option<f32>,
    /// Where several texts were wanted, all of them, this one first.
    pub candidates: Vec<Candidate>,
    /// Of each token, where they were wanted.
    pub log_probs: Vec<TokenLogProb>,
    /// What was not read or written as it was asked for.
    pub warnings: Vec<Warning>,
    /// Every stage on the way, those that the picture took included. Requests that ran together share their time in full.
    pub timings: Timings,
}

/// One of several texts.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Candidate {
    /// The text, trimmed.
    pub text: String,
    /// Its tokens, the end token included.
    pub tokens: Vec<TokenId>,
    /// Why it ended.
    #[serde(rename = "finish_reason", serialize_with = "as_written")]
    pub finish: Finish,
    /// As [`Answer::score`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
    /// Where candidates were put in order by it: the probability that the text matches the picture.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub itm_probability: Option<f32>,
}

impl Answer {
    /// Puts the candidates in another order; the first of them becomes the answer. Log-probabilities of another text are dropped.
    pub fn reorder(&mut self, compare: impl FnMut(&Candidate, &Candidate) -> std::cmp::Ordering) {
        self.candidates.sort_by(compare);
        let Some(Candidate { text, tokens, finish, score, .. }) = self.candidates.first().cloned() else { return };
        if tokens != self.tokens {
            self.log_probs.clear();
        }
        (self.text, self.tokens, self.finish, self.score) = (text, tokens, finish, score);
    }
}

fn as_written<S: serde::Serializer>(value: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// How probable the model finds a token: under the softmax of its plain logits, whatever search chose it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TokenLogProb {
    /// The token.
    pub token: TokenId,
    /// As the vocabulary writes it.
    pub text: String,
    /// Natural logarithm of its probability.
    pub log_prob: f32,
    /// The most probable tokens in its place, the best first.
    pub alternatives: Vec<Alternative>,
}

/// A token that could have stood in another's place.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Alternative {
    /// The token.
    pub token: TokenId,
    /// As the vocabulary writes it.
    pub text: String,
    /// Natural logarithm of its probability.
    pub log_prob: f32,
}

impl Engine {
    /// Writes the texts of all requests together. `on_text` gets each piece of text as soon as it is settled, with the request's index;
    /// of several texts for one request it gets the first. All fail together where one fails in [`check`](Self::check).
    pub fn ask(&mut self, requests: &[Request<'_>], mut on_text: impl FnMut(usize, &str)) -> Result<Vec<Answer>, Error> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let prompts = requests.iter().map(|request| self.check(&request.task, &request.generation));
        let prompts = prompts.collect::<Result<Vec<Prompt>, Error>>()?;
        self.check_memory(requests, &prompts)?;
        let start = Instant::now();
        let prefixes = self.prefixes(requests, &prompts)?;
        let read = start.elapsed();
        let mut running = self.join(requests, &prefixes);
        self.drive(&mut running, &mut on_text)?;
        let n_return = requests.iter().map(|request| request.generation.strategy.n_return());
        let mut answers: Vec<Answer> = running.into_iter().zip(n_return).map(|(running, n)| running.answer(n)).collect();
        if matches!(&self.reader, Reader::Queries(qformer) if qformer.reads_questions()) {
            answers.iter_mut().for_each(|answer| answer.timings.add(Stage::Qformer, read));
        }
        self.add_log_probs(requests, &prefixes, &mut answers)?;
        answers.iter_mut().zip(prompts).for_each(|(answer, prompt)| answer.warnings = prompt.warnings);
        Ok(answers)
    }

    /// Looks at one picture and writes one text.
    pub fn answer(&mut self, picture: &Picture, task: Task, generation: Generation) -> Result<Answer, Error> {
        self.check(&task, &generation)?;
        let sights = self.see(&[picture])?;
        let request = Request { sight: &sights[0], task, generation };
        Ok(self.ask(&[request], |_, _| ())?.remove(0))
    }

    /// The prompt of a task with what there is to say about it, or why it cannot be written so. Whatever this lets pass is at fault
    /// neither for its text nor for its options.
    pub fn check(&self, task: &Task, generation: &Generation) -> Result<Prompt, Error> {
        let mut prompt = self.prompt(task)?;
        generation.check(self.bundle.language())?;
        let (wanted, room) = (generation.processors.min_new_tokens, self.bundle.room_behind(prompt.ids.len()));
        if wanted > room {
            prompt.warnings.push(Warning::NoRoom { wanted, room });
        }
        Ok(prompt)
    }

    /// What each request starts from.
    fn prefixes(&mut self, requests: &[Request<'_>], prompts: &[Prompt]) -> Result<Vec<Prefix>, Error> {
        let sights: Vec<&Sight> = requests.iter().map(|request| request.sight).collect();
        let mut prefixes = self.prefixes_of(&sights, prompts)?;
        for (request, prefix) in requests.iter().zip(&mut prefixes) {
            prefix.max_new_tokens = self.n_new(request, prefix.max_new_tokens);
        }
        Ok(prefixes)
    }

    /// Tokens that a request may come to, where there is room for `room`. A default maximum gives way to a larger minimum.
    pub(super) fn n_new(&self, request: &Request<'_>, room: usize) -> usize {
        let Generation { max_new_tokens, processors, .. } = &request.generation;
        let default = self.bundle.facts().generation.get(&request.task.name()).map_or(1, |generation| generation.max_new_tokens);
        max_new_tokens.unwrap_or(default.max(processors.min_new_tokens)).min(room)
    }

    /// What texts behind prompts start from, with as much room behind as there is.
    pub(super) fn prefixes_of(&mut self, sights: &[&Sight], prompts: &[Prompt]) -> Result<Vec<Prefix>, Error> {
        sights.iter().try_for_each(|sight| self.know(sight))?;
        let seen = self.seen(sights, prompts)?;
        let room = |prompt: &Prompt| self.bundle.room_behind(prompt.ids.len());
        let prefix = |(seen, prompt): (Seen, &Prompt)| Prefix { seen, prompt: prompt.ids.clone(), max_new_tokens: room(prompt) };
        Ok(seen.into_iter().zip(prompts).map(prefix).collect())
    }

    /// Queries made for each prompt, where the Q-Former reads it, all in one batch.
    fn seen(&mut self, sights: &[&Sight], prompts: &[Prompt]) -> Result<Vec<Seen>, Error> {
        let Reader::Queries(qformer) = &mut self.reader else {
            return Ok(sights.iter().filter_map(|sight| sight.seen()).collect());
        };
        let Some(facts) = &self.bundle.facts().qformer.text else {
            return Ok(sights.iter().filter_map(|sight| sight.seen()).collect());
        };
        let questions: Vec<_> = prompts.iter().filter_map(|prompt| prompt.question_ids.clone()).collect();
        let questions = TokenBatch::new(&questions, facts.pad);
        let features: Vec<_> = sights.iter().filter_map(|sight| sight.features()).collect();
        let features = ImageFeatures::from_rows(&features).map_err(|source| qformer.failed("copying features", source))?;
        Ok(qformer.read(&features, Some(&questions))?.into_iter().map(Seen::Queries).collect())
    }

    fn join(&mut self, requests: &[Request<'_>], prefixes: &[Prefix]) -> Vec<Running> {
        let decoding = self.decoding.as_mut().expect("a bundle that writes has a language model");
        let text = self.text.as_ref().expect("a bundle that writes has a tokenizer");
        let eos = &self.bundle.language().token_ids.eos;
        let mut running = Vec::with_capacity(requests.len());
        for (request, prefix) in requests.iter().zip(prefixes) {
            let Generation { strategy, processors, stop, .. } = &request.generation;
            let ends = Ends { max_new_tokens: prefix.max_new_tokens, end: eos.clone(), stop: stop_at(stop, text, eos) };
            let search = strategy.search(&decoding.model().history(prefix), processors, &ends, None);
            let writing = Writing::new(decoding.join(prefix.clone(), search), text.clone(), eos, stop);
            running.push(Running { texts: vec![writing], timings: request.sight.timings.clone() });
        }
        running
    }

    fn drive(&mut self, running: &mut [Running], on_text: &mut impl FnMut(usize, &str)) -> Result<(), Error> {
        let decoding = self.decoding.as_mut().expect("a bundle that writes has a language model");
        let start = Instant::now();
        decoding.admit()?;
        let prefill = start.elapsed();
        let start = Instant::now();
        while !decoding.is_idle() {
            for event in decoding.step()? {
                let place = |running: &Running| running.texts.iter().position(|writing| writing.id == event.id);
                let found = running.iter().enumerate().find_map(|(index, running)| Some((index, place(running)?)));
                let Some((index, place)) = found else { continue };
                let mut say = |piece: &str| {
                    if place == 0 {
                        on_text(index, piece)
                    }
                };
                running[index].texts[place].take(&event, &mut say);
                running[index].add_times(prefill, start);
            }
        }
        Ok(())
    }

    /// One more pass over the finished texts, whatever search found them.
    fn add_log_probs(&mut self, requests: &[Request<'_>], prefixes: &[Prefix], answers: &mut [Answer]) -> Result<(), Error> {
        let wanted = requests.iter().enumerate().filter_map(|(index, request)| Some((index, request.generation.log_probs?)));
        let wanted: Vec<(usize, usize)> = wanted.filter(|(index, _)| !answers[*index].tokens.is_empty()).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let longest = wanted.iter().map(|(index, _)| answers[*index].tokens.len()).max().unwrap_or(1);
        for wanted in wanted.chunks(self.texts_at_once(&prefixes[wanted[0].0], longest)) {
            self.add_some_log_probs(wanted, prefixes, answers)?;
        }
        Ok(())
    }

    /// `wanted`: indices of answers, and how many alternatives each token is to have.
    fn add_some_log_probs(&mut self, wanted: &[(usize, usize)], prefixes: &[Prefix], answers: &mut [Answer]) -> Result<(), Error> {
        let start = Instant::now();
        let kept: Vec<&Prefix> = wanted.iter().map(|(index, _)| &prefixes[*index]).collect();
        let text = self.text.clone().expect("a bundle that writes has a tokenizer");
        let mut found: Vec<Vec<TokenLogProb>> = vec![Vec::new(); wanted.len()];
        let texts: Vec<&[TokenId]> = wanted.iter().map(|(index, _)| answers[*index].tokens.as_slice()).collect();
        self.language().reread(&kept, &texts, |row, logits| {
            let token = texts[row][found[row].len()];
            found[row].push(log_prob(token, logits, wanted[row].1, &text));
        })?;
        for ((index, _), found) in wanted.iter().zip(found) {
            answers[*index].log_probs = found;
            answers[*index].timings.add(Stage::Decode, start.elapsed());
        }
        Ok(())
    }
}

fn log_prob(token: TokenId, logits: &[f32], n_alternatives: usize, text: &Text) -> TokenLogProb {
    let all: Vec<f32> = log_softmax(logits).collect();
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by(|a, b| all[*b].total_cmp(&all[*a]));
    let alternative =
        |token: usize| Alternative { token: token as TokenId, text: text.token(token as TokenId), log_prob: all[token] };
    TokenLogProb {
        token,
        text: text.token(token),
        log_prob: all[token as usize],
        alternatives: order.into_iter().take(n_alternatives).map(alternative).collect(),
    }
}

/// Ends a text once it holds one of `stop`.
fn stop_at(stop: &[String], text: &Arc<Text>, eos: &[TokenId]) -> Option<Stop> {
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

struct Running {
    texts: Vec<Writing>,
    timings: Timings,
}

impl Running {
    fn add_times(&mut self, prefill: Duration, start: Instant) {
        if self.texts.iter().all(|writing| writing.is_finished) {
            self.timings.add(Stage::Prefill, prefill);
            self.timings.add(Stage::Decode, start.elapsed());
        }
    }

    fn answer(self, n_return: usize) -> Answer {
        let mut candidates: Vec<Candidate> = self.texts.into_iter().flat_map(|writing| writing.candidates).take(n_return).collect();
        let Candidate { text, tokens, finish, score, .. } = candidates.first().cloned().unwrap_or_default();
        if n_return == 1 {
            candidates.clear();
        }
        Answer { text, tokens, finish, score, candidates, log_probs: Vec::new(), warnings: Vec::new(), timings: self.timings }
    }
}

/// A text on its way out of the step loop.
struct Writing {
    id: RequestId,
    text: Arc<Text>,
    stream: TextStream,
    eos: Vec<TokenId>,
    stop: Vec<String>,
    /// Everything decoded so far.
    decoded: String,
    /// How much of it was said.
    n_said: usize,
    is_finished: bool,
    candidates: Vec<Candidate>,
    tokens: Vec<TokenId>,
}

impl Writing {
    fn new(id: RequestId, text: Arc<Text>, eos: &[TokenId], stop: &[String]) -> Self {
        let stream = TextStream::new(text.clone());
        let (decoded, candidates, tokens) = (String::new(), Vec::new(), Vec::new());
        let (eos, stop) = (eos.to_vec(), stop.to_vec());
        Self { id, text, stream, eos, stop, decoded, n_said: 0, is_finished: false, candidates, tokens }
    }

    fn take(&mut self, event: &Event, say: &mut impl FnMut(&str)) {
        for token in &event.tokens {
            self.tokens.push(*token);
            if !self.eos.contains(token) {
                let piece = self.stream.push(*token);
                self.decoded.push_str(&piece);
            }
        }
        self.say(self.safe_length(), say);
        if event.finish.is_none() {
            return;
        }
        self.is_finished = true;
        self.candidates = match event.hypotheses.as_slice() {
            [] => vec![self.candidate(&self.tokens, None)],
            several => several.iter().map(|hypothesis| self.candidate(&hypothesis.tokens, hypothesis.score)).collect(),
        };
        // What ends in the middle of a character, or could have become a stop string, was held back until now.
        let whole = self.candidates[0].text.clone();
        if whole.starts_with(&self.decoded[..self.n_said]) {
            self.decoded = whole;
            self.say(self.decoded.len(), say);
        }
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

    fn say(&mut self, up_to: usize, say: &mut impl FnMut(&str)) {
        if up_to > self.n_said {
            say(&self.decoded[self.n_said..up_to]);
            self.n_said = up_to;
        }
    }
}
