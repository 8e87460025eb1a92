//! `blip2 doctor`

use std::io::{Write as _, stdout};

use super::args::Doctor;
use super::plain::plain;
use super::{Failure, chain};
use crate::bundle::Bundle;
use crate::error::Error;
use crate::runtime::{Provider, ProviderChoice, Runtime, RuntimeOptions, default_threads};

pub(super) fn run(command: &Doctor) -> Result<(), Failure> {
    let mut out = stdout().lock();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    writeln!(out, "blip2        {} on {} {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH)?;
    let plural = if cores == 1 { "" } else { "s" };
    writeln!(out, "processor    {cores} core{plural}{}", instruction_sets())?;
    let (threads, said) = match command.model.threads {
        Some(threads) => (threads, "as --threads says"),
        None => (default_threads(), "one a core that this process may use"),
    };
    writeln!(out, "threads      {threads} inside an operator, {said}")?;

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

/// Those that decide how fast int8 and float32 run.
fn instruction_sets() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let known = [
            ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
            ("AVX-512", std::arch::is_x86_feature_detected!("avx512f")),
            ("AVX-512 VNNI", std::arch::is_x86_feature_detected!("avx512vnni")),
            ("AVX-512 BF16", std::arch::is_x86_feature_detected!("avx512bf16")),
        ];
        known.iter().filter(|(_, there)| *there).map(|(name, _)| format!(", {name}")).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    String::new()
}
