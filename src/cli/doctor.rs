//! `blip2 doctor`

use std::io::{Write as _, stdout};

use super::args::Doctor;
use super::plain::plain;
use super::{Failure, chain};
use crate::bundle::Bundle;
use crate::error::Error;
use crate::runtime::{Processor, Provider, ProviderChoice, Runtime, RuntimeOptions};

pub(super) fn run(command: &Doctor) -> Result<(), Failure> {
    let mut out = stdout().lock();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    writeln!(out, "blip2        {} on {} {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH)?;
    writeln!(out, "processor    {cores} cores, {}", Processor::detect())?;

    // The providers are tried one by one below, so loading must not choose among them.
    let options = RuntimeOptions { provider: ProviderChoice::Only(Provider::Cpu), ..(&command.model).into() };
    let runtime = Runtime::load(&options).map_err(Error::from)?;
    let library = runtime.library();
    writeln!(out, "ONNX Runtime {}, {} ({})", library.version, library.path.display(), library.source)?;
    let mut usable = Vec::new();
    for provider in Provider::all() {
        match runtime.probe(provider) {
            Ok(()) => {
                writeln!(out, "{:12} usable", provider.to_string())?;
                usable.push(provider);
            }
            Err(error) => writeln!(out, "{:12} not usable: {}", provider.to_string(), plain(&error.reason()))?,
        }
    }
    let auto = Provider::AUTO.into_iter().find(|provider| usable.contains(provider)).unwrap_or(Provider::Cpu);
    writeln!(out, "auto         takes {auto}")?;
    let folder = command.model.folder.path();
    match Bundle::open(&folder) {
        Ok(bundle) => writeln!(out, "bundle       {}: {} is complete", folder.display(), bundle.facts().name)?,
        Err(error) => writeln!(out, "bundle       {}", chain(&error))?,
    }
    match command.model.provider {
        _ if usable.is_empty() => Err(Failure::Nothing),
        ProviderChoice::Only(asked) if !usable.contains(&asked) => Err(Failure::Nothing),
        _ => Ok(()),
    }
}
