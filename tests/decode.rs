//! Searches over a scripted table of scores against recorded runs of `transformers` (`tests/decode/record.py`).

#![allow(clippy::unwrap_used)]

use std::convert::Infallible;

use blip2::decode::{
    Beam, BeamOptions, BeamSample, EarlyStopping, Ends, Greedy, GreedyOptions, Model, Pick, Processors, Sample, SampleOptions,
    Scores, Search, StepLoop, TokenId, Warpers,
};
use serde_json::Value;

/// Logits of the next token by the last two.
#[derive(Clone)]
struct Table {
    values: Vec<f32>,
    vocabulary: usize,
    rows: Vec<Vec<TokenId>>,
}

impl Table {
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

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn prefill(&mut self, prompts: &[Vec<TokenId>], scores: &mut Vec<f32>) -> Result<(), Infallible> {
        for prompt in prompts {
            scores.extend_from_slice(self.logits(prompt));
            self.rows.push(prompt.clone());
        }
        Ok(())
    }

    fn step(&mut self, picks: &[Pick], scores: &mut Vec<f32>) -> Result<(), Infallible> {
        let continued = |pick: &Pick| [&self.rows[pick.parent][..], &[pick.token]].concat();
        self.rows = picks.iter().map(continued).collect();
        scores.clear();
        for row in &self.rows {
            scores.extend_from_slice(self.logits(row));
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.rows.clear();
    }
}

fn recorded() -> (Vec<Table>, Vec<Value>) {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/decode/cases.json");
    let all: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let vocabulary = all["vocabulary"].as_u64().unwrap() as usize;
    let tables = all["tables"].as_array().unwrap().iter();
    let values = tables.map(|table| table.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect());
    let tables = values.map(|values| Table { values, vocabulary, rows: Vec::new() }).collect();
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
    let (mut scores, mut picks) = (Vec::new(), Vec::new());
    table.prefill(&[prompt], &mut scores).unwrap();
    loop {
        picks.clear();
        search.advance(Scores::new(&scores, table.vocabulary), &mut picks);
        if search.finish().is_some() {
            return;
        }
        table.step(&picks, &mut scores).unwrap();
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
        ids.push(all.join(prompt, Box::new(search)));
        all.admit().unwrap();
        for event in all.step().unwrap() {
            found.insert(event.id, event.tokens);
        }
    }
    while !all.is_idle() {
        for event in all.step().unwrap() {
            found.insert(event.id, event.tokens);
        }
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
        for seed in 0..N_DRAWS {
            let options = SampleOptions { warpers: warpers(&case["options"]), ends: limit(1), seed, ..SampleOptions::default() };
            let mut search = Sample::new(&[], options);
            search.advance(Scores::new(&logits, logits.len()), &mut Vec::new());
            counts[search.settled()[0] as usize] += 1;
        }
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
    // With one step and no end token, the first of two beams' candidates follow the row's own probabilities.
    let case = &recorded_shapes()[1];
    let (logits, wanted) = (numbers(&case["logits"]), numbers(&case["probabilities"]));
    let mut counts = vec![0u64; logits.len()];
    const N_DRAWS: u64 = 20_000;
    for seed in 0..N_DRAWS {
        let options = BeamOptions {
            beams: 1,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::Unlikely,
            ends: limit(1),
            processors: Processors::default(),
            sample: Some(BeamSample { warpers: warpers(&case["options"]), seed }),
            log_probs: None,
        };
        let mut search = Beam::new(&[2], options);
        search.advance(Scores::new(&logits, logits.len()), &mut Vec::new());
        counts[search.hypotheses()[0].tokens[0] as usize] += 1;
    }
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
