//! Pictures that a benchmark looks at, and what it wants of them.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Task, few};
use crate::bench::BenchError;
use crate::bench::drawn::{Size, drawn};
use crate::bench::http::{Asked, Wanted};
use crate::bench::truths::Truths;
use crate::bundle::{Bundle, TaskName};
use crate::cli::Failure;
use crate::cli::args::Model;
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
    /// What is true of the pictures: a JSON object from their file names, or `0.png: QUESTION`, to lists of answers
    /// [default: truths.json beside the first picture, if there is one]
    #[arg(long, value_name = "FILE", requires = "images")]
    truths: Option<PathBuf>,
    /// How many pictures to draw, JPEG files that all differ, where none are given
    #[arg(long, value_name = "N", default_value = "64", value_parser = few, conflicts_with = "images")]
    drawn: NonZeroUsize,
    /// Their size
    #[arg(long, value_name = "WIDTHxHEIGHT", default_value = "640x480", conflicts_with = "images")]
    image_size: Size,
    /// Beam search with this many beams, 1 for greedy search [default: the bundle's]
    #[arg(long, value_name = "N")]
    beams: Option<NonZeroUsize>,
    /// Write exactly so many tokens, whatever the model would end with [default: as many as it likes]
    #[arg(long, value_name = "N")]
    tokens: Option<NonZeroUsize>,
}

/// Pictures in files, with their names.
pub(super) struct Files {
    pub names: Vec<String>,
    pub paths: Vec<PathBuf>,
    /// Where drawn ones were written.
    pub folder: Option<Folder>,
}

/// A folder of this process, which goes with this.
pub(super) struct Folder(PathBuf);

impl Folder {
    /// For a purpose, among the system's temporary ones.
    pub fn new(purpose: &str) -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("blip2-bench-{}-{purpose}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|source| Failure::Report { path: path.clone(), source })?;
        Ok(Self(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left of it does no harm.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A picture as its file has it.
pub(super) struct Encoded {
    pub name: String,
    pub bytes: Arc<[u8]>,
}

/// One picture and what is wanted of it.
pub(super) struct Input {
    pub name: String,
    pub picture: Arc<[u8]>,
    pub want: Want,
}

impl Inputs {
    /// Reads or draws the pictures, for an engine. Whether each can be decoded shows when it is.
    pub fn read(&self, bundle: &Bundle, seed: u64) -> Result<Vec<Input>, Failure> {
        let wants = self.wants(bundle)?;
        let pairs = self.pairs(&wants, seed)?.into_iter();
        Ok(pairs.map(|(Encoded { name, bytes }, want)| Input { name, picture: bytes, want: want.clone() }).collect())
    }

    /// The same for a server, with their names.
    pub fn asked(&self, seed: u64) -> Result<Vec<(String, Asked)>, Failure> {
        self.check()?;
        let (tokens, beams) = (self.tokens.map(NonZeroUsize::get), self.beams.map(NonZeroUsize::get));
        let write = |text: &str| Wanted::Text { text: text.to_owned(), tokens, beams };
        let wants = match self.task {
            Task::Caption if self.text.is_empty() => vec![(String::new(), write(""))],
            Task::Ask if self.text.is_empty() => vec![(String::new(), write(QUESTION))],
            Task::Caption | Task::Ask => self.text.iter().map(|text| (format!(": {text}"), write(text))).collect(),
            Task::Match => vec![(String::new(), Wanted::Scores(self.texts(TEXT)))],
            Task::Embed => vec![(String::new(), Wanted::Vector)],
        };
        let pairs = self.pairs(&wants, seed)?.into_iter();
        Ok(pairs.map(|(Encoded { name, bytes }, wanted)| (name, Asked { picture: bytes, wanted: wanted.clone() })).collect())
    }

    /// The same as files, for programs.
    pub fn files(&self, bundle: &Bundle, seed: u64) -> Result<Files, Failure> {
        self.wants(bundle)?; // refused here, not by every start
        if !self.images.is_empty() {
            self.open()?;
            let names = self.images.iter().map(|path| plain(&path.to_string_lossy()).into_owned()).collect();
            return Ok(Files { names, paths: self.images.clone(), folder: None });
        }
        let unwritable = |path: &Path, source| Failure::Report { path: path.to_path_buf(), source };
        let folder = Folder::new("drawn")?;
        let write = |(i, Encoded { name, bytes }): (usize, Encoded)| {
            let path = folder.0.join(format!("{i}.jpg"));
            std::fs::write(&path, bytes).map_err(|source| unwritable(&path, source))?;
            Ok::<_, Failure>((name, path))
        };
        let (names, paths) = self.draw(seed).into_iter().enumerate().map(write).collect::<Result<_, _>>()?;
        Ok(Files { names, paths, folder: Some(folder) })
    }

    /// What is typed before and behind a picture for the same to be done.
    pub fn typed(&self, model: &Model) -> Result<[Vec<OsString>; 2], Failure> {
        let mut before: Vec<OsString> = vec![self.task.name().into(), "--json".into()];
        before.extend(model.typed());
        let options = [("--beams", self.beams), ("--max-new-tokens", self.tokens), ("--min-new-tokens", self.tokens)];
        before.extend(options.into_iter().filter_map(|(name, n)| Some([name.into(), n?.to_string().into()])).flatten());
        let behind = match self.task {
            Task::Caption => Vec::new(),
            Task::Ask => vec![self.text.first().map_or(QUESTION, String::as_str).into()],
            Task::Match | Task::Embed => {
                return Err(Failure::Usage(format!(
                    "startup is measured for captions and answers, not for --task {}",
                    self.task.name()
                )));
            }
        };
        Ok([before, behind])
    }

    /// What is true of inputs of these names, if anybody says.
    pub fn truths(&self, names: &[String]) -> Result<Option<Truths>, Failure> {
        let writes = matches!(self.task, Task::Caption | Task::Ask);
        let beside = || self.images.first().filter(|_| writes).and_then(|picture| Truths::beside(picture));
        if self.truths.is_some() && !writes {
            return Err(Failure::Usage(format!("--truths are not for --task {}", self.task.name())));
        }
        let Some(path) = self.truths.clone().or_else(beside) else { return Ok(None) };
        let names: Vec<String> = names.iter().map(|name| self.without_folder(name)).collect();
        match Truths::read(&path, &names) {
            Err(BenchError::NoTruths { .. }) if self.truths.is_none() => Ok(None),
            read => read.map(Some).map_err(|error| Failure::Usage(crate::cli::chain(&error))),
        }
    }

    /// An input's name with that of the picture's file alone.
    fn without_folder(&self, name: &str) -> String {
        let rest = |path: &PathBuf| {
            let (file, rest) = (path.file_name()?, name.strip_prefix(&*plain(&path.to_string_lossy()))?);
            (rest.is_empty() || rest.starts_with(": ")).then(|| format!("{}{rest}", plain(&file.to_string_lossy())))
        };
        self.images.iter().find_map(rest).unwrap_or_else(|| name.to_owned())
    }

    /// Every picture with the next of what is wanted; of several, every picture meets each.
    fn pairs<'w, W>(&self, wants: &'w [(String, W)], seed: u64) -> Result<Vec<(Encoded, &'w W)>, Failure> {
        let pictures = self.pictures(seed)?;
        let pair = |i: usize| {
            let (turn, i) = (i / pictures.len(), i % pictures.len());
            let (Encoded { name, bytes }, (about, want)) = (&pictures[i], &wants[(i + turn) % wants.len()]);
            (Encoded { name: format!("{name}{about}"), bytes: bytes.clone() }, want)
        };
        Ok((0..pictures.len() * wants.len()).map(pair).collect())
    }

    /// What the parts of an engine write, and what pictures are compared with; an error if the bundle cannot do the task.
    pub fn asked_of_stages(&self, bundle: &Bundle) -> Result<(prompt::Task, String), Failure> {
        if self.tokens.is_some() {
            return Err(Failure::Usage("--tokens is not for stages".into()));
        }
        if bundle.facts().language.is_some() || self.task != Task::Caption {
            self.wants(bundle)?;
        }
        let text = |default: &str| self.text.first().map_or(default, String::as_str).to_owned();
        Ok(match self.task {
            Task::Ask => (prompt::Task::Ask(text(QUESTION)), TEXT.to_owned()),
            _ => (prompt::Task::Caption, text(TEXT)),
        })
    }

    /// Beams that were asked for.
    pub fn beams(&self) -> Option<usize> {
        self.beams.map(NonZeroUsize::get)
    }

    /// The pictures alone.
    pub fn pictures(&self, seed: u64) -> Result<Vec<Encoded>, Failure> {
        if self.images.is_empty() { Ok(self.draw(seed)) } else { self.open() }
    }

    /// How texts are searched, in words; nothing where none are written.
    pub fn search(&self) -> Option<String> {
        let beams = self.beams.map_or_else(|| "the bundle's beams".into(), |beams| format!("{beams} beams"));
        let tokens = self.tokens.map_or_else(String::new, |n| format!(", {n} tokens"));
        matches!(self.task, Task::Caption | Task::Ask).then(|| beams + &tokens)
    }

    /// Refuses options that the task has no use for.
    fn check(&self) -> Result<(), Failure> {
        match self.task {
            Task::Embed if !self.text.is_empty() => Err(self.refused("text")),
            Task::Match | Task::Embed if self.beams.is_some() => Err(self.refused("beams")),
            Task::Match | Task::Embed if self.tokens.is_some() => Err(self.refused("tokens")),
            _ => Ok(()),
        }
    }

    fn refused(&self, option: &str) -> Failure {
        Failure::Usage(format!("--{option} is not for --task {}", self.task.name()))
    }

    fn texts(&self, default: &str) -> Vec<String> {
        if self.text.is_empty() { vec![default.to_owned()] } else { self.text.clone() }
    }

    /// What is wanted, with what to call it behind a picture's name.
    fn wants(&self, bundle: &Bundle) -> Result<Vec<(String, Want)>, Failure> {
        if self.task == Task::Caption && !self.text.is_empty() {
            return Err(self.refused("text"));
        }
        self.check()?;
        match self.task {
            Task::Caption => Ok(vec![(String::new(), self.write(bundle, prompt::Task::Caption)?)]),
            Task::Ask => {
                let ask = |question: String| {
                    let about = format!(": {question}");
                    Ok((about, self.write(bundle, prompt::Task::Ask(question))?))
                };
                self.texts(QUESTION).into_iter().map(ask).collect()
            }
            Task::Match => {
                bundle.require(TaskName::Match).map_err(Error::from)?;
                Ok(vec![(String::new(), Want::Match(self.texts(TEXT)))])
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

    fn draw(&self, seed: u64) -> Vec<Encoded> {
        let draw = |i: u64| Encoded { name: format!("drawn {i}"), bytes: drawn(self.image_size, seed ^ (i << 32)).into() };
        (0..self.drawn.get() as u64).map(draw).collect()
    }

    fn open(&self) -> Result<Vec<Encoded>, Failure> {
        let open = |path: &PathBuf| match std::fs::read(path) {
            Ok(bytes) => Ok(Encoded { name: plain(&path.to_string_lossy()).into_owned(), bytes: bytes.into() }),
            Err(error) => Err(Failure::Picture { path: path.clone(), source: PixelsError::Io(error) }),
        };
        self.images.iter().map(open).collect()
    }
}
