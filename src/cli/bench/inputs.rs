//! Pictures that a benchmark looks at, and what it wants of them.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use super::Task;
use crate::bench::drawn::{Side, drawn};
use crate::bundle::{Bundle, TaskName};
use crate::cli::Failure;
use crate::cli::plain::plain;
use crate::decode::{EarlyStopping, Processors, Strategy};
use crate::engine::Generation;
use crate::error::Error;
use crate::pixels::PixelsError;
use crate::prompt;
use crate::service::Want;

const QUESTION: &str = "what is in the picture?";
const TEXT: &str = "a photo of a dog";

#[derive(Debug, clap::Args)]
pub(super) struct Inputs {
    /// Pictures, taken in turn [default: drawn ones]
    #[arg(value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// What is wanted of every picture
    #[arg(long, value_enum, default_value = "caption")]
    pub task: Task,
    /// A question of `ask`, taken in turn, or a text of `match`; may be given several times
    #[arg(long, value_name = "TEXT")]
    text: Vec<String>,
    /// How many pictures to draw, JPEG files that all differ, where none are given
    #[arg(long, value_name = "N", default_value = "64", conflicts_with = "images")]
    drawn: NonZeroUsize,
    /// Their size
    #[arg(long, value_name = "WIDTHxHEIGHT", default_value = "640x480", conflicts_with = "images")]
    image_size: Side,
    /// Beam search with this many beams, 1 for greedy search [default: the bundle's]
    #[arg(long, value_name = "N")]
    beams: Option<NonZeroUsize>,
    /// Write exactly so many tokens, whatever the model would end with [default: as many as it likes]
    #[arg(long, value_name = "N")]
    tokens: Option<NonZeroUsize>,
}

/// One picture and what is wanted of it.
struct Input {
    name: String,
    picture: Arc<[u8]>,
    want: Want,
}

/// All of them, in the order of their turns.
pub(super) struct Read(Vec<Input>);

impl Inputs {
    /// Reads or draws the pictures. Whether each can be decoded shows when it is.
    pub fn read(&self, bundle: &Bundle, seed: u64) -> Result<Read, Failure> {
        let wants = self.wants(bundle)?;
        let pictures = if self.images.is_empty() { self.draw(seed) } else { self.open()? };
        let n = if wants.len() > 1 { pictures.len() * wants.len() } else { pictures.len() };
        let input = |i: usize| {
            let ((name, picture), (about, want)) = (&pictures[i % pictures.len()], &wants[i % wants.len()]);
            Input { name: format!("{name}{about}"), picture: picture.clone(), want: want.clone() }
        };
        Ok(Read((0..n).map(input).collect()))
    }

    /// How texts are searched, in words; nothing where none are written.
    pub fn search(&self) -> Option<String> {
        let beams = self.beams.map_or_else(|| "the bundle's beams".into(), |beams| format!("{beams} beams"));
        let tokens = self.tokens.map_or_else(String::new, |n| format!(", {n} tokens"));
        matches!(self.task, Task::Caption | Task::Ask).then(|| beams + &tokens)
    }

    /// What is wanted, with what to call it behind a picture's name.
    fn wants(&self, bundle: &Bundle) -> Result<Vec<(String, Want)>, Failure> {
        let or = |default: &str| if self.text.is_empty() { vec![default.to_owned()] } else { self.text.clone() };
        let refuse = |option: &str| Err(Failure::Usage(format!("--{option} is not for --task {}", self.task.name())));
        match self.task {
            Task::Caption | Task::Embed if !self.text.is_empty() => refuse("text"),
            Task::Match | Task::Embed if self.beams.is_some() => refuse("beams"),
            Task::Match | Task::Embed if self.tokens.is_some() => refuse("tokens"),
            Task::Caption => Ok(vec![(String::new(), self.write(bundle, prompt::Task::Caption)?)]),
            Task::Ask => {
                let ask = |question: String| {
                    let about = format!(": {question}");
                    Ok((about, self.write(bundle, prompt::Task::Ask(question))?))
                };
                or(QUESTION).into_iter().map(ask).collect()
            }
            Task::Match => {
                bundle.require(TaskName::Match).map_err(Error::from)?;
                Ok(vec![(String::new(), Want::Match(or(TEXT)))])
            }
            Task::Embed => {
                bundle.require(TaskName::Embed).map_err(Error::from)?;
                Ok(vec![(String::new(), Want::Embed)])
            }
        }
    }

    fn write(&self, bundle: &Bundle, task: prompt::Task) -> Result<Want, Failure> {
        bundle.require(task.name()).map_err(Error::from)?;
        let defaults = &bundle.facts().generation[&task.name()];
        let strategy = match self.beams.map_or(defaults.beams, NonZeroUsize::get) {
            1 => Strategy::Greedy,
            beams => Strategy::Beam {
                beams,
                length_penalty: defaults.length_penalty,
                early_stopping: EarlyStopping::default(),
                n_return: 1,
                sample: None,
            },
        };
        let tokens = self.tokens.map(NonZeroUsize::get);
        let processors = Processors { min_new_tokens: tokens.unwrap_or(defaults.min_new_tokens), ..Processors::default() };
        let generation = Generation { max_new_tokens: tokens, processors, strategy, ..Generation::default() };
        generation.check(bundle.language()).map_err(Error::from)?;
        Ok(Want::Write(task, Box::new(generation)))
    }

    fn draw(&self, seed: u64) -> Vec<(String, Arc<[u8]>)> {
        (0..self.drawn.get() as u64).map(|i| (format!("drawn {i}"), drawn(self.image_size, seed ^ (i << 32)).into())).collect()
    }

    fn open(&self) -> Result<Vec<(String, Arc<[u8]>)>, Failure> {
        let open = |path: &PathBuf| match std::fs::read(path) {
            Ok(bytes) => Ok((plain(&path.to_string_lossy()).into_owned(), bytes.into())),
            Err(error) => Err(Failure::Picture { path: path.clone(), source: PixelsError::Io(error) }),
        };
        self.images.iter().map(open).collect()
    }
}

impl Read {
    pub fn names(&self) -> Vec<String> {
        self.0.iter().map(|input| input.name.clone()).collect()
    }

    pub fn wanted(self) -> Vec<(Arc<[u8]>, Want)> {
        self.0.into_iter().map(|input| (input.picture, input.want)).collect()
    }
}
