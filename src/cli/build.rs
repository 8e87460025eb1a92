//! `blip2 build`

use std::io::{Write as _, stdout};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::Failure;
use super::args::Build;
use crate::bundle::{Bundle, BundleError};
use crate::error::Error;
use crate::runtime::{Graph, Provider, ProviderChoice, Purpose, Runtime, RuntimeOptions};

/// How often a build that goes on says so.
const BEAT: Duration = Duration::from_secs(15);

pub(super) fn run(command: &Build) -> Result<(), Failure> {
    let bundle = command.model.bundle()?;
    if !bundle.has_engines() {
        let said = "nothing is built of its graphs; `convert --target tensorrt` makes some that TensorRT builds engines of";
        return Err(Failure::Usage(format!("{}: {said}", bundle.folder().display())));
    }
    let (named, tensorrt) = (command.model.run.provider, ProviderChoice::Only(Provider::TensorRt));
    if named != ProviderChoice::Auto && named != tensorrt {
        return Err(Failure::Usage(format!("engines are TensorRT's; nothing is built for {named}")));
    }
    let options = RuntimeOptions { provider: tensorrt, ..(&command.model.run).into() };
    let runtime = Runtime::load(&options).map_err(Error::from)?;
    let Some(root) = runtime.engines() else {
        return Err(Failure::Usage("no cache folder is known here; --cache names one".into()));
    };
    let purpose = runtime.purpose(&bundle);
    let mut out = stdout().lock();
    match purpose.find(&root) {
        Ok(folder) if !command.force => return Ok(writeln!(out, "built before: {}", folder.display())?),
        Ok(_) => {}
        Err(reason) => eprintln!("blip2: {reason}"),
    }
    let folder = build(&runtime, &bundle, &purpose, &root)?;
    Ok(writeln!(out, "built: {}", folder.display())?)
}

/// Everything is built aside, so that half of it is never found.
fn build(runtime: &Runtime, bundle: &Bundle, purpose: &Purpose, root: &Path) -> Result<PathBuf, Failure> {
    let aside = purpose.folder(root).with_extension(format!("{}.part", std::process::id()));
    let unwritable = |source| Failure::Cache { path: root.to_path_buf(), source };
    std::fs::create_dir_all(&aside).map_err(unwritable)?;
    let built = build_in(&aside, runtime, bundle);
    let kept = built.and_then(|()| purpose.keep(&aside, root).map_err(unwritable));
    if kept.is_err() {
        // What failed is worth more than what could not be cleared away.
        let _ = std::fs::remove_dir_all(&aside);
    }
    kept
}

fn build_in(aside: &Path, runtime: &Runtime, bundle: &Bundle) -> Result<(), Failure> {
    let graphs = GRAPHS.into_iter().filter(|name| bundle.facts().graphs.get(*name).is_some_and(|graph| !graph.profile.is_empty()));
    let graphs: Vec<&'static str> = graphs.collect();
    for (done, name) in graphs.iter().enumerate() {
        eprintln!("blip2: building {name} ({} of {}); this takes minutes", done + 1, graphs.len());
        let start = Instant::now();
        beating(name, || Graph::build(runtime, bundle, name, aside)).map_err(Error::from)?;
        eprintln!("blip2: {name} took {:.0} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}

/// Graphs that TensorRT may build engines of.
const GRAPHS: [&str; 4] = ["vision", "qformer", "qformer_text", "qformer_itm"];

/// Says now and then that `work` goes on.
fn beating(name: &str, work: impl FnOnce() -> Result<(), BundleError>) -> Result<(), BundleError> {
    let (done, waiting) = channel::<()>();
    std::thread::scope(|threads| {
        threads.spawn(move || {
            let start = Instant::now();
            while waiting.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                eprintln!("blip2: still building {name}, {:.0} s", start.elapsed().as_secs_f64());
            }
        });
        let found = work();
        drop(done);
        found
    })
}
