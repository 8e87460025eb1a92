//! Inputs and outputs of every graph, as `graphs` lists them, against what the other facts make of them.

use std::collections::BTreeSet;

use super::check::MAX_COUNT;
use super::{
    Bundle, BundleError, Dimension, Dtype, Facts, Family, GraphFacts, KvCacheFacts, LanguageFacts, TensorFacts, query_cache,
};

/// What the engine gives to graphs and takes from them.
pub(super) struct Interface<'a> {
    bundle: &'a Bundle,
    /// Graph and name of every tensor that the engine gives.
    inputs: BTreeSet<(String, String)>,
}

impl<'a> Interface<'a> {
    /// Of a bundle whose counts are plausible.
    pub fn new(bundle: &'a Bundle) -> Self {
        Self { bundle, inputs: BTreeSet::new() }
    }

    /// Every graph that the family needs, as the other facts need it.
    pub fn check(mut self) -> Result<(), BundleError> {
        let Facts { image, vision, family, language, .. } = &self.bundle.facts;
        let side = image.size as usize;
        self.check_input("vision", "pixel_values", Dtype::Float32, &[None, Some(3), Some(side), Some(side)])?;
        let features = [None, Some(vision.n_positions), Some(vision.hidden)];
        self.check_output("vision", "image_features", &features)?;
        self.check_input("qformer", "image_features", Dtype::Float32, &features)?;
        match (family, language) {
            (Family::Qformer, language) => self.check_stage1(&features, language.as_ref()),
            (_, Some(language)) => self.check_generation(language),
            (_, None) => self.bundle.ensure(false, || (format!("family {family}"), "but nothing of a language model".into())),
        }?;
        self.check_others()
    }

    /// A graph runs only if all its inputs are given, and no name may stand for two tensors.
    fn check_others(&self) -> Result<(), BundleError> {
        for (graph, facts) in &self.bundle.facts.graphs {
            let mut names = BTreeSet::new();
            let twice = facts.inputs.iter().chain(&facts.outputs).find(|tensor| !names.insert(&tensor.name));
            self.bundle.ensure(twice.is_none(), || {
                (format!("{graph} has two tensors `{}`", twice.map_or("", |t| &t.name)), "names must differ".into())
            })?;
            self.check_profile(graph, facts)?;
            let used = |tensor: &TensorFacts| self.inputs.contains(&(graph.clone(), tensor.name.clone()));
            let unused = facts.inputs.iter().find(|tensor| !used(tensor));
            self.bundle.ensure(unused.is_none(), || {
                let name = unused.map_or("", |tensor| &tensor.name);
                (format!("{graph} has an input `{name}`"), "which nothing in the other facts would be given to".into())
            })?;
        }
        Ok(())
    }

    /// Where engines are built, every size that is not fixed has a range.
    fn check_profile(&self, graph: &str, facts: &GraphFacts) -> Result<(), BundleError> {
        let axes: BTreeSet<&String> =
            facts.inputs.iter().flat_map(|input| input.shape.iter().filter_map(Dimension::axis)).collect();
        let ranges: BTreeSet<&String> = facts.profile.keys().collect();
        self.bundle.ensure(facts.profile.is_empty() || axes == ranges, || {
            (format!("{graph} has a profile of {ranges:?}"), format!("sizes that are not fixed are {axes:?}"))
        })?;
        let wrong = facts
            .profile
            .iter()
            .find(|(_, [least, best, most])| !(1 <= *least && least <= best && best <= most && *most <= MAX_COUNT));
        self.bundle.ensure(wrong.is_none(), || {
            let (axis, range) = wrong.expect("it was just looked for");
            (
                format!("{graph}'s {axis} goes over {range:?}"),
                format!("a least, a best and a largest size of 1 to {MAX_COUNT} are needed"),
            )
        })
    }

    /// Queries for a language model, and the model itself.
    fn check_generation(&mut self, language: &LanguageFacts) -> Result<(), BundleError> {
        let Facts { qformer, family, .. } = &self.bundle.facts;
        self.check_output("qformer", "queries", &[None, Some(qformer.n_queries), Some(language.hidden)])?;
        if qformer.text.is_some() {
            self.check_input("qformer", "question_ids", Dtype::Int64, &[None, None])?;
            self.check_input("qformer", "question_mask", Dtype::Int64, &[None, None])?;
        }
        self.check_decoder(language)?;
        if *family == Family::EncoderDecoder { self.check_encoder(language) } else { Ok(()) }
    }

    /// The heads of stage 1; the one that writes where there is a language part.
    fn check_stage1(&mut self, features: &[Option<usize>], language: Option<&LanguageFacts>) -> Result<(), BundleError> {
        let qformer = &self.bundle.facts.qformer;
        let (Some(joint), true) = (qformer.joint, qformer.text.is_some()) else {
            return self.bundle.ensure(false, || ("family qformer".into(), "but not qformer.joint and qformer.text".into()));
        };
        let (n_queries, hidden) = (Some(qformer.n_queries), Some(qformer.hidden));
        self.check_output("qformer", "query_states", &[None, n_queries, hidden])?;
        self.check_output("qformer", "image_embeds", &[None, n_queries, Some(joint)])?;
        for graph in ["qformer_text", "qformer_itm"] {
            self.check_input(graph, "input_ids", Dtype::Int64, &[None, None])?;
            self.check_input(graph, "attention_mask", Dtype::Int64, &[None, None])?;
        }
        self.check_output("qformer_text", "text_embeds", &[None, None, Some(joint)])?;
        self.check_output("qformer_text", "text_states", &[None, None, hidden])?;
        self.check_input("qformer_itm", "image_features", Dtype::Float32, features)?;
        self.check_output("qformer_itm", "itm_logits", &[None, Some(2)])?;
        self.check_output("qformer_itm", "multimodal_states", &[None, n_queries, hidden])?;
        let Some(language) = language else { return Ok(()) };
        let cache = &language.kv_cache;
        for (layer, side) in cache.tensors() {
            let shape = [None, Some(cache.n_heads), n_queries, Some(cache.head_dim)];
            self.check_cache("qformer", &query_cache(layer, side), cache.dtype, &shape)?;
        }
        self.check_decoder(language)
    }

    fn check_decoder(&mut self, language: &LanguageFacts) -> Result<(), BundleError> {
        let LanguageFacts { hidden, vocab_size, kv_cache, .. } = language;
        if self.bundle.facts.family == Family::DecoderOnly {
            self.check_input("decoder", "queries", Dtype::Float32, &[None, None, Some(*hidden)])?;
        }
        self.check_input("decoder", "input_ids", Dtype::Int64, &[None, None])?;
        self.check_input("decoder", "position_ids", Dtype::Int64, &[None, None])?;
        self.check_input("decoder", "seqlens_k", Dtype::Int32, &[None])?;
        self.check_input("decoder", "slot_rows", Dtype::Int64, &[None])?;
        self.check_input("decoder", "row_slots", Dtype::Int64, &[None])?;
        self.check_input("decoder", "total_sequence_length", Dtype::Int32, &[])?;
        self.check_input("decoder", "logits_at", Dtype::Int64, &[None, None])?;
        self.check_output("decoder", "logits", &[None, None, Some(*vocab_size)])?;
        let KvCacheFacts { past_key, past_value, present_key, present_value, .. } = kv_cache;
        self.check_names(&[past_key, past_value, present_key, present_value])?;
        self.check_kept("a KV cache", kv_cache.dtype)?;
        let shape = [None, Some(kv_cache.n_heads), None, Some(kv_cache.head_dim)];
        for (layer, side) in kv_cache.tensors() {
            self.check_input("decoder", &kv_cache.past(layer, side), kv_cache.dtype, &shape)?;
            self.check_cache("decoder", &kv_cache.present(layer, side), kv_cache.dtype, &shape)?;
        }
        Ok(())
    }

    fn check_encoder(&mut self, language: &LanguageFacts) -> Result<(), BundleError> {
        let (Some(cross), Some(_)) = (&language.cross_attention, language.token_ids.decoder_start) else {
            let missing = "but not language.cross_attention and token_ids.decoder_start";
            return self.bundle.ensure(false, || ("family encoder_decoder".into(), missing.into()));
        };
        self.check_names(&[&cross.key, &cross.value])?;
        self.check_kept("cross-attention", cross.dtype)?;
        self.check_input("encoder", "queries", Dtype::Float32, &[None, None, Some(language.hidden)])?;
        self.check_input("encoder", "input_ids", Dtype::Int64, &[None, None])?;
        self.check_input("encoder", "lengths", Dtype::Int32, &[None])?;
        self.check_input("decoder", "encoder_lengths", Dtype::Int32, &[None])?;
        let shape = [None, Some(cross.n_heads), None, Some(cross.head_dim)];
        for (layer, side) in cross.tensors() {
            self.check_cache("encoder", &cross.name(layer, side), cross.dtype, &shape)?;
            self.check_input("decoder", &cross.name(layer, side), cross.dtype, &shape)?;
        }
        Ok(())
    }

    /// Keys and values are numbers with fractions, in whatever type the graph computes.
    fn check_kept(&self, what: &str, dtype: Dtype) -> Result<(), BundleError> {
        let but = || (format!("{what} of {dtype}"), "float32, float16 and bfloat16 are possible".into());
        self.bundle.ensure(dtype.is_float(), but)
    }

    /// Every layer and side needs a name of its own.
    fn check_names(&self, patterns: &[&String]) -> Result<(), BundleError> {
        let wrong = patterns.iter().find(|pattern| pattern.matches("{}").count() != 1);
        self.bundle.ensure(wrong.is_none(), || {
            (format!("tensors `{}`", wrong.map_or("", |p| p)), "a {} must stand in it for the layer, once".into())
        })
    }

    fn check_input(&mut self, graph: &str, name: &str, dtype: Dtype, shape: &[Option<usize>]) -> Result<(), BundleError> {
        self.inputs.insert((graph.into(), name.into()));
        self.check_tensor(graph, Way::In, name, dtype, shape)
    }

    /// Graphs hand each other float32, whatever they compute in.
    fn check_output(&self, graph: &str, name: &str, shape: &[Option<usize>]) -> Result<(), BundleError> {
        self.check_tensor(graph, Way::Out, name, Dtype::Float32, shape)
    }

    fn check_cache(&self, graph: &str, name: &str, dtype: Dtype, shape: &[Option<usize>]) -> Result<(), BundleError> {
        self.check_tensor(graph, Way::Out, name, dtype, shape)
    }

    /// `None` in `shape` stands for an axis that must be dynamic.
    fn check_tensor(&self, graph: &str, way: Way, name: &str, dtype: Dtype, shape: &[Option<usize>]) -> Result<(), BundleError> {
        let facts = self.bundle.facts.graphs.get(graph);
        self.bundle.ensure(facts.is_some(), || {
            (format!("family {}", self.bundle.facts.family), format!("which needs a graph `{graph}` that `graphs` does not have"))
        })?;
        let tensors = facts.map_or(&[][..], |facts| if way == Way::In { &facts.inputs } else { &facts.outputs });
        let found = tensors.iter().find(|tensor| tensor.name == name);
        let fits = found.is_some_and(|tensor| {
            tensor.dtype == dtype
                && tensor.shape.len() == shape.len()
                && tensor.shape.iter().zip(shape).all(|(found, wanted)| match wanted {
                    Some(size) => *found == Dimension::Fixed(*size),
                    None => matches!(found, Dimension::Dynamic(_)),
                })
        });
        self.bundle.ensure(fits, || {
            let said = found
                .map_or_else(|| format!("nothing of {graph}'s {way} `{name}`"), |t| format!("{graph}'s {way} `{name}` is {t}"));
            let wanted: Vec<String> = shape.iter().map(|d| d.map_or("dynamic".into(), |size| size.to_string())).collect();
            (said, format!("the other facts need {dtype} [{}]", wanted.join(", ")))
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::In { "input" } else { "output" })
    }
}
