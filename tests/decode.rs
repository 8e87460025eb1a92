//! Searches over a scripted table of scores against recorded runs of `transformers` (`tests/decode/record.py`), and over random scores
//! against plain versions of themselves.

#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::ops::Range;

use blip2::decode::{
    Beam, BeamOptions, BeamSample, EarlyStopping, Ends, Forced, Greedy, GreedyOptions, Model, Pick, Processors, Random, Room,
    Sample, SampleOptions, Scores, Search, StepLoop, Stop, TokenId, Warpers, log_softmax,
};
use serde_json::Value;

#[path = "decode/plain.rs"]
mod plain;

/// Logits of the next token by the last two.
#[derive(Clone)]
struct Table {
    values: Vec<f32>,
    vocabulary: usize,
    rows: Vec<Vec<TokenId>>,
    /// Of the rows from `first` on.
    scores: Vec<f32>,
    first: usize,
}

impl Table {
    fn new(values: Vec<f32>, vocabulary: usize) -> Self {
        Self { values, vocabulary, rows: Vec::new(), scores: Vec::new(), first: 0 }
    }

    fn score(&mut self, first: usize) {
        self.scores = self.rows[first..].iter().flat_map(|row| self.logits(row)).copied().collect();
        self.first = first;
    }

    fn logits(&self, row: &[TokenId]) -> &[f32] {
        let last = row[row.len() - 1] as usize;
        let before = if row.len() > 1 { row[row.len() - 2] as usize } else { 0 };
        let at = (before * self.vocabulary + last) * self.vocabulary;
        &self.values[at..at + self.vocabulary]
    }
}

impl Model for Table {
    type Prompt = Vec<TokenId>;
    type Error = Infallible;

    fn room(&self, prompt: &Vec<TokenId>) -> Room {
        Room { rows: 1, positions: prompt.len(), read: prompt.len() }
    }

    fn reserve(&mut self, _: Room) -> Result<bool, Infallible> {
        Ok(true)
    }

    fn no_room(&self, _: Room) -> Infallible {
        unreachable!("there is always room")
    }

    fn prefill(&mut self, prompts: &[Vec<TokenId>]) -> Result<(), Infallible> {
        let first = self.rows.len();
        self.rows.extend_from_slice(prompts);
        self.score(first);
        Ok(())
    }

    fn step(&mut self, picks: &[Pick]) -> Result<(), Infallible> {
        let continued = |pick: &Pick| [&self.rows[pick.parent][..], &[pick.token]].concat();
        self.rows = picks.iter().map(continued).collect();
        self.score(0);
        Ok(())
    }

    fn scores(&self, rows: Range<usize>) -> Result<Scores<'_>, Infallible> {
        let at = |row: usize| (row - self.first) * self.vocabulary;
        Ok(Scores::new(&self.scores[at(rows.start)..at(rows.end)], self.vocabulary))
    }

    fn keep(&mut self, rows: &[usize]) {
        self.rows = rows.iter().map(|row| self.rows[*row].clone()).collect();
    }
}

fn recorded() -> (Vec<Table>, Vec<Value>) {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/decode/cases.json");
    let all: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let vocabulary = all["vocabulary"].as_u64().unwrap() as usize;
    let tables = all["tables"].as_array().unwrap().iter();
    let values = tables.map(|table| table.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect());
    let tables = values.map(|values| Table::new(values, vocabulary)).collect();
    (tables, all["cases"].as_array().unwrap().clone())
}

fn tokens(value: &Value) -> Vec<TokenId> {
    value.as_array().into_iter().flatten().map(|v| v.as_u64().unwrap() as TokenId).collect()
}

fn number(options: &Value, name: &str, default: f64) -> f64 {
    options[name].as_f64().unwrap_or(default)
}

fn ends(options: &Value) -> Ends {
    let max_new_tokens = number(options, "max_new_tokens", 0.0) as usize;
    Ends { max_new_tokens, end: tokens(&options["eos_token_id"]), stop: None }
}

fn limit(max_new_tokens: usize) -> Ends {
    Ends { max_new_tokens, ..Ends::default() }
}

fn processors(options: &Value) -> Processors {
    let bad_words = options["bad_words_ids"].as_array().into_iter().flatten().map(tokens).collect();
    Processors {
        repetition_penalty: number(options, "repetition_penalty", 1.0) as f32,
        no_repeat_ngram: number(options, "no_repeat_ngram_size", 0.0) as usize,
        bad_words,
        min_new_tokens: number(options, "min_new_tokens", 0.0) as usize,
        forced_first: options["forced_bos_token_id"].as_u64().map(|id| id as TokenId),
        forced_last: options["forced_eos_token_id"].as_u64().map(|id| id as TokenId).into_iter().collect(),
        suppressed: tokens(&options["suppress_tokens"]),
        suppressed_first: tokens(&options["begin_suppress_tokens"]),
    }
}

fn beam(prompt: &[TokenId], options: &Value) -> Beam {
    let early_stopping = match &options["early_stopping"] {
        Value::Bool(true) => EarlyStopping::Enough,
        Value::String(_) => EarlyStopping::Impossible,
        _ => EarlyStopping::Unlikely,
    };
    Beam::new(
        prompt,
        BeamOptions {
            beams: number(options, "num_beams", 1.0) as usize,
            length_penalty: number(options, "length_penalty", 1.0) as f32,
            early_stopping,
            ends: ends(options),
            processors: processors(options),
            sample: None,
            log_probs: None,
        },
    )
}

#[test]
fn beam_search_gives_the_texts_and_scores_of_the_reference() {
    let (tables, cases) = recorded();
    let (mut n_compared, mut wrong) = (0, Vec::new());
    for case in cases.iter().filter(|case| case["scores"].is_array()) {
        let (prompt, options) = (tokens(&case["prompt"]), &case["options"]);
        let table = tables[case["table"].as_u64().unwrap() as usize].clone();
        let mut search = beam(&prompt, options);
        run(&mut search, table, prompt);
        // The reference fills places that no text has taken with rows of score -1e9.
        let rows = case["tokens"].as_array().unwrap().iter().map(tokens).zip(case["scores"].as_array().unwrap());
        let wanted: Vec<(Vec<TokenId>, f32)> =
            rows.map(|(row, score)| (row, score.as_f64().unwrap() as f32)).filter(|(_, score)| *score > -1e8).collect();
        let found = &search.hypotheses()[..wanted.len().min(search.hypotheses().len())];
        let same = found.len() == wanted.len()
            && found
                .iter()
                .zip(&wanted)
                .all(|(found, (row, score))| found.tokens == *row && (found.score.unwrap() - score).abs() < 1e-4);
        if !same {
            wrong.push(format!("{options}\n  found {found:?}\n wanted {wanted:?}"));
        }
        n_compared += 1;
    }
    assert!(n_compared > 200);
    assert!(wrong.is_empty(), "{} of {n_compared} differ, the first:\n{}", wrong.len(), wrong[0]);
}

fn run(search: &mut dyn Search, mut table: Table, prompt: Vec<TokenId>) {
    let mut picks = Vec::new();
    table.prefill(&[prompt]).unwrap();
    loop {
        picks.clear();
        search.advance(table.scores(0..table.rows.len()).unwrap(), &mut picks);
        if search.finish().is_some() {
            return;
        }
        table.step(&picks).unwrap();
    }
}

#[test]
fn greedy_search_with_every_processor_gives_the_text_of_the_reference() {
    let (tables, cases) = recorded();
    let mut n_compared = 0;
    for case in cases.iter().filter(|case| case["scores"].is_null()) {
        let (prompt, options) = (tokens(&case["prompt"]), &case["options"]);
        let greedy = GreedyOptions { ends: ends(options), processors: processors(options), log_probs: None };
        let mut search = Greedy::new(&prompt, greedy);
        run(&mut search, tables[case["table"].as_u64().unwrap() as usize].clone(), prompt);
        assert_eq!(search.settled(), tokens(&case["tokens"][0]), "{options}");
        n_compared += 1;
    }
    assert!(n_compared >= 100);
}

#[test]
fn beams_together_give_what_they_give_alone() {
    let (tables, cases) = recorded();
    let cases: Vec<&Value> = cases.iter().filter(|case| case["scores"].is_array() && case["table"] == 2).collect();
    assert!(cases.len() > 20);
    let mut all = StepLoop::new(tables[2].clone());
    let mut found = std::collections::HashMap::new();
    let mut ids = Vec::new();
    for case in &cases {
        let prompt = tokens(&case["prompt"]);
        let search = beam(&prompt, &case["options"]);
        ids.push(all.join(prompt, Box::new(search), 9));
        found.extend(all.step().into_iter().map(|event| (event.id, event.tokens)));
    }
    while !all.is_idle() {
        found.extend(all.step().into_iter().map(|event| (event.id, event.tokens)));
    }
    for (id, case) in ids.iter().zip(cases) {
        assert_eq!(found[id], tokens(&case["tokens"][0]), "{}", case["options"]);
    }
}

fn recorded_shapes() -> Vec<Value> {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/decode/cases.json");
    let all: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    all["shaped"].as_array().unwrap().clone()
}

fn warpers(options: &Value) -> Warpers {
    Warpers {
        temperature: number(options, "temperature", 1.0) as f32,
        top_k: number(options, "top_k", 0.0) as usize,
        top_p: number(options, "top_p", 1.0) as f32,
        min_p: number(options, "min_p", 0.0) as f32,
        typical_p: number(options, "typical_p", 1.0) as f32,
    }
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

#[test]
fn every_warper_shapes_the_distribution_as_the_reference_does() {
    let shapes = recorded_shapes();
    assert!(shapes.len() > 50);
    for case in shapes {
        let options = SampleOptions { warpers: warpers(&case["options"]), ends: limit(1), ..SampleOptions::default() };
        let found = Sample::new(&[], options).probabilities(&numbers(&case["logits"]));
        for (found, wanted) in found.iter().zip(numbers(&case["probabilities"])) {
            assert!((found - wanted).abs() < 1e-6 && (*found > 0.0) == (wanted > 0.0), "{}: {found}, {wanted}", case["options"]);
        }
    }
}

/// As `TopPLogitsWarper`, `MinPLogitsWarper` and `TypicalLogitsWarper` cut. Of equals that cannot all stay the first do, where the sort of the
/// reference leaves open which.
#[test]
fn a_limit_that_is_met_exactly_cuts_as_in_the_reference() {
    const LN_2: f32 = std::f32::consts::LN_2;
    let (even, halved) = ([0.0; 4], [0.0, -LN_2, -2.0 * LN_2, -2.0 * LN_2]);
    let off = Warpers::default();
    for (warpers, logits, wanted) in [
        (Warpers { top_p: 0.5, ..off }, even, [0.5, 0.5, 0.0, 0.0]),
        (Warpers { top_p: 0.75, ..off }, halved, [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]),
        (Warpers { min_p: 0.5, ..off }, halved, [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]),
        (Warpers { typical_p: 0.75, ..off }, halved, [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]),
    ] {
        let options = SampleOptions { warpers, ends: limit(1), ..SampleOptions::default() };
        let found = Sample::new(&[], options).probabilities(&logits);
        assert!(found.iter().zip(wanted).all(|(found, wanted)| (found - wanted).abs() < 1e-6), "{warpers:?}: {found:?}");
    }
}

/// Upper tail of the chi-square distribution by Wilson and Hilferty's cube-root approximation: its z-score.
fn z_of_chi_square(statistic: f64, freedom: f64) -> f64 {
    let spread = 2.0 / (9.0 * freedom);
    ((statistic / freedom).cbrt() - (1.0 - spread)) / spread.sqrt()
}

#[test]
fn drawn_tokens_follow_the_probabilities_of_the_reference() {
    const N_DRAWS: u64 = 20_000;
    for case in recorded_shapes() {
        let (logits, wanted) = (numbers(&case["logits"]), numbers(&case["probabilities"]));
        let mut counts = vec![0u64; logits.len()];
        let options = SampleOptions { warpers: warpers(&case["options"]), ends: limit(1), ..SampleOptions::default() };
        let mut search = Sample::several(&[], options, N_DRAWS as usize);
        search.advance(Scores::new(&logits, logits.len()), &mut Vec::new());
        search.hypotheses().iter().for_each(|text| counts[text.tokens[0] as usize] += 1);
        assert_z(&counts, &wanted, N_DRAWS, &case["options"]);
    }
}

/// Cells of fewer than five expected draws are put together. The seeds are fixed, so this cannot flicker.
#[track_caller]
fn assert_z(counts: &[u64], wanted: &[f32], n_draws: u64, options: &Value) {
    let (mut statistic, mut cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
    for (count, probability) in counts.iter().zip(wanted) {
        let (count, expected) = (*count as f64, f64::from(*probability) * n_draws as f64);
        assert!(expected > 0.0 || count == 0.0, "{options}: a dropped token was drawn");
        if expected < 5.0 {
            rest = (rest.0 + count, rest.1 + expected);
        } else {
            statistic += (count - expected).powi(2) / expected;
            cells += 1.0;
        }
    }
    if rest.1 > 0.5 {
        statistic += (rest.0 - rest.1).powi(2) / rest.1;
        cells += 1.0;
    }
    if cells > 1.0 {
        let z = z_of_chi_square(statistic, cells - 1.0);
        // p = 0.01 for a warper alone; among forty of them together one in forty may come to p = 0.001.
        let limit = if options.as_object().is_some_and(|o| o.len() == 1) { 2.33 } else { 3.09 };
        assert!(z < limit, "{options}: chi-square {statistic:.1} with {} degrees of freedom, z = {z:.2}", cells - 1.0);
    }
}

#[test]
fn beams_that_draw_take_continuations_without_putting_back() {
    // With one step, two beams are the first two draws.
    const N_DRAWS: u64 = 20_000;
    let case = &recorded_shapes()[1];
    let (logits, first) = (numbers(&case["logits"]), numbers(&case["probabilities"]));
    let n = logits.len();
    let mut counts = vec![0u64; n * n];
    for seed in 0..N_DRAWS {
        let options = BeamOptions {
            beams: 2,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::Unlikely,
            ends: limit(1),
            processors: Processors::default(),
            sample: Some(BeamSample { warpers: warpers(&case["options"]), seed }),
            log_probs: None,
        };
        let mut search = Beam::new(&[2], options);
        search.advance(Scores::new(&logits, n), &mut Vec::new());
        let mut pair: Vec<usize> = search.hypotheses().iter().map(|text| text.tokens[0] as usize).collect();
        pair.sort_unstable();
        counts[pair[0] * n + pair[1]] += 1;
    }
    let either = |a: usize, b: usize| first[a] * first[b] * (1.0 / (1.0 - first[a]) + 1.0 / (1.0 - first[b]));
    let wanted: Vec<f32> = (0..n * n).map(|pair| if pair / n < pair % n { either(pair / n, pair % n) } else { 0.0 }).collect();
    assert_z(&counts, &wanted, N_DRAWS, &case["options"]);
}

#[test]
fn the_same_seed_draws_the_same_text_and_another_seed_another() {
    let (tables, _) = recorded();
    let write = |seed| {
        let mut search = Sample::new(&[3], SampleOptions { ends: limit(30), seed, ..SampleOptions::default() });
        run(&mut search, tables[0].clone(), vec![3]);
        search.settled().to_vec()
    };
    assert_eq!(write(5), write(5));
    assert_ne!(write(5), write(6));
}

/// Random requests, and a model whose logits depend on all that stands before.
struct Lot {
    random: Random,
    vocabulary: usize,
}

impl Lot {
    fn below(&mut self, n: usize) -> usize {
        (self.random.uniform() * n as f64) as usize
    }

    fn now_and_then(&mut self) -> bool {
        self.below(4) == 0
    }

    fn token(&mut self) -> TokenId {
        self.below(self.vocabulary) as TokenId
    }

    fn tokens(&mut self, n: usize) -> Vec<TokenId> {
        (0..n).map(|_| self.token()).collect()
    }

    fn some(&mut self, n: usize) -> Vec<TokenId> {
        let n = if self.now_and_then() { 1 + self.below(n) } else { 0 };
        self.tokens(n)
    }

    /// Spread wide, in few steps so that many are equal, peaked, or with some that are impossible.
    fn model(&mut self) -> impl Fn(&[TokenId]) -> Vec<f32> + use<> {
        let (seed, kind, vocabulary) = (self.random.bits(), self.below(4), self.vocabulary);
        move |row| {
            let seed = row.iter().fold(seed, |seed, token| Random::new(seed ^ u64::from(*token)).bits());
            let mut random = Random::new(seed);
            let logit = |u: f64| match kind {
                0 => 12.0 * u - 6.0,
                1 => (5.0 * u).floor() - 2.0,
                2 => 25.0 * u.powi(9),
                _ if u < 0.3 => f64::NEG_INFINITY,
                _ => (40.0 * u).floor() / 8.0,
            };
            let mut logits: Vec<f32> = (0..vocabulary).map(|_| logit(random.uniform()) as f32).collect();
            logits[(seed % vocabulary as u64) as usize] = 3.0;
            logits
        }
    }

    fn ends(&mut self) -> Ends {
        let last = self.token();
        let stop = self.now_and_then().then(|| Stop(std::sync::Arc::new(move |tokens| tokens.ends_with(&[last, last]))));
        Ends { max_new_tokens: 1 + self.below(8), end: self.some(2), stop }
    }

    fn processors(&mut self) -> Processors {
        if self.now_and_then() {
            return Processors::default();
        }
        Processors {
            repetition_penalty: [1.0, 1.0, 0.8, 1.3][self.below(4)],
            no_repeat_ngram: [0, 0, 1, 2][self.below(4)],
            bad_words: (0..self.below(3)).map(|_| self.some(2)).collect(),
            min_new_tokens: [0, 0, 1, 3][self.below(4)],
            forced_first: self.now_and_then().then(|| self.token()),
            forced_last: self.some(2),
            suppressed: self.some(3),
            suppressed_first: self.some(3),
        }
    }

    fn warpers(&mut self) -> Warpers {
        let off = Warpers::default();
        Warpers {
            temperature: [1.0, 0.7, 1.9][self.below(3)],
            top_k: if self.now_and_then() { 1 + self.below(2 * self.vocabulary) } else { off.top_k },
            top_p: if self.now_and_then() { self.random.uniform() as f32 } else { off.top_p },
            min_p: if self.now_and_then() { self.random.uniform() as f32 } else { off.min_p },
            typical_p: if self.now_and_then() { self.random.uniform() as f32 } else { off.typical_p },
        }
    }

    fn log_probs(&mut self) -> Option<usize> {
        [None, Some(0), Some(3), Some(self.vocabulary + 1)][self.below(4)]
    }

    fn greedy(&mut self) -> GreedyOptions {
        GreedyOptions { ends: self.ends(), processors: self.processors(), log_probs: self.log_probs() }
    }

    fn sample(&mut self) -> SampleOptions {
        let GreedyOptions { ends, processors, log_probs } = self.greedy();
        SampleOptions { ends, processors, warpers: self.warpers(), seed: self.random.bits(), log_probs }
    }

    fn beam(&mut self) -> BeamOptions {
        let SampleOptions { ends, processors, warpers, seed, log_probs } = self.sample();
        BeamOptions {
            beams: 1 + self.below(4),
            length_penalty: [1.0, 0.0, -1.5, 2.0][self.below(4)],
            early_stopping: [EarlyStopping::Enough, EarlyStopping::Unlikely, EarlyStopping::Impossible][self.below(3)],
            ends,
            processors,
            sample: self.now_and_then().then_some(BeamSample { warpers, seed }),
            log_probs,
        }
    }
}

/// Small vocabularies in great number, and a few as large as a language model's.
fn lots() -> impl Iterator<Item = Lot> {
    (0..2_004).map(|seed| {
        let mut random = Random::new(seed);
        let vocabulary = if seed >= 2_000 { 50_272 } else { 1 + random.bits() as usize % 40 };
        Lot { random, vocabulary }
    })
}

fn drive(search: &mut dyn Search, prompt: &[TokenId], model: plain::Logits<'_>) {
    let (mut rows, mut picks) = (vec![prompt.to_vec()], Vec::new());
    while search.finish().is_none() {
        let logits: Vec<f32> = rows.iter().flat_map(|row| model(row)).collect();
        picks.clear();
        search.advance(Scores::new(&logits, logits.len() / rows.len()), &mut picks);
        rows = picks.iter().map(|pick| [&rows[pick.parent][..], &[pick.token]].concat()).collect();
    }
    assert!(picks.is_empty(), "a search that has ended runs no rows");
}

fn text(search: &dyn Search) -> plain::Text {
    (search.settled().to_vec(), search.log_probs().to_vec(), search.finish())
}

#[test]
fn greedy_search_is_the_plain_one() {
    for (index, mut lot) in lots().enumerate() {
        let (prompt, model, options) = (lot.tokens(1 + index % 3), lot.model(), lot.greedy());
        let mut search = Greedy::new(&prompt, options.clone());
        drive(&mut search, &prompt, &model);
        assert_eq!(text(&search), plain::greedy(&prompt, &options, &model), "{index}: {options:?}");
    }
}

#[test]
fn sampling_is_the_plain_one() {
    for (index, mut lot) in lots().enumerate() {
        let (prompt, model, options) = (lot.tokens(1 + index % 3), lot.model(), lot.sample());
        let mut search = Sample::new(&prompt, options.clone());
        drive(&mut search, &prompt, &model);
        assert_eq!(text(&search), plain::sample(&prompt, &options, &model), "{index}: {options:?}");
    }
}

#[test]
fn beam_search_is_the_plain_one() {
    for (index, mut lot) in lots().enumerate() {
        let (prompt, model, options) = (lot.tokens(1 + index % 3), lot.model(), lot.beam());
        let mut search = Beam::new(&prompt, options.clone());
        drive(&mut search, &prompt, &model);
        let wanted = plain::beam(&prompt, &options, &model);
        assert_eq!(search.hypotheses(), wanted, "{index}: {options:?}");
        let best = wanted.first().map(|best| (best.tokens.clone(), best.log_probs.clone()));
        assert_eq!((search.settled().to_vec(), search.log_probs().to_vec()), best.unwrap_or_default(), "{index}: {options:?}");
    }
}

#[test]
fn samples_together_are_those_alone() {
    for (index, mut lot) in lots().take(2_000).enumerate() {
        let (prompt, model, options) = (lot.tokens(1 + index % 3), lot.model(), lot.sample());
        let mut together = Sample::several(&prompt, options.clone(), 1 + index % 5);
        drive(&mut together, &prompt, &model);
        for (k, found) in together.hypotheses().iter().enumerate() {
            let seed = options.seed.wrapping_add(k as u64);
            let alone = plain::sample(&prompt, &SampleOptions { seed, ..options.clone() }, &model);
            let found = (found.tokens.clone(), found.log_probs.clone(), Some(found.finish));
            assert_eq!(found, alone, "{index}: {options:?}");
        }
        assert_eq!(together.hypotheses().len(), if index % 5 == 0 { 0 } else { 1 + index % 5 });
        assert_eq!(text(&together), plain::sample(&prompt, &options, &model), "{index}: {options:?}");
    }
}

#[test]
fn given_texts_are_scored_as_they_are_alone() {
    for (index, mut lot) in lots().enumerate() {
        let (prompt, model, n_texts) = (lot.tokens(1 + index % 3), lot.model(), lot.below(7));
        // Of few tokens, so that many texts begin alike.
        let mut text = || (0..lot.below(5)).map(|_| lot.token() % 3).collect::<Vec<TokenId>>();
        let texts: Vec<Vec<TokenId>> = (0..n_texts).map(|_| text()).collect();
        let mut search = Forced::new(texts.clone());
        drive(&mut search, &prompt, &model);
        assert_eq!(search.hypotheses().len(), n_texts);
        for (found, text) in search.hypotheses().iter().zip(&texts) {
            let row = |at: usize| [&prompt[..], &text[..at]].concat();
            let log_prob = |at: usize| log_softmax(&model(&row(at))).nth(text[at] as usize).unwrap_or(f32::NEG_INFINITY);
            let wanted = (0..text.len()).map(log_prob).fold(0.0, |sum, next| sum + next);
            assert_eq!((&found.tokens, found.score), (text, Some(wanted)), "{index}: {texts:?}");
        }
    }
}
