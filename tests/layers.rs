//! Dependencies point down, and each outside library has one door.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

/// Modules from the top down; each may use those that stand after it.
const ORDER: [&str; 19] = [
    "main", "cli", "verify", "server", "bench", "service", "engine", "error", "prompt", "language", "stage1", "qformer", "vision",
    "runtime", "text", "decode", "bundle", "pixels", "timing",
];

/// Outside libraries and the modules that may name them.
const DOORS: [(&str, &str); 47] = [
    ("axum", "server"),
    ("blake3", "service"),
    ("futures_util", "server"),
    ("governor", "server"),
    ("http_body_util", "server"),
    ("hyper_util", "server"),
    ("prometheus_client", "server"),
    ("subtle", "server"),
    ("tokio", "server"),
    ("toml", "server"),
    // What they make of gRPC's messages names `prost` too; it is not under src/.
    ("tonic", "server"),
    ("tonic_prost", "server"),
    ("tower", "server"),
    ("tower_http", "server"),
    ("tracing", "server"),
    ("tracing_subscriber", "server"),
    ("url", "server"),
    ("async_trait", "server"),
    ("opentelemetry", "server"),
    ("opentelemetry_http", "server"),
    ("opentelemetry_otlp", "server"),
    ("opentelemetry_sdk", "server"),
    ("utoipa", "server"),
    ("nvml_wrapper", "bench"),
    ("schemars", "bench"),
    ("rustix", "bench server"),
    ("indicatif", "cli"),
    ("ureq", "bench server"),
    ("base64", "bench server"),
    ("rand", "bench server service"),
    ("moka", "server service"),
    ("statrs", "bench"),
    ("ndarray_npy", "cli"),
    ("prost", "bundle"),
    ("ort", "runtime"),
    ("half", "runtime"),
    ("image", "pixels"),
    ("mozjpeg", "pixels"),
    ("weezl", "pixels"),
    ("flate2", "pixels"),
    ("weezl", "pixels"),
    ("fax", "pixels"),
    ("lzma_rust2", "pixels"),
    ("ruzstd", "pixels"),
    ("lcms2", "pixels"),
    ("tokenizers", "text"),
    ("clap", "cli"),
];

fn sources() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut found) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let inside = path.strip_prefix(&root).unwrap();
                let module = inside.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned();
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((module, path, text.split("#[cfg(test)]").next().unwrap().to_owned()));
            }
        }
    }
    assert!(found.len() > 25, "the sources moved");
    found
}

fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.starts_with("//"))
}

/// Whether `name::` stands in `line` as a path's first part.
fn names(line: &str, name: &str) -> bool {
    let path = format!("{name}::");
    line.match_indices(&path).any(|(at, _)| !line[..at].ends_with(|before: char| before.is_alphanumeric() || "_:".contains(before)))
}

#[test]
fn outside_libraries_have_one_door() {
    for (module, path, text) in sources() {
        for (library, door) in DOORS {
            let through = code(&text).find(|line| names(line, library));
            let may = door.split(' ').any(|door| door == module);
            assert!(may || through.is_none(), "{}: `{library}` belongs in {door}: {through:?}", path.display());
        }
    }
}

#[test]
fn dependencies_point_down() {
    let place = |module: &str| ORDER.iter().position(|known| *known == module);
    for (module, path, text) in sources().into_iter().filter(|(module, ..)| module != "lib") {
        let own = place(&module).unwrap_or_else(|| panic!("{}: give {module} a place in the order", path.display()));
        for line in code(&text) {
            for (at, _) in line.match_indices("crate::") {
                let used = line[at + 7..].split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                let used = place(used).unwrap_or_else(|| panic!("{}: which module is `{line}`?", path.display()));
                assert!(used >= own, "{}: {module} is below what it uses: {line}", path.display());
            }
        }
    }
}

#[test]
fn the_rules_would_notice() {
    assert!(names("use ort::session::Session;", "ort") && names("x: ort::Error", "ort"));
    assert!(!names("use crate::sort::by;", "ort") && !names("let short = a::ort::b;", "ort"));
}
