//! What can be typed.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

use super::Failure;
use crate::decode::{EarlyStopping, Processors, Strategy, Warpers};
use crate::engine::{Engine, Generation};
use crate::error::Error;
use crate::pixels::Limits;
use crate::runtime::{ProviderChoice, RuntimeOptions};

const DEFAULT_MODEL: &str = "models/demo-opt";

const EXIT_CODES: &str = "Exit codes: 0 done, 1 a graph failed while it ran, 2 wrong command line, 3 bad picture or text, \
4 bad bundle or outputs that differ from its reference, 5 ONNX Runtime or the provider is not usable.";

/// Captions pictures and answers questions about them with BLIP-2 on ONNX Runtime.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Describe pictures, one line each
    Caption(Caption),
    /// Answer questions about a picture; it is looked at once
    Ask(Ask),
    /// Compare a bundle with the outputs recorded from its reference, and its files with their hashes
    Verify(Verify),
    /// Show what a bundle is and what it needs
    Inspect(Inspect),
    /// Show which ONNX Runtime and which execution providers are usable here
    Doctor(Doctor),
}

#[derive(Debug, clap::Args)]
pub(super) struct Caption {
    /// Pictures (JPEG, PNG, GIF, WebP, BMP, TIFF, PNM); `-` reads one from standard input
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<PathBuf>,
    #[command(flatten)]
    pub write: Write,
    #[command(flatten)]
    pub model: Model,
}

#[derive(Debug, clap::Args)]
pub(super) struct Ask {
    /// The picture; `-` reads it from standard input
    pub image: PathBuf,
    /// Questions about it
    #[arg(required = true, value_name = "QUESTION")]
    pub questions: Vec<String>,
    #[command(flatten)]
    pub write: Write,
    #[command(flatten)]
    pub model: Model,
}

#[derive(Debug, clap::Args)]
pub(super) struct Verify {
    /// The bundle; --model's if absent
    pub bundle: Option<PathBuf>,
    #[command(flatten)]
    pub model: Model,
}

#[derive(Debug, clap::Args)]
pub(super) struct Inspect {
    /// The bundle; --model's if absent
    pub bundle: Option<PathBuf>,
    #[command(flatten)]
    pub model: ModelFolder,
    /// Print bundle.json in one line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    pub model: Model,
}

/// How texts are written and shown.
#[derive(Debug, clap::Args)]
pub(super) struct Write {
    /// Tokens to write at most; the bundle's default if absent, limited by the model's positions
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<NonZeroUsize>,
    #[command(flatten)]
    pub search: SearchArgs,
    /// Let the model continue this text instead of the task's own prompt; for `ask`, `{}` takes the question
    #[arg(long, value_name = "RAW")]
    pub prompt: Option<String>,
    /// Print one JSON object per text
    #[arg(long)]
    pub json: bool,
    /// Print the time of every stage to standard error
    #[arg(long)]
    pub timings: bool,
    /// Largest picture in bytes
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_bytes, hide_short_help = true)]
    pub max_bytes: u64,
    /// Largest picture in pixels, checked before it is decoded
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_pixels, hide_short_help = true)]
    pub max_pixels: u64,
}

/// Which search writes, and what it may write.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Search")]
pub(super) struct SearchArgs {
    /// Tokens to write before the text may end
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_new_tokens: usize,
    /// Beam search with this many beams; greedy search if absent
    #[arg(long, value_name = "N")]
    pub beams: Option<usize>,
    /// Exponent of the length that a beam's sum of log-probabilities is divided by [default: 1]
    #[arg(long, value_name = "X", requires = "beams", allow_negative_numbers = true)]
    pub length_penalty: Option<f32>,
    /// When beam search ends: true, when there is a finished text for every beam; false, when a better one is unlikely; never, when
    /// there can be none [default: false]
    #[arg(long, value_name = "WHEN", requires = "beams")]
    pub early_stopping: Option<EarlyStopping>,
    /// Texts for each picture or question, the best first
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub num_return: usize,
    /// Draw tokens instead of taking the best; with --beams, draw continuations
    #[arg(long)]
    pub sample: bool,
    /// Divides scores before drawing; below 1 sharpens
    #[arg(long, value_name = "X", requires = "sample")]
    pub temperature: Option<f32>,
    /// Draw from this many of the best tokens
    #[arg(long, value_name = "N", requires = "sample")]
    pub top_k: Option<usize>,
    /// Draw from the best tokens that together reach this probability
    #[arg(long, value_name = "P", requires = "sample")]
    pub top_p: Option<f32>,
    /// Draw from tokens with at least this share of the best one's probability
    #[arg(long, value_name = "P", requires = "sample")]
    pub min_p: Option<f32>,
    /// Draw from the tokens nearest to the expected information that together reach this probability
    #[arg(long, value_name = "P", requires = "sample")]
    pub typical_p: Option<f32>,
    /// The same seed draws the same texts
    #[arg(long, value_name = "N", default_value_t = 0, requires = "sample")]
    pub seed: u64,
    /// Above 1, tokens that are already there become less likely
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// No run of this many tokens occurs twice; 0 is off
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub no_repeat_ngram: usize,
}

#[derive(Debug, clap::Args)]
pub(super) struct ModelFolder {
    /// The bundle [default: models/demo-opt, here or in a folder above the executable]
    #[arg(long, value_name = "DIR", env = "BLIP2_MODEL")]
    pub model: Option<PathBuf>,
}

/// What runs, and where.
#[derive(Debug, clap::Args)]
pub(super) struct Model {
    #[command(flatten)]
    pub folder: ModelFolder,
    /// Where graphs run: auto, cpu, cuda or tensorrt; auto takes the first that works of tensorrt, cuda and cpu
    #[arg(long, value_name = "NAME", default_value_t = ProviderChoice::Auto)]
    pub provider: ProviderChoice,
    /// Which GPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub device: u32,
    /// Threads inside an operator; one a core if absent
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// ONNX Runtime's library or its folder; searched for if absent (ORT_DYLIB_PATH, beside the executable, virtual environments)
    #[arg(long, value_name = "PATH")]
    pub onnxruntime: Option<PathBuf>,
    /// Where TensorRT keeps built engines [default: .tensorrt in the bundle]
    #[arg(long, value_name = "DIR", hide_short_help = true)]
    pub cache: Option<PathBuf>,
}

impl Model {
    pub fn open(&self) -> Result<Engine, Error> {
        Engine::open(&self.folder.path(), &self.into())
    }
}

impl ModelFolder {
    pub fn path(&self) -> PathBuf {
        self.model.clone().unwrap_or_else(default_model)
    }
}

impl From<&Model> for RuntimeOptions {
    fn from(model: &Model) -> Self {
        Self {
            library: model.onnxruntime.clone(),
            provider: model.provider,
            device: model.device,
            threads: model.threads,
            cache: model.cache.clone(),
        }
    }
}

impl TryFrom<&Write> for Generation {
    type Error = Failure;

    fn try_from(write: &Write) -> Result<Self, Failure> {
        let search = &write.search;
        let max_new_tokens = write.max_new_tokens.map(NonZeroUsize::get);
        if let Some(most) = max_new_tokens.filter(|most| *most < search.min_new_tokens) {
            return Err(Failure::Usage(format!("--min-new-tokens {} is more than --max-new-tokens {most}", search.min_new_tokens)));
        }
        let processors = Processors {
            min_new_tokens: search.min_new_tokens,
            repetition_penalty: search.repetition_penalty,
            no_repeat_ngram: search.no_repeat_ngram,
            ..Processors::default()
        };
        let strategy = search.strategy()?;
        strategy.check(&processors).map_err(crate::Error::from)?;
        Ok(Self { max_new_tokens, processors, strategy })
    }
}

impl SearchArgs {
    fn strategy(&self) -> Result<Strategy, Failure> {
        let drawn = self.sample.then(|| (self.warpers(), self.seed));
        match (self.beams, drawn) {
            (Some(beams), sample) => Ok(Strategy::Beam {
                beams,
                length_penalty: self.length_penalty.unwrap_or(1.0),
                early_stopping: self.early_stopping.unwrap_or_default(),
                n_return: self.num_return,
                sample,
            }),
            (None, Some((warpers, seed))) => Ok(Strategy::Sample { warpers, seed, n_return: self.num_return }),
            (None, None) if self.num_return == 1 => Ok(Strategy::Greedy),
            (None, None) => Err(Failure::Usage("--num-return needs --beams or --sample: greedy search writes one text".into())),
        }
    }

    fn warpers(&self) -> Warpers {
        let plain = Warpers::default();
        Warpers {
            temperature: self.temperature.unwrap_or(plain.temperature),
            top_k: self.top_k.unwrap_or(plain.top_k),
            top_p: self.top_p.unwrap_or(plain.top_p),
            min_p: self.min_p.unwrap_or(plain.min_p),
            typical_p: self.typical_p.unwrap_or(plain.typical_p),
        }
    }
}

impl From<&Write> for Limits {
    fn from(write: &Write) -> Self {
        Self { max_bytes: write.max_bytes, max_pixels: write.max_pixels }
    }
}

fn default_model() -> PathBuf {
    let here = PathBuf::from(DEFAULT_MODEL);
    if here.exists() {
        return here;
    }
    let executable = std::env::current_exe().and_then(std::fs::canonicalize).unwrap_or_default();
    let above = executable.ancestors().map(|folder| folder.join(DEFAULT_MODEL));
    above.into_iter().find(|folder: &PathBuf| Path::is_dir(folder)).unwrap_or(here)
}
