//! What can be typed.

use std::ffi::{OsStr, OsString};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Parser, Subcommand};

use super::bench::Bench;
use super::plain::plain;
use super::serve::Serve;
use super::{Failure, chain};
use crate::bench::environment::Machine;
use crate::bench::settings::Settings;
use crate::bundle::{Bundle, Load};
use crate::decode::EarlyStopping;
use crate::engine::{Engine, GenerationOptions};
use crate::error::Error;
use crate::pixels::{Alpha, Limits};
use crate::prompt::PromptError;
use crate::runtime::{ComputeType, Fallback, ProviderChoice, Runtime, RuntimeOptions};
use crate::text::Warning;

/// As `cargo bench --bench batch` finds it.
pub(super) const DEFAULT_BATCH: usize = 8;
/// More bring nothing and take memory.
const MOST_BATCH: usize = 1024;

const DEFAULT_MODEL: &str = "models/demo-opt";

const EXIT_CODES: &str = "Exit codes: 0 done, 1 a graph failed while it ran, 2 wrong command line, 3 bad picture or text, \
4 bad bundle or outputs that differ from its reference, 5 ONNX Runtime or the provider is not usable, 130 a measurement was stopped.";

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
    /// Tell how well texts fit a picture: matching probability (ITM) and similarity (ITC)
    Match(Match),
    /// Turn pictures or texts into vectors of one space
    Embed(Embed),
    /// Order candidate answers by their likelihood
    Rank(Rank),
    /// Answer over HTTP: OpenAI's protocol, retrieval tools' and BLIP-2's own, with a page to try it
    Serve(Box<Serve>),
    /// Compare a bundle with the outputs recorded from its reference, and its files with their hashes
    Verify(Verify),
    /// Measure how long things take, and how surely that is known
    Bench(Box<Bench>),
    /// Show what a bundle is and what it needs
    Inspect(Inspect),
    /// Build TensorRT's engines of a bundle for this machine, before anything runs on them
    Build(Build),
    /// Show which ONNX Runtime and which execution providers are usable here
    Doctor(Doctor),
}

#[derive(Debug, clap::Args)]
pub(super) struct Caption {
    /// Pictures (JPEG, PNG, GIF, WebP, BMP, TIFF, PNM); `-` reads one from standard input
    #[arg(required_unless_present = "images_from", value_name = "IMAGE")]
    pub images: Vec<PathBuf>,
    #[command(flatten)]
    pub many: Many,
    #[command(flatten)]
    pub write: Write,
    #[command(flatten)]
    pub model: Model,
}

#[derive(Debug, clap::Args)]
pub(super) struct Ask {
    /// The picture, `-` for standard input; another question where --image or --images-from names pictures
    #[arg(required_unless_present = "pairs", value_name = "IMAGE")]
    pub first: Option<OsString>,
    /// Questions about each picture
    #[arg(required_unless_present_any = ["images", "images_from", "pairs"], value_name = "QUESTION")]
    pub rest: Vec<String>,
    /// A file with a JSON object a line, such as {"image": "a.png", "question": "what is this?"}, or a list of questions; `-` reads
    /// them from standard input, as they come
    #[arg(long, value_name = "FILE", conflicts_with_all = ["first", "images", "images_from"])]
    pub pairs: Option<PathBuf>,
    #[command(flatten)]
    pub images: Images,
    #[command(flatten)]
    pub write: Write,
    #[command(flatten)]
    pub model: Model,
}

#[derive(Debug, clap::Args)]
pub(super) struct Match {
    /// The picture, `-` for standard input; another text where --image or --images-from names pictures
    #[arg(required_unless_present = "pairs", value_name = "IMAGE")]
    pub first: Option<OsString>,
    /// Texts to compare each picture with
    #[arg(required_unless_present_any = ["images", "images_from", "pairs"], value_name = "TEXT")]
    pub rest: Vec<String>,
    /// A file with a JSON object a line, such as {"image": "a.png", "text": "a red star"}, or a list of texts; `-` reads them from
    /// standard input, as they come
    #[arg(long, value_name = "FILE", conflicts_with_all = ["first", "images", "images_from"])]
    pub pairs: Option<PathBuf>,
    #[command(flatten)]
    pub images: Images,
    #[command(flatten)]
    pub show: Show,
    #[command(flatten)]
    pub read: Read,
    #[command(flatten)]
    pub input: Input,
    #[command(flatten)]
    pub model: Model,
}

#[derive(Debug, clap::Args)]
pub(super) struct Embed {
    /// What the items are
    pub kind: EmbedKind,
    /// Pictures or texts; for `pair` a picture and the texts that are read with it
    #[arg(required_unless_present = "images_from", value_name = "ITEM")]
    pub items: Vec<String>,
    #[command(flatten)]
    pub many: Many,
    /// Write one array of float32 to this file instead of printing vectors
    #[arg(long, value_name = "FILE")]
    pub npy: Option<PathBuf>,
    /// Of a picture, one vector a query instead of their mean
    #[arg(long)]
    pub per_query: bool,
    #[command(flatten)]
    pub read: Read,
    #[command(flatten)]
    pub input: Input,
    #[command(flatten)]
    pub model: Model,
}

/// What can become a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum EmbedKind {
    /// Pictures, in the space that they share with texts
    Image,
    /// Texts, in the space that they share with pictures
    Text,
    /// The Q-Former's states for a picture read together with a text
    Pair,
}

#[derive(Debug, clap::Args)]
pub(super) struct Rank {
    /// The picture; `-` reads it from standard input
    pub image: PathBuf,
    /// The question
    pub question: String,
    /// Candidate answers
    #[arg(required = true, value_name = "ANSWER")]
    pub answers: Vec<String>,
    /// Order by the log-likelihood of a token on average; sums favour short answers
    #[arg(long)]
    pub normalize: bool,
    /// Put the question into this text instead of the bundle's own prompt; `{}` takes it
    #[arg(long, value_name = "RAW")]
    pub prompt: Option<String>,
    #[command(flatten)]
    pub show: Show,
    #[command(flatten)]
    pub read: Read,
    #[command(flatten)]
    pub input: Input,
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
    /// Show what loading takes of the processor's memory, and texts about --batch pictures
    #[arg(long, conflicts_with = "json")]
    pub memory: bool,
    /// Pictures that are worked on together
    #[arg(long, value_name = "N", default_value_t = DEFAULT_BATCH, value_parser = batch, requires = "memory")]
    pub batch: usize,
}

#[derive(Debug, clap::Args)]
pub(super) struct Build {
    /// Build them again where they are there
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub model: Model,
}

#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    pub model: Model,
}

/// Pictures beside those that were typed, and how many are worked on together.
#[derive(Debug, clap::Args)]
pub(super) struct Many {
    /// A file with paths of pictures, one a line; `-` reads them from standard input, as they come
    #[arg(long, value_name = "FILE")]
    pub images_from: Option<PathBuf>,
    /// Pictures that are looked at, and texts that are written, together; 1024 at most [default: --settings', else 8]
    #[arg(long, value_name = "N", value_parser = batch, hide_short_help = true)]
    pub batch: Option<usize>,
}

/// Pictures where texts are typed.
#[derive(Debug, clap::Args)]
pub(super) struct Images {
    /// A picture; may be given several times. All that is typed without an option are texts then
    #[arg(id = "images", long = "image", value_name = "FILE")]
    pub named: Vec<PathBuf>,
    #[command(flatten)]
    pub many: Many,
}

/// How texts are written and shown.
#[derive(Debug, clap::Args)]
pub(super) struct Write {
    /// Tokens to write at most, limited by the model's positions; if absent, the bundle's default, or --min-new-tokens if that is more
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<NonZeroUsize>,
    #[command(flatten)]
    pub search: SearchArgs,
    /// Let the model continue this text instead of the task's own prompt; for `ask`, `{}` takes the question
    #[arg(long, value_name = "RAW")]
    pub prompt: Option<String>,
    /// Order the texts of --num-return by how well they match the picture, as another bundle's matching head finds
    #[arg(long, value_name = "HEAD", value_parser = ["itm"], requires = "itm_model")]
    pub rerank: Option<String>,
    /// The bundle that --rerank asks
    #[arg(long, value_name = "DIR", requires = "rerank")]
    pub itm_model: Option<PathBuf>,
    /// Log-probability of every token, with this many of the most probable in its place; with --json
    #[arg(long, value_name = "N", requires = "json", conflicts_with = "rerank")]
    pub log_probs: Option<usize>,
    #[command(flatten)]
    pub show: Show,
    #[command(flatten)]
    pub read: Read,
    #[command(flatten)]
    pub input: Input,
}

/// How results are shown.
#[derive(Debug, clap::Args)]
pub(super) struct Show {
    /// Print one JSON object per result
    #[arg(long)]
    pub json: bool,
    /// Print the time of every stage to standard error
    #[arg(long)]
    pub timings: bool,
}

/// What texts may be.
#[derive(Debug, clap::Args)]
pub(super) struct Read {
    /// Refuse a text with characters that the vocabulary lacks, instead of reading its unknown token there
    #[arg(long)]
    pub strict_text: bool,
}

/// What pictures may be.
#[derive(Debug, clap::Args)]
pub(super) struct Input {
    /// Largest picture in bytes
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_bytes, hide_short_help = true)]
    pub max_bytes: u64,
    /// Largest picture in pixels, checked before it is decoded
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_pixels, hide_short_help = true)]
    pub max_pixels: u64,
    /// Longest side of a picture, in pixels
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_side, hide_short_help = true)]
    pub max_side: u32,
    /// What becomes of transparency: white, laid over white; drop, colours as they are stored [default: the bundle's]
    #[arg(long, value_name = "HOW")]
    pub alpha: Option<Alpha>,
}

/// Which search writes, and what it may write.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Search")]
pub(super) struct SearchArgs {
    /// Tokens to write before the text may end [default: the bundle's]
    #[arg(long, value_name = "N")]
    pub min_new_tokens: Option<usize>,
    /// Beam search with this many beams, 1 for greedy search [default: the bundle's]
    #[arg(long, value_name = "N")]
    pub beams: Option<usize>,
    /// Exponent of the length that a beam's sum of log-probabilities is divided by [default: the bundle's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub length_penalty: Option<f32>,
    /// When beam search ends: true, when there is a finished text for every beam; false, when a better one is unlikely; never, when
    /// there can be none [default: false]
    #[arg(long, value_name = "WHEN")]
    pub early_stopping: Option<EarlyStopping>,
    /// Texts for each picture or question, the best first
    #[arg(long, value_name = "N", default_value_t = NonZeroUsize::MIN)]
    pub num_return: NonZeroUsize,
    /// Draw tokens instead of taking the best; with --beams, draw continuations
    #[arg(long)]
    pub sample: bool,
    /// Divides scores before drawing; below 1 sharpens
    #[arg(long, value_name = "X", requires = "sample", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Draw from this many of the best tokens
    #[arg(long, value_name = "N", requires = "sample")]
    pub top_k: Option<usize>,
    /// Draw from the best tokens that together reach this probability
    #[arg(long, value_name = "P", requires = "sample", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Draw from tokens with at least this share of the best one's probability
    #[arg(long, value_name = "P", requires = "sample", allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Draw from the tokens nearest to the expected information that together reach this probability
    #[arg(long, value_name = "P", requires = "sample", allow_negative_numbers = true)]
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
    /// This word is never written; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub bad_word: Vec<String>,
    /// The text ends before this; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Token ids that are never written
    #[arg(long, value_name = "IDS", value_delimiter = ',', hide_short_help = true)]
    pub suppress_tokens: Vec<u32>,
    /// Token ids that the text does not begin with
    #[arg(long, value_name = "IDS", value_delimiter = ',', hide_short_help = true)]
    pub begin_suppress_tokens: Vec<u32>,
    /// Token id behind a decoder's start token
    #[arg(long, value_name = "ID", hide_short_help = true)]
    pub forced_bos_token: Option<u32>,
    /// Token ids, one of which comes last when the limit is reached
    #[arg(long, value_name = "IDS", value_delimiter = ',', hide_short_help = true)]
    pub forced_eos_tokens: Vec<u32>,
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
    #[command(flatten)]
    pub run: Run,
}

/// Where graphs run.
#[derive(Debug, clap::Args)]
pub(super) struct Run {
    /// Where graphs run: auto, cpu, cuda, tensorrt, a plugin (openvino, webgpu, tensorrt-rtx) or plugin:NAME, any other with its
    /// --ep-library; auto takes the first that works of cuda and cpu
    #[arg(long, value_name = "NAME", env = "BLIP2_PROVIDER", default_value_t = ProviderChoice::Auto)]
    pub provider: ProviderChoice,
    /// Which of the provider's devices
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub device: u32,
    /// Threads inside an operator, 256 at most [default: --settings', else one a core that this process may use]
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<NonZeroUsize>,
    /// What `bench tune` found to be best here: defaults of --threads and --batch, and of --concurrency in `bench offline`
    #[arg(long, value_name = "FILE", env = "BLIP2_SETTINGS", value_parser = settings())]
    settings: Option<Settings>,
    /// ONNX Runtime's library or its folder; searched for if absent (ORT_DYLIB_PATH, beside the executable, virtual environments)
    #[arg(long, value_name = "PATH")]
    pub onnxruntime: Option<PathBuf>,
    /// The library of the provider's plugin, or its folder; searched for if absent (beside ONNX Runtime, virtual environments)
    #[arg(long, value_name = "PATH", env = "BLIP2_EP_LIBRARY", hide_short_help = true)]
    pub ep_library: Option<PathBuf>,
    /// An option of the provider's plugin; may be given several times
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_and_value, hide_short_help = true)]
    pub ep_option: Vec<(String, String)>,
    /// What openvino computes in: float32, bfloat16 or float16, where the device has it [default: float32]
    #[arg(long, value_name = "TYPE")]
    pub precision: Option<ComputeType>,
    /// What may run on the processor where the named provider lacks operators: those operators, or whole graphs that have them
    #[arg(long, value_name = "operators|graphs", num_args = 0..=1, require_equals = true, hide_short_help = true)]
    #[arg(default_missing_value = "operators", default_value_t = Fallback::Nothing, hide_default_value = true)]
    pub allow_fallback: Fallback,
    /// Start every kernel of a decode step on its own, where the GPU could record a step and repeat it whole (CUDA graphs)
    #[arg(long, hide_short_help = true)]
    pub no_graph_capture: bool,
    /// Where `build` keeps TensorRT's engines [default: blip2/tensorrt in the user's cache folder]
    #[arg(long, value_name = "DIR", hide_short_help = true)]
    pub cache: Option<PathBuf>,
    /// Memory that may be taken in all, such as 2GiB or 500MB; a bundle that needs more is refused before it is loaded
    #[arg(long, value_name = "N", env = "BLIP2_MEMORY_LIMIT", value_parser = bytes)]
    pub memory_limit: Option<u64>,
    /// Memory for the KV cache and logits of the texts that are written together [default: three quarters of what is free; on a GPU, all]
    #[arg(long, value_name = "N", value_parser = bytes, hide_short_help = true)]
    pub max_cache_bytes: Option<u64>,
}

/// A number of bytes: `2GiB`, `500MB`, `1000000`.
pub(super) fn bytes(typed: &str) -> Result<u64, String> {
    let (number, unit) = typed.split_at(typed.find(|char: char| !char.is_ascii_digit()).unwrap_or(typed.len()));
    let factor: Option<u64> = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => Some(1),
        "kb" => Some(1000),
        "mb" => Some(1_000_000),
        "gb" => Some(1_000_000_000),
        "kib" => Some(1 << 10),
        "mib" => Some(1 << 20),
        "gib" => Some(1 << 30),
        _ => None,
    };
    let found = number.parse::<u64>().ok().zip(factor).and_then(|(number, factor)| number.checked_mul(factor));
    found.ok_or_else(|| "a number of bytes is needed, such as 2GiB, 500MB or 1000000".into())
}

fn settings() -> impl TypedValueParser<Value = Settings> {
    PathBufValueParser::new().try_map(|path| Settings::read(&path).map_err(|error| chain(&error)))
}

fn threads(typed: &str) -> Result<NonZeroUsize, String> {
    let n: usize = typed.parse().map_err(|error: std::num::ParseIntError| error.to_string())?;
    NonZeroUsize::new(n).ok_or_else(|| "an operator runs on 1 thread at least".into())
}

fn batch(typed: &str) -> Result<usize, String> {
    let n = typed.parse().map_err(|error: std::num::ParseIntError| error.to_string())?;
    if (1..=MOST_BATCH).contains(&n) { Ok(n) } else { Err(format!("1 to {MOST_BATCH} pictures can be worked on together")) }
}

impl Images {
    /// The pictures and the texts of what was typed: the first of it is the picture where no option names any.
    pub fn sort(&self, first: Option<&OsStr>, rest: &[String]) -> Result<(Vec<PathBuf>, Vec<String>), Failure> {
        let Some(first) = first else { return Ok(Default::default()) };
        if self.named.is_empty() && self.many.images_from.is_none() {
            return Ok((vec![first.into()], rest.to_vec()));
        }
        let not_text = || Failure::Usage(format!("{}: a text is in UTF-8", plain(&first.to_string_lossy())));
        let first = first.to_str().ok_or_else(not_text)?.to_owned();
        Ok((self.named.clone(), std::iter::once(first).chain(rest.iter().cloned()).collect()))
    }
}

impl Model {
    /// The bundle, its facts checked.
    pub fn bundle(&self) -> Result<Bundle, Error> {
        let bundle = Bundle::open(&self.folder.path())?;
        self.doubt_settings(&bundle);
        Ok(bundle)
    }

    /// Says on standard error where --settings were found elsewhere, or for another bundle.
    pub fn doubt_settings(&self, bundle: &Bundle) {
        let Some(settings) = &self.run.settings else { return };
        let named = Some(self.run.provider.to_string()).filter(|_| self.run.provider != ProviderChoice::Auto);
        let doubts = settings.doubts(&Machine::without_tools(), &bundle.hash(), named.as_deref());
        doubts.iter().for_each(|doubts| eprintln!("blip2: warning: --settings may be wrong here: {}", plain(doubts)));
    }

    /// Threads inside an operator, if anybody named a number.
    pub fn threads(&self) -> Option<NonZeroUsize> {
        self.run.threads()
    }

    /// Pictures together, as the settings have it.
    pub fn batch_of_settings(&self) -> Option<NonZeroUsize> {
        self.run.settings.as_ref()?.batch
    }

    /// What graphs run on. Where nobody named it, standard error says what it is, and why it is nothing faster.
    pub fn runtime(&self) -> Result<Runtime, Error> {
        let runtime = Runtime::load(&(&self.run).into())?;
        if self.run.provider == ProviderChoice::Auto {
            eprintln!("blip2: runs on {}", plain(&runtime.choice().to_string()));
        }
        Ok(runtime)
    }

    /// As many pictures together, of those typed or else of the default, as --memory-limit leaves room for; standard error says so where
    /// that is less.
    pub fn batch(&self, bundle: &Bundle, typed: Option<usize>) -> Result<usize, Error> {
        let wanted = typed.unwrap_or_else(|| self.batch_of_settings().map_or(DEFAULT_BATCH, NonZeroUsize::get));
        let Some(limit) = self.run.memory_limit else { return Ok(wanted) };
        for batch in (1..=wanted).rev() {
            if bundle.memory(Load { batch: batch as u64, ..Load::LEAST })?.peak() <= limit {
                if batch < wanted {
                    eprintln!("blip2: warning: --memory-limit leaves room for {batch} of {wanted} pictures together");
                }
                return Ok(batch);
            }
        }
        // Loading says so.
        Ok(wanted)
    }

    /// Loads a bundle's graphs where the user wants them. Standard error says what of them is slow there.
    pub fn load(&self, bundle: Bundle) -> Result<Engine, Error> {
        let engine = Engine::load(bundle, self.runtime()?)?;
        engine.notices().iter().for_each(|notice| eprintln!("blip2: {}", plain(notice)));
        Ok(engine)
    }
}

impl Model {
    /// The same for another process.
    pub fn typed(&self) -> Vec<OsString> {
        let text = |value: &dyn ToString| OsString::from(value.to_string());
        let path = |path: &PathBuf| path.clone().into_os_string();
        let options = [
            ("--model", Some(self.folder.path().into_os_string())),
            ("--provider", Some(text(&self.run.provider))),
            ("--device", Some(text(&self.run.device))),
            ("--threads", self.threads().as_ref().map(|n| text(n))),
            ("--onnxruntime", self.run.onnxruntime.as_ref().map(path)),
            ("--ep-library", self.run.ep_library.as_ref().map(path)),
            ("--precision", self.run.precision.as_ref().map(|precision| text(precision))),
            ("--cache", self.run.cache.as_ref().map(path)),
            ("--memory-limit", self.run.memory_limit.as_ref().map(|n| text(n))),
            ("--max-cache-bytes", self.run.max_cache_bytes.as_ref().map(|n| text(n))),
        ];
        let mut typed: Vec<OsString> =
            options.into_iter().filter_map(|(name, value)| Some([name.into(), value?])).flatten().collect();
        typed.extend(self.run.ep_option.iter().flat_map(|(key, value)| ["--ep-option".into(), format!("{key}={value}").into()]));
        if self.run.allow_fallback != Fallback::Nothing {
            typed.push(format!("--allow-fallback={}", self.run.allow_fallback).into());
        }
        if self.run.no_graph_capture {
            typed.push("--no-graph-capture".into());
        }
        typed
    }
}

impl ModelFolder {
    pub fn path(&self) -> PathBuf {
        self.model.clone().unwrap_or_else(default_model)
    }
}

impl Run {
    /// Threads inside an operator, if anybody named a number.
    fn threads(&self) -> Option<NonZeroUsize> {
        self.threads.or_else(|| self.settings.as_ref()?.threads)
    }
}

impl From<&Run> for RuntimeOptions {
    fn from(run: &Run) -> Self {
        Self {
            library: run.onnxruntime.clone(),
            provider: run.provider,
            device: run.device,
            threads: run.threads(),
            ep_library: run.ep_library.clone(),
            ep_options: run.ep_option.clone(),
            precision: run.precision,
            fallback: run.allow_fallback,
            no_graph_capture: run.no_graph_capture,
            cache: run.cache.clone(),
            memory_limit: run.memory_limit,
            max_cache_bytes: run.max_cache_bytes,
        }
    }
}

impl Read {
    /// Refuses what the vocabulary lacks, where that is asked for.
    pub fn accept(&self, warnings: &[Warning]) -> Result<(), PromptError> {
        if self.strict_text { Ok(Warning::refuse_unknown(warnings)?) } else { Ok(()) }
    }
}

impl Write {
    /// What was typed.
    pub fn options(&self) -> Result<GenerationOptions, Failure> {
        let search = &self.search;
        if search.stop.iter().chain(&search.bad_word).any(String::is_empty) {
            return Err(Failure::Usage("--stop and --bad-word need a text".into()));
        }
        if self.rerank.is_some() && search.num_return == NonZeroUsize::MIN {
            return Err(Failure::Usage("--rerank orders several texts; --num-return N asks for them".into()));
        }
        Ok(GenerationOptions {
            max_new_tokens: self.max_new_tokens.map(NonZeroUsize::get),
            log_probs: self.log_probs,
            ..search.into()
        })
    }
}

impl From<&SearchArgs> for GenerationOptions {
    fn from(search: &SearchArgs) -> Self {
        Self {
            max_new_tokens: None,
            min_new_tokens: search.min_new_tokens,
            beams: search.beams,
            length_penalty: search.length_penalty,
            early_stopping: search.early_stopping,
            n_return: Some(search.num_return.get()),
            sample: search.sample,
            temperature: search.temperature,
            top_k: search.top_k,
            top_p: search.top_p,
            min_p: search.min_p,
            typical_p: search.typical_p,
            seed: Some(search.seed),
            repetition_penalty: Some(search.repetition_penalty),
            no_repeat_ngram: search.no_repeat_ngram,
            bad_words: search.bad_word.clone(),
            stop: search.stop.clone(),
            suppressed: search.suppress_tokens.clone(),
            suppressed_first: search.begin_suppress_tokens.clone(),
            forced_first: search.forced_bos_token,
            forced_last: search.forced_eos_tokens.clone(),
            log_probs: None,
        }
    }
}

impl From<&Input> for Limits {
    fn from(input: &Input) -> Self {
        Self { max_bytes: input.max_bytes, max_pixels: input.max_pixels, max_side: input.max_side }
    }
}

fn key_and_value(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(key, _)| !key.is_empty());
    pair.map(|(key, value)| (key.to_owned(), value.to_owned())).ok_or_else(|| "it has the form KEY=VALUE".into())
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
