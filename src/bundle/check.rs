//! Facts that contradict each other are found here, before any graph is loaded.

use std::collections::BTreeSet;

use super::files::is_plain;
use super::interface::Interface;
use super::{Bundle, BundleError, Facts, Family, GenerationFacts, LanguageFacts, QformerTextFacts, Requirements, TaskName, brief};
use crate::pixels::{Preprocess, ResizeTo};

/// No width, length or number in the facts is larger. It keeps products of three within 64 bits.
pub(super) const MAX_COUNT: usize = 1 << 20;
/// Largest side that pictures are resized to.
const MAX_SIDE: u32 = 4096;
/// Most beams that a bundle may search with unless told otherwise.
const MAX_BEAMS: usize = 64;

impl Bundle {
    pub(super) fn check_facts(&self) -> Result<(), BundleError> {
        self.check_file_names()?;
        self.check_image()?;
        self.check_counts()?;
        self.check_requirements(&self.facts.requires)?;
        self.check_precisions()?;
        self.check_loss()?;
        Interface::new(self).check()?;
        if let Some(text) = &self.facts.qformer.text {
            self.check_qformer_text(text)?;
        }
        if let Some(language) = &self.facts.language {
            self.check_language(language)?;
        }
        self.check_tasks()
    }

    fn check_file_names(&self) -> Result<(), BundleError> {
        for (file, facts) in &self.facts.files {
            self.ensure(is_plain(file), || (format!("file `{file}`"), "which is not inside the bundle".into()))?;
            let is_hash =
                facts.sha256.len() == 64 && facts.sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            self.ensure(is_hash, || {
                (format!("SHA-256 `{}` of {file}", facts.sha256), "64 lower-case hexadecimal digits are needed".into())
            })?;
        }
        let graphs = self.facts.graphs.values().map(|graph| graph.file.as_str());
        // ONNX Runtime tells the format by the ending, and reads others.
        let foreign = graphs.clone().find(|file| !file.ends_with(".onnx"));
        self.ensure(foreign.is_none(), || (format!("a graph `{}`", foreign.unwrap_or_default()), "graphs are .onnx files".into()))?;
        let language = self.facts.language.iter().map(|_| self.tokenizer());
        let text = self.facts.qformer.text.iter().map(|text| text.tokenizer.as_str());
        for file in graphs.chain(language).chain(text) {
            self.ensure(self.facts.files.contains_key(file), || (format!("file `{file}`"), "which `files` does not list".into()))?;
        }
        Ok(())
    }

    fn check_image(&self) -> Result<(), BundleError> {
        let image = &self.facts.image;
        self.ensure((1..=MAX_SIDE).contains(&image.size), || {
            (format!("image size {}", image.size), format!("sizes from 1 to {MAX_SIDE} are possible"))
        })?;
        self.check_resize(image)?;
        let normalised =
            |channel: usize, value: u8| ((f64::from(value) * image.rescale) as f32 - image.mean[channel]) / image.std[channel];
        let tells_apart = |channel| (1..=255).all(|value| normalised(channel, value) > normalised(channel, value - 1));
        let range = |channel| (normalised(channel, 0), normalised(channel, 255));
        let is_plausible = |(black, white): (f32, f32)| white - black > 0.01 && black.abs().max(white.abs()) < 1e6;
        let usable = |channel| tells_apart(channel) && is_plausible(range(channel));
        self.ensure(image.rescale > 0.0 && image.std.iter().all(|s| *s > 0.0) && (0..3).all(usable), || {
            ("image mean, std or rescale".into(), "which cannot normalise a pixel".into())
        })
    }

    fn check_resize(&self, image: &Preprocess) -> Result<(), BundleError> {
        let sides = match image.resize {
            ResizeTo::Square | ResizeTo::Keep => [image.size; 2],
            ResizeTo::Exact { width, height } => [width, height],
            ResizeTo::ShortestEdge(side) => [side; 2],
        };
        self.ensure(sides.iter().all(|side| (1..=MAX_SIDE).contains(side)), || {
            (format!("image.resize to {sides:?}"), format!("sides from 1 to {MAX_SIDE} are possible"))
        })?;
        self.ensure(image.center_crop || sides == [image.size; 2], || {
            (format!("image.resize to {sides:?}"), format!("without center_crop that never makes {0}×{0}", image.size))
        })
    }

    fn check_counts(&self) -> Result<(), BundleError> {
        let Facts { vision, qformer, language, .. } = &self.facts;
        let mut counts = vec![
            ("vision.n_positions", vision.n_positions),
            ("vision.hidden", vision.hidden),
            ("qformer.n_queries", qformer.n_queries),
            ("qformer.hidden", qformer.hidden),
        ];
        counts.extend(qformer.joint.map(|joint| ("qformer.joint", joint)));
        if let Some(language) = language {
            let cache = &language.kv_cache;
            counts.extend([
                ("language.hidden", language.hidden),
                ("language.vocab_size", language.vocab_size),
                ("language.max_positions", language.max_positions),
                ("kv_cache.n_layers", cache.n_layers),
                ("kv_cache.n_heads", cache.n_heads),
                ("kv_cache.head_dim", cache.head_dim),
            ]);
            let cross = |cross: &super::CrossAttentionFacts| {
                [("n_layers", cross.n_layers), ("n_heads", cross.n_heads), ("head_dim", cross.head_dim)]
            };
            counts.extend(language.cross_attention.iter().flat_map(cross));
        }
        for (name, found) in counts {
            self.ensure((1..=MAX_COUNT).contains(&found), || {
                (format!("{name} is {found}"), format!("1 to {MAX_COUNT} are possible"))
            })?;
        }
        let temperature = qformer.temperature.unwrap_or(1.0);
        self.ensure(temperature.is_finite() && temperature > 0.0, || {
            (format!("qformer.temperature is {temperature}"), "it must be a number above 0".into())
        })
    }

    fn check_requirements(&self, requires: &Requirements) -> Result<(), BundleError> {
        let version = requires.onnxruntime.split_once('.').map(|(major, minor)| [major, minor].map(str::parse::<u32>));
        self.ensure(matches!(version, Some([Ok(_), Ok(_)])), || {
            (format!("requires.onnxruntime is `{}`", requires.onnxruntime), "a version is two numbers, as in 1.31".into())
        })
    }

    fn check_qformer_text(&self, text: &QformerTextFacts) -> Result<(), BundleError> {
        let QformerTextFacts { max_tokens, max_positions, reads, .. } = *text;
        let family = self.facts.family;
        self.ensure(reads.is_some() != (family == Family::Qformer), || {
            let said = if reads.is_some() { "qformer.text.reads" } else { "nothing of qformer.text.reads" };
            (said.into(), format!("but in family {family} it is {}", if reads.is_some() { "without meaning" } else { "needed" }))
        })?;
        self.ensure((1..=MAX_COUNT).contains(&max_positions), || {
            (format!("qformer.text.max_positions is {max_positions}"), format!("1 to {MAX_COUNT} are possible"))
        })?;
        self.ensure((1..=max_positions).contains(&max_tokens), || {
            (format!("qformer.text.max_tokens is {max_tokens}"), format!("1 to max_positions, {max_positions}, are possible"))
        })
    }

    fn check_language(&self, language: &LanguageFacts) -> Result<(), BundleError> {
        self.check_token_ids(language)?;
        let has_encoder = self.facts.family == Family::EncoderDecoder;
        self.ensure(language.cross_attention.is_none() || has_encoder, || {
            ("language.cross_attention".into(), format!("family {} has no encoder", self.facts.family))
        })?;
        let n_queries = self.facts.qformer.n_queries;
        self.ensure(n_queries < language.max_positions, || {
            (format!("{n_queries} query tokens"), format!("the language model has {} positions", language.max_positions))
        })
    }

    fn check_token_ids(&self, language: &LanguageFacts) -> Result<(), BundleError> {
        let (ids, vocab_size) = (&language.token_ids, language.vocab_size);
        self.ensure(!ids.eos.is_empty(), || ("no end token".into(), "so no text would ever end".into()))?;
        // The searches keep as many continuations as there are end tokens.
        self.ensure(ids.eos.iter().collect::<BTreeSet<_>>().len() == ids.eos.len(), || {
            (format!("end tokens {:?}", ids.eos), "each may stand there once".into())
        })?;
        self.ensure(ids.bos.is_some() || self.facts.family != Family::Qformer, || {
            ("no token_ids.bos".into(), "which captions of family qformer begin with".into())
        })?;
        for id in ids.eos.iter().chain(&ids.bos).chain(&ids.pad).chain(&ids.decoder_start) {
            self.ensure((*id as usize) < vocab_size, || (format!("token id {id}"), format!("the vocabulary has {vocab_size}")))?;
        }
        // The image token has no embedding where it was added behind the last one.
        self.ensure(ids.image.is_none_or(|id| id as usize <= vocab_size), || {
            (format!("image token id {}", ids.image.unwrap_or_default()), format!("the vocabulary has {vocab_size}"))
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
        let Some(defaults) = self.facts.generation.get(&task) else {
            return self.ensure(false, || (format!("task {task}"), "but nothing of it in `generation`".into()));
        };
        self.check_defaults(task, defaults)
    }

    fn check_defaults(&self, task: TaskName, defaults: &GenerationFacts) -> Result<(), BundleError> {
        let GenerationFacts { max_new_tokens, min_new_tokens, beams, length_penalty } = *defaults;
        let room = self.facts.language.as_ref().map_or(0, |language| language.max_positions);
        let checks = [
            ("max_new_tokens", max_new_tokens.to_string(), (1..=room).contains(&max_new_tokens), format!("1 to {room}")),
            ("min_new_tokens", min_new_tokens.to_string(), min_new_tokens <= max_new_tokens, format!("0 to {max_new_tokens}")),
            ("beams", beams.to_string(), (1..=MAX_BEAMS).contains(&beams), format!("1 to {MAX_BEAMS}")),
            ("length_penalty", length_penalty.to_string(), (-10.0..=10.0).contains(&length_penalty), "-10 to 10".into()),
        ];
        checks.into_iter().try_for_each(|(name, found, holds, range)| {
            self.ensure(holds, || (format!("generation.{task}.{name} is {found}"), format!("{range} are possible")))
        })
    }

    pub(super) fn ensure(&self, holds: bool, otherwise: impl FnOnce() -> (String, String)) -> Result<(), BundleError> {
        if holds {
            return Ok(());
        }
        let (said, but) = otherwise();
        let (said, but) = (brief(&said), brief(&but));
        Err(BundleError::Inconsistent { folder: self.folder.clone(), said, but })
    }
}
