//! What each stage costs at least, by the graph that it runs and the sizes that it runs it with.

use super::{EMBED_TEXT, ENCODER, Stages, Step, Writing};
use crate::bench::cost::{Cost, CostError, Sizes, cost};
use crate::bundle::{Bundle, Family, SLOT_STEP};
use crate::timing::Stage;

impl Stages {
    /// Every stage that has costs, with them.
    pub fn costs(&self) -> Result<Vec<(String, Cost)>, CostError> {
        let (bundle, one) = (self.engine.bundle(), Sizes::new([("batch", 1)]));
        let mut found = vec![(Stage::Vision.name().to_owned(), cost(bundle, "vision", &one)?)];
        let question = self.writing.as_ref().and_then(|writing| writing.prompt.question_ids.as_ref());
        let asked = Sizes::new([("batch", 1), ("question", question.map_or(0, Vec::len))]);
        found.push((Stage::Qformer.name().to_owned(), cost(bundle, "qformer", &asked)?));
        if let Some(text) = &self.text {
            let sizes = Sizes::new([("batch", 1), ("sequence", text.ids.ncols())]);
            found.push((EMBED_TEXT.to_owned(), cost(bundle, "qformer_text", &sizes)?));
            found.push((Stage::Match.name().to_owned(), cost(bundle, "qformer_itm", &sizes)?));
        }
        if let Some(writing) = &self.writing {
            found.extend(writing.costs(bundle)?);
        }
        Ok(found)
    }
}

impl Writing {
    fn costs(&self, bundle: &Bundle) -> Result<Vec<(String, Cost)>, CostError> {
        let (mut found, facts) = (Vec::new(), bundle.facts());
        let (n_queries, n_tokens) = (facts.qformer.n_queries, self.prompt.ids.len());
        let read = self.prefix_positions;
        // Queries, tokens and what lies in the slots before.
        let (queries, tokens, before) = match facts.family {
            Family::DecoderOnly => (n_queries, n_tokens, 0),
            Family::EncoderDecoder => (0, 1, 0),
            Family::Qformer => (0, n_tokens, n_queries),
        };
        if facts.family == Family::EncoderDecoder {
            let sizes = Sizes::new([("batch", 1), ("n_queries", n_queries), ("n_tokens", n_tokens)]);
            found.push((ENCODER.to_owned(), cost(bundle, "encoder", &sizes)?));
        }
        let prefill = Reads { rows: 1, queries, tokens, before, encoded: read };
        found.push((Stage::Prefill.name().to_owned(), cost(bundle, "decoder", &prefill.sizes(bundle))?));
        for step in &self.steps {
            let reads = Reads { rows: step.rows, queries: 0, tokens: 1, before: step.past, encoded: read };
            found.push((step.name(), cost(bundle, "decoder", &reads.sizes(bundle))?));
            found.extend(step.reorder().map(|name| (name, step.copies(bundle, read))));
        }
        Ok(found)
    }
}

/// What the decoder reads in a run.
struct Reads {
    rows: usize,
    queries: usize,
    tokens: usize,
    /// Positions in the slots before.
    before: usize,
    /// Positions that the encoder made.
    encoded: usize,
}

impl Reads {
    /// As the decoder makes its inputs, filled up where it multiplies more rows than these.
    fn sizes(&self, bundle: &Bundle) -> Sizes {
        let &Self { rows, queries, tokens, before, encoded } = self;
        let (sequence, least) = (queries + tokens, bundle.graph("decoder").precision.least_rows());
        let computed = if sequence < least { rows.max(least) } else { rows };
        let axes = [
            ("rows", computed),
            ("slots", rows),
            ("n_queries", queries),
            ("n_tokens", tokens),
            ("sequence", sequence),
            ("n_logits", least.div_ceil(computed)),
            ("capacity", (before + sequence).next_multiple_of(SLOT_STEP)),
            ("n_encoder", encoded),
        ];
        Sizes::new(axes).with("total_sequence_length", before + sequence)
    }
}

impl Step {
    /// What the first row holds is read once and written for every other.
    fn copies(&self, bundle: &Bundle, encoded: usize) -> Cost {
        let language = bundle.language();
        let cross = language.cross_attention.as_ref();
        let cross = cross.map_or(0, |cross| 2 * cross.n_layers * cross.n_heads * cross.head_dim * cross.dtype.size());
        let row = self.past * language.kv_cache.bytes_per_position() + encoded * cross;
        Cost { cache_bytes: (self.rows * row) as u64, ..Cost::default() }
    }
}
