//! Facts that contradict each other are found here, before any graph is loaded.

use std::path::{Component, Path};

use super::{Bundle, BundleError, Dimension, Dtype, Facts, Family, LanguageFacts, TaskName, query_cache};
use crate::pixels::{Preprocess, ResizeTo};

impl Bundle {
    pub(super) fn check_facts(&self) -> Result<(), BundleError> {
        self.check_file_names()?;
        self.check_image()?;
        self.check_graphs()?;
        if let Some(language) = &self.facts.language {
            self.check_language(language)?;
        }
        self.check_tasks()
    }

    fn check_file_names(&self) -> Result<(), BundleError> {
        for file in self.facts.files.keys() {
            let plain = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
            self.ensure(plain && !file.is_empty(), || (format!("file `{file}`"), "which is not inside the bundle".into()))?;
        }
        let graphs = self.facts.graphs.values().map(|graph| graph.file.as_str());
        let language = self.facts.language.iter().flat_map(|language| [language.embedding.file.as_str(), self.tokenizer()]);
        let text = self.facts.qformer.text.iter().map(|text| text.tokenizer.as_str());
        for file in graphs.chain(language).chain(text) {
            self.ensure(self.facts.files.contains_key(file), || (format!("file `{file}`"), "which `files` does not list".into()))?;
        }
        Ok(())
    }

    fn check_image(&self) -> Result<(), BundleError> {
        let image = &self.facts.image;
        self.ensure((1..=4096).contains(&image.size), || {
            (format!("image size {}", image.size), "sizes from 1 to 4096 are possible".into())
        })?;
        self.check_resize(image)?;
        let usable = image.std.iter().all(|s| s.is_finite() && *s > 0.0)
            && image.mean.iter().all(|m| m.is_finite())
            && image.rescale.is_finite();
        self.ensure(usable, || ("image mean, std or rescale".into(), "which cannot normalise a pixel".into()))
    }

    fn check_resize(&self, image: &Preprocess) -> Result<(), BundleError> {
        let sides = match image.resize {
            ResizeTo::Square | ResizeTo::Keep => [image.size; 2],
            ResizeTo::Exact { width, height } => [width, height],
            ResizeTo::ShortestEdge(side) => [side; 2],
        };
        self.ensure(sides.iter().all(|side| (1..=4096).contains(side)), || {
            (format!("image resize ({})", image.resize), "sides from 1 to 4096 are possible".into())
        })?;
        self.ensure(image.center_crop || sides == [image.size; 2], || {
            let never = format!("without center_crop that never makes {0}×{0}", image.size);
            (format!("image resize ({})", image.resize), never)
        })
    }

    fn check_graphs(&self) -> Result<(), BundleError> {
        let Facts { image, vision, family, language, .. } = &self.facts;
        let side = image.size as usize;
        self.check_input("vision", "pixel_values", Dtype::Float32, &[None, Some(3), Some(side), Some(side)])?;
        let features = [None, Some(vision.n_positions), Some(vision.hidden)];
        self.check_output("vision", "image_features", &features)?;
        self.check_input("qformer", "image_features", Dtype::Float32, &features)?;
        match (family, language) {
            (Family::Qformer, language) => self.check_stage1(&features, language.as_ref()),
            (_, Some(language)) => self.check_generation(language),
            (_, None) => self.ensure(false, || (format!("family {family}"), "but nothing of a language model".into())),
        }
    }

    /// Queries for a language model, and the model itself.
    fn check_generation(&self, language: &LanguageFacts) -> Result<(), BundleError> {
        let Facts { qformer, family, .. } = &self.facts;
        self.check_output("qformer", "queries", &[None, Some(qformer.n_queries), Some(language.hidden)])?;
        if qformer.text.is_some() {
            self.check_input("qformer", "question_ids", Dtype::Int64, &[None, None])?;
            self.check_input("qformer", "question_mask", Dtype::Int64, &[None, None])?;
        }
        self.check_decoder(language)?;
        if *family == Family::EncoderDecoder { self.check_encoder(language) } else { Ok(()) }
    }

    /// The heads of stage 1; the one that writes where there is a language part.
    fn check_stage1(&self, features: &[Option<usize>], language: Option<&LanguageFacts>) -> Result<(), BundleError> {
        let qformer = &self.facts.qformer;
        let (Some(joint), true) = (qformer.joint, qformer.text.is_some()) else {
            return self.ensure(false, || ("family qformer".into(), "but not qformer.joint and qformer.text".into()));
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
            self.check_output("qformer", &query_cache(layer, side), &shape)?;
        }
        self.check_decoder(language)
    }

    fn check_decoder(&self, language: &LanguageFacts) -> Result<(), BundleError> {
        let LanguageFacts { hidden, vocab_size, kv_cache, .. } = language;
        self.check_input("decoder", "inputs_embeds", Dtype::Float32, &[None, None, Some(*hidden)])?;
        self.check_input("decoder", "position_ids", Dtype::Int64, &[None, None])?;
        self.check_input("decoder", "seqlens_k", Dtype::Int32, &[None])?;
        self.check_input("decoder", "total_sequence_length", Dtype::Int32, &[])?;
        self.check_input("decoder", "logits_at", Dtype::Int64, &[None, None])?;
        self.check_output("decoder", "logits", &[None, None, Some(*vocab_size)])?;
        self.ensure(kv_cache.dtype == Dtype::Float32, || {
            (format!("a KV cache of {}", kv_cache.dtype), "this engine keeps float32".into())
        })?;
        let shape = [None, Some(kv_cache.n_heads), None, Some(kv_cache.head_dim)];
        for (layer, side) in kv_cache.tensors() {
            self.check_input("decoder", &kv_cache.past(layer, side), kv_cache.dtype, &shape)?;
            self.check_output("decoder", &kv_cache.present(layer, side), &shape)?;
        }
        Ok(())
    }

    fn check_encoder(&self, language: &LanguageFacts) -> Result<(), BundleError> {
        let (Some(cross), Some(_)) = (&language.cross_attention, language.token_ids.decoder_start) else {
            let missing = "but not language.cross_attention and token_ids.decoder_start";
            return self.ensure(false, || ("family encoder_decoder".into(), missing.into()));
        };
        self.ensure(cross.dtype == Dtype::Float32, || {
            (format!("cross-attention in {}", cross.dtype), "this engine keeps float32".into())
        })?;
        self.check_input("encoder", "inputs_embeds", Dtype::Float32, &[None, None, Some(language.hidden)])?;
        self.check_input("encoder", "lengths", Dtype::Int32, &[None])?;
        self.check_input("decoder", "encoder_lengths", Dtype::Int32, &[None])?;
        let shape = [None, Some(cross.n_heads), None, Some(cross.head_dim)];
        for (layer, side) in cross.tensors() {
            self.check_output("encoder", &cross.name(layer, side), &shape)?;
            self.check_input("decoder", &cross.name(layer, side), cross.dtype, &shape)?;
        }
        Ok(())
    }

    fn check_input(&self, graph: &str, name: &str, dtype: Dtype, shape: &[Option<usize>]) -> Result<(), BundleError> {
        self.check_tensor(graph, Way::In, name, dtype, shape)
    }

    fn check_output(&self, graph: &str, name: &str, shape: &[Option<usize>]) -> Result<(), BundleError> {
        self.check_tensor(graph, Way::Out, name, Dtype::Float32, shape)
    }

    /// `None` in `shape` stands for an axis that must be dynamic.
    fn check_tensor(&self, graph: &str, way: Way, name: &str, dtype: Dtype, shape: &[Option<usize>]) -> Result<(), BundleError> {
        let facts = self.facts.graphs.get(graph);
        self.ensure(facts.is_some(), || {
            (format!("family {}", self.facts.family), format!("which needs a graph `{graph}` that `graphs` does not have"))
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
        self.ensure(fits, || {
            let said = found
                .map_or_else(|| format!("nothing of {graph}'s {way} `{name}`"), |t| format!("{graph}'s {way} `{name}` is {t}"));
            let wanted: Vec<String> = shape.iter().map(|d| d.map_or("dynamic".into(), |size| size.to_string())).collect();
            (said, format!("the other facts need {dtype} [{}]", wanted.join(", ")))
        })
    }

    fn check_language(&self, language: &LanguageFacts) -> Result<(), BundleError> {
        let embedding = &language.embedding;
        self.ensure(embedding.shape == [language.vocab_size, language.hidden], || {
            let wanted = [language.vocab_size, language.hidden];
            (format!("an embedding table of {:?}", embedding.shape), format!("vocabulary and width make {wanted:?}"))
        })?;
        let size = embedding.dtype.size().saturating_mul(language.vocab_size).saturating_mul(language.hidden) as u64;
        let room = self.facts.files.get(&embedding.file).map_or(0, |file| file.bytes);
        self.ensure(embedding.offset.checked_add(size).is_some_and(|end| end <= room), || {
            (
                format!("the embedding table lies at {} of {}", embedding.offset, embedding.file),
                format!("which has only {room} bytes for its {size}"),
            )
        })?;
        let ids = &language.token_ids;
        self.ensure(!ids.eos.is_empty(), || ("no end token".into(), "so no text would ever end".into()))?;
        for id in ids.eos.iter().chain(&ids.bos).chain(&ids.pad).chain(&ids.decoder_start) {
            self.ensure((*id as usize) < language.vocab_size, || {
                (format!("token id {id}"), format!("the vocabulary has {}", language.vocab_size))
            })?;
        }
        let n_queries = self.facts.qformer.n_queries;
        self.ensure(n_queries < language.max_positions, || {
            (format!("{n_queries} query tokens"), format!("the language model has {} positions", language.max_positions))
        })
    }

    fn check_tasks(&self) -> Result<(), BundleError> {
        self.ensure(!self.facts.tasks.is_empty(), || ("no tasks".into(), "so nothing could be asked of it".into()))?;
        for task in &self.facts.tasks {
            let Facts { family, language, .. } = &self.facts;
            let possible = match task {
                TaskName::Caption => language.is_some(),
                TaskName::Ask => *family != Family::Qformer,
                TaskName::Match | TaskName::Embed => *family == Family::Qformer,
            };
            self.ensure(possible, || (format!("task {task}"), format!("which family {family} as described here cannot do")))?;
            if matches!(task, TaskName::Caption | TaskName::Ask) {
                self.check_writing(*task)?;
            }
        }
        Ok(())
    }

    fn check_writing(&self, task: TaskName) -> Result<(), BundleError> {
        let prompt = self.facts.prompts.get(&task);
        let holes = usize::from(task == TaskName::Ask);
        self.ensure(prompt.is_some_and(|prompt| prompt.matches("{}").count() == holes), || {
            (format!("task {task}"), format!("which needs a prompt with {holes} {{}}"))
        })?;
        let defaults = self.facts.generation.get(&task);
        self.ensure(defaults.is_some_and(|defaults| defaults.max_new_tokens > 0 && defaults.beams > 0), || {
            (format!("task {task}"), "which needs generation.max_new_tokens and beams above 0".into())
        })
    }

    fn ensure(&self, holds: bool, otherwise: impl FnOnce() -> (String, String)) -> Result<(), BundleError> {
        if holds {
            return Ok(());
        }
        let (said, but) = otherwise();
        Err(BundleError::Inconsistent { folder: self.folder.clone(), said, but })
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
