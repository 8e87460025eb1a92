//! The Q-Former of stage 1: pictures and texts in one space (ITC), whether they belong together (ITM), and what its own text (ITG)
//! starts from.

use ndarray::{Array2, Array3, Axis};

use crate::bundle::{Bundle, BundleError, query_cache};
use crate::qformer::{QueryCache, ids_and_mask};
use crate::runtime::{Cancel, Graph, Mover, Place, Runtime, RuntimeError};
use crate::text::TokenBatch;
use crate::vision::{ImageFeatures, PictureFeatures};

/// A picture in the space of pictures and texts.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageEmbedding {
    /// `[queries, hidden]`: the Q-Former's last layer.
    pub states: Array2<f32>,
    /// `[queries, joint]`, each of length 1.
    pub queries: Array2<f32>,
}

/// A text in the space of pictures and texts.
#[derive(Clone, Debug, PartialEq)]
pub struct TextEmbedding {
    /// `[joint]`, of length 1: what stands at `[CLS]`.
    pub pooled: Vec<f32>,
}

/// A picture read together with a text.
#[derive(Clone, Debug, PartialEq)]
pub struct PairEmbedding {
    /// Logits of "no" and "yes", averaged over the queries.
    pub itm_logits: [f32; 2],
    /// `[queries, hidden]`: the queries' last layer with the text in sight.
    pub states: Array2<f32>,
}

/// The graphs of stage 1.
#[derive(Debug)]
pub struct Stage1 {
    qformer: Graph,
    text: Graph,
    pair: Graph,
    mover: Mover,
    /// Outputs that hold the queries' keys and values, in the decoder's order; none where nothing writes.
    cached: Vec<String>,
}

impl ImageEmbedding {
    /// The mean over the queries, brought back to length 1: `[joint]`.
    pub fn pooled(&self) -> Vec<f32> {
        let mean = self.queries.mean_axis(Axis(0)).unwrap_or_default();
        let length = mean.dot(&mean).sqrt().max(f32::MIN_POSITIVE);
        mean.iter().map(|value| value / length).collect()
    }

    /// Image–text contrastive similarity: the largest cosine over the queries (Li et al. 2023, section 3.2), not divided by a
    /// temperature.
    pub fn similarity(&self, text: &TextEmbedding) -> f32 {
        let cosine = |query: ndarray::ArrayView1<'_, f32>| query.iter().zip(&text.pooled).map(|(a, b)| a * b).sum();
        self.queries.outer_iter().map(cosine).fold(f32::NEG_INFINITY, f32::max)
    }
}

impl PairEmbedding {
    /// Image–text matching probability: the softmax of the logits.
    pub fn probability(&self) -> f32 {
        let [no, yes] = self.itm_logits;
        1.0 / (1.0 + (no - yes).exp())
    }
}

impl Stage1 {
    /// Loads the graphs.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        let cache = bundle.facts().language.as_ref().map(|language| &language.kv_cache);
        let cached = cache.into_iter().flat_map(|cache| cache.tensors()).map(|(layer, side)| query_cache(layer, side));
        let open = |graph| Graph::open(runtime, bundle, graph);
        let (qformer, text, pair) = (open("qformer")?, open("qformer_text")?, open("qformer_itm")?);
        Ok(Self { qformer, text, pair, mover: Mover::new(runtime), cached: cached.collect() })
    }

    /// Lets `cancel` stop every later run.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        for graph in [&mut self.qformer, &mut self.text, &mut self.pair] {
            graph.set_cancel(cancel.clone());
        }
    }

    /// Reads a batch of pictures; with each embedding comes what the Q-Former's own text starts from, where it can write.
    pub fn see(&mut self, features: &ImageFeatures) -> Result<Vec<(ImageEmbedding, Option<QueryCache>)>, RuntimeError> {
        let place = |name: &str| if self.cached.iter().any(|cached| cached == name) { Place::Device } else { Place::Host };
        let mut outputs = self.qformer.run_to(&[("image_features", &features.0)], place)?;
        let states: Array3<f32> = outputs.array("query_states")?;
        let queries: Array3<f32> = outputs.array("image_embeds")?;
        let cached = QueryCache::rows(self.cached.iter().map(|name| outputs.take(name)).collect());
        let embeddings = states.outer_iter().zip(queries.outer_iter());
        let embeddings =
            embeddings.map(|(states, queries)| ImageEmbedding { states: states.to_owned(), queries: queries.to_owned() });
        let mut cached = cached.into_iter();
        Ok(embeddings.map(|embedding| (embedding, cached.next())).collect())
    }

    /// Reads a batch of texts.
    pub fn read(&mut self, texts: &TokenBatch) -> Result<Vec<TextEmbedding>, RuntimeError> {
        let (ids, mask) = ids_and_mask(&self.text, texts)?;
        let mut outputs = self.text.run(&[("input_ids", &ids), ("attention_mask", &mask)], Place::Host)?;
        let embeds: Array3<f32> = outputs.array("text_embeds")?;
        Ok(embeds.outer_iter().map(|text| TextEmbedding { pooled: text.row(0).to_vec() }).collect())
    }

    /// Reads pictures together with as many texts.
    pub fn compare(&mut self, pictures: &[&PictureFeatures], texts: &TokenBatch) -> Result<Vec<PairEmbedding>, RuntimeError> {
        let features = ImageFeatures::stack(&mut self.mover, pictures)?;
        let (ids, mask) = ids_and_mask(&self.pair, texts)?;
        let inputs = [("image_features", &*features.0), ("input_ids", &ids), ("attention_mask", &mask)];
        let mut outputs = self.pair.run(&inputs, Place::Host)?;
        let logits: Array2<f32> = outputs.array("itm_logits")?;
        let states: Array3<f32> = outputs.array("multimodal_states")?;
        let pairs = logits.outer_iter().zip(states.outer_iter());
        Ok(pairs.map(|(logits, states)| PairEmbedding { itm_logits: [logits[0], logits[1]], states: states.to_owned() }).collect())
    }
}
