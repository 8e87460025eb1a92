//! `blip2 doctor`

use std::io::{StdoutLock, Write as _, stdout};
use std::path::Path;

use super::args::Doctor;
use super::plain::plain;
use super::{Failure, chain};
use crate::bundle::Bundle;
use crate::error::Error;
use crate::runtime::{
    ComputeType, Extension, Plugin, Processor, Provider, ProviderChoice, Runtime, RuntimeOptions, UnavailableError, default_threads,
};

pub(super) fn run(command: &Doctor) -> Result<(), Failure> {
    let asked: RuntimeOptions = (&command.model.run).into();
    asked.check().map_err(|error| Error::from(UnavailableError::from(error)))?;
    let mut out = stdout().lock();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    writeln!(out, "blip2        {} on {} {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH)?;
    describe_processor(&mut out, cores)?;
    let (threads, said) = match command.model.threads() {
        Some(threads) if command.model.run.threads.is_some() => (threads, "as --threads says"),
        Some(threads) => (threads, "as --settings say"),
        None => (default_threads(), "one a core that this process may use"),
    };
    writeln!(out, "threads      {threads} inside an operator, {said}")?;

    // The providers are tried one by one below, so loading must not choose among them.
    let runtime = Runtime::load(&alone(Provider::Cpu, &asked)).map_err(Error::from)?;
    let library = runtime.library();
    writeln!(out, "ONNX Runtime {}, {} ({})", library.version, library.path.display(), library.source)?;
    let usable = try_all(&mut out, &runtime, &asked)?;
    let auto = Provider::AUTO.into_iter().find(|provider| usable.contains(provider)).unwrap_or(Provider::Cpu);
    writeln!(out, "auto         takes {auto}")?;
    let folder = command.model.folder.path();
    match Bundle::open(&folder) {
        Ok(bundle) => {
            command.model.doubt_settings(&bundle);
            writeln!(out, "bundle       {}: {} is complete", folder.display(), bundle.facts().name)?;
        }
        Err(error) => writeln!(out, "bundle       {}", chain(&error))?,
    }
    match asked.provider {
        _ if usable.is_empty() => Err(Failure::Nothing),
        ProviderChoice::Only(asked) if !usable.contains(&asked) => Err(Failure::Nothing),
        _ => Ok(()),
    }
}

/// Says of every provider whether it is usable, and of a plugin what it brings.
fn try_all(out: &mut StdoutLock<'_>, runtime: &Runtime, asked: &RuntimeOptions) -> Result<Vec<Provider>, Failure> {
    let mut usable = Vec::new();
    let unknown = asked.provider.plugin().filter(|plugin| plugin.known.is_none());
    for provider in Provider::all().chain(unknown.map(Provider::Plugin)) {
        let name = provider.to_string();
        match runtime.probe(provider, &alone(provider, asked)) {
            Ok(()) => {
                writeln!(out, "{name:12} usable")?;
                usable.push(provider);
            }
            Err(error) => writeln!(out, "{name:12} not usable: {}", plain(&error.reason()))?,
        }
        if let Provider::Plugin(plugin) = provider {
            describe(out, runtime, plugin)?;
        }
    }
    Ok(usable)
}

/// What a library brings that was found.
fn describe(out: &mut StdoutLock<'_>, runtime: &Runtime, plugin: Plugin) -> Result<(), Failure> {
    let Some(offer) = runtime.offer(plugin) else { return Ok(()) };
    let package = plugin.known.zip(offer.version).map(|(known, version)| format!("{} {version}, ", known.package));
    writeln!(out, "             {}{}", package.unwrap_or_default(), offer.path.display())?;
    for (index, device) in offer.devices.iter().enumerate() {
        writeln!(out, "             --device {index}: {}", plain(device))?;
    }
    let Some(known) = plugin.known else { return Ok(()) };
    if known.has_precisions {
        let precisions = ComputeType::ALL.map(|precision| precision.to_string()).join(", ");
        writeln!(out, "             --precision {precisions}, where the device has it")?;
    }
    let memory = if known.has_memory { "the device's own memory" } else { "the processor's memory" };
    writeln!(out, "             tensors lie in {memory}; --ep-option {}", known.options.join(", "))?;
    Ok(())
}

/// Options for one provider: those that were typed, if they were typed for it.
fn alone(provider: Provider, asked: &RuntimeOptions) -> RuntimeOptions {
    let only = ProviderChoice::Only(provider);
    if asked.provider == only {
        return asked.clone();
    }
    let is_its = |path: &&Path| matches!(provider, Provider::Plugin(plugin) if plugin.is_at(path));
    RuntimeOptions {
        provider: only,
        library: asked.library.clone(),
        threads: asked.threads,
        device: if asked.provider == ProviderChoice::Auto { asked.device } else { 0 },
        ep_library: asked.ep_library.as_deref().filter(is_its).map(Path::to_path_buf),
        ..RuntimeOptions::default()
    }
}

/// What it has, and what each precision gains with that.
fn describe_processor(out: &mut StdoutLock<'_>, cores: usize) -> std::io::Result<()> {
    let processor = Processor::detect();
    writeln!(out, "processor    {cores} cores, {processor}")?;
    for gain in processor.gains() {
        writeln!(out, "             {gain}")?;
    }
    if processor.gains().is_empty() {
        writeln!(out, "             no precision was measured on such a processor; `python -m blip2_export floor` does it")?;
    }
    if processor.has(Extension::AmxBf16) {
        writeln!(out, "             bfloat16 by the plugin openvino: 3.3 times float32's speed for ViT")?;
    }
    Ok(())
}
