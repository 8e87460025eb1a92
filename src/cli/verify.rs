//! `blip2 verify [BUNDLE]`

use std::io::{Write as _, stdout};

use super::Failure;
use super::args::Verify;
use crate::bundle::Bundle;
use crate::error::Error;
use crate::runtime::Copies;
use crate::verify;

pub(super) fn run(command: &Verify) -> Result<(), Failure> {
    let folder = command.bundle.clone().unwrap_or_else(|| command.model.folder.path());
    let mut out = stdout().lock();
    let bundle = Bundle::open(&folder).map_err(Error::from)?;
    command.model.doubt_settings(&bundle);
    let (mut n_files, mut n_bytes) = (0, 0);
    let hashes = bundle.check_hashes(|_, bytes| {
        n_files += 1;
        n_bytes += bytes;
    });
    hashes.map_err(Error::from)?;
    writeln!(out, "ok    {n_files} files, {:.1} MB: sizes and hashes", n_bytes as f64 / 1e6)?;
    for file in bundle.unlisted() {
        eprintln!("blip2: {}: {file:?} is not listed in bundle.json; nothing reads it", folder.display());
    }

    let mut engine = command.model.load(bundle)?;
    writeln!(out, "ok    graphs load on {} and are what bundle.json says", engine.runtime().provider())?;
    if !verify::has_golden(&engine) {
        writeln!(out, "      outputs are not compared: the bundle lists no golden/golden.json (converted with --no-golden)")?;
        return Ok(());
    }
    let (mut failed, mut printed) = (0, Ok(()));
    let reference = verify::run(&mut engine, |check| {
        failed += usize::from(!check.holds);
        let mark = if check.holds { "ok" } else { "WRONG" };
        if printed.is_ok() {
            printed = writeln!(out, "{mark:5} {}: {}", check.what, check.found);
        }
    })?;
    printed?;
    let Copies { n_up, bytes_up, n_down, bytes_down } = engine.runtime().copies();
    if n_up + n_down > 0 {
        writeln!(out, "      copies: {n_up} to the device ({bytes_up} bytes), {n_down} to the host ({bytes_down} bytes)")?;
    }
    if failed > 0 {
        return Err(Failure::Mismatch(failed));
    }
    Ok(writeln!(out, "{} gives what its reference gave ({reference})", folder.display())?)
}
