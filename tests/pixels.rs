//! Decoding and resizing against Pillow, on the pictures that `tests/pictures/make.py` draws.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use blip2::pixels::{Alpha, Limits, Picture, Pixels, PixelsError, Preprocess, Resample, resize};
use serde_json::{Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures")
}

fn open(path: &Path) -> Picture {
    Picture::open(path, &Limits::default()).unwrap_or_else(|error| panic!("{}: {error:?}", path.display()))
}

/// Pictures that are not themselves an expectation.
fn inputs() -> Vec<PathBuf> {
    let is_input = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        !matches!(path.extension().unwrap().to_str(), Some("py" | "json")) && name.matches('.').count() == 1
    };
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).filter(is_input).collect();
    found.sort();
    found
}

/// The largest difference, and the share of equal values.
fn compare(found: &Picture, wanted: &Picture) -> (u8, f64) {
    assert_eq!((found.width, found.height), (wanted.width, wanted.height));
    let differences = found.rgb.iter().zip(&wanted.rgb).map(|(a, b)| a.abs_diff(*b));
    let equal = differences.clone().filter(|d| *d == 0).count();
    (differences.max().unwrap(), equal as f64 / wanted.rgb.len() as f64)
}

#[test]
fn every_format_decodes_to_what_pillow_gives_in_every_byte() {
    let inputs = inputs();
    assert!(inputs.len() > 50, "run tests/pictures/make.py");
    let mut wrong = Vec::new();
    for path in inputs {
        let (largest, equal) = compare(&open(&path), &open(&path.with_extension("rgb.png")));
        if largest > 0 {
            wrong.push(format!("{}: largest difference {largest}, {:.2} % equal", path.display(), equal * 100.0));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_transparent_lies_over_white_as_in_transformers_in_every_byte() {
    let (mut n_transparent, mut wrong) = (0, Vec::new());
    for path in inputs() {
        let white = path.with_extension("white.png");
        n_transparent += usize::from(white.exists());
        let wanted = if white.exists() { white } else { path.with_extension("rgb.png") };
        let (largest, equal) = compare(&open(&path).without_alpha(Alpha::White), &open(&wanted));
        if largest > 0 {
            wrong.push(format!("{}: largest difference {largest}, {:.2} % equal", path.display(), equal * 100.0));
        }
    }
    assert!(n_transparent > 25, "{n_transparent}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The facts of a bundle for one way of making squares.
fn preprocess(how: &Value) -> Preprocess {
    let mut facts = json!({"alpha": "white", "mean": [0, 0, 0], "std": [1, 1, 1], "rescale": 1, "resample": "bicubic"});
    facts.as_object_mut().unwrap().extend(how.as_object().unwrap().clone());
    serde_json::from_value(facts).unwrap()
}

#[test]
fn squares_equal_those_of_the_image_processors_in_every_byte() {
    let hows: Value = serde_json::from_slice(&std::fs::read(folder().join("square.json")).unwrap()).unwrap();
    let (mut n_compared, mut wrong) = (0, Vec::new());
    for path in inputs() {
        for (key, how) in hows.as_object().unwrap() {
            let expectation = path.with_extension(format!("square.{key}.png"));
            if !expectation.exists() {
                continue;
            }
            n_compared += 1;
            let found = compare(&preprocess(how).square(&open(&path)).unwrap(), &open(&expectation));
            if found != (0, 1.0) {
                wrong.push(format!("{}: {found:?}", expectation.display()));
            }
        }
    }
    assert!(n_compared >= 40, "{n_compared}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_the_part_that_is_wanted_of_a_long_picture_is_resized() {
    let how = preprocess(&json!({"size": 224, "resize": {"shortest_edge": 224}, "center_crop": true}));
    let line = Picture::from_rgb(60_000, 1, (0..60_000 * 3).map(|k| (k / 7) as u8).collect());
    assert_eq!(how.square(&line).unwrap().rgb.len(), 224 * 224 * 3);
}

#[test]
fn a_picture_that_is_no_square_in_the_end_is_refused_by_its_place_and_size() {
    let how = preprocess(&json!({"size": 8, "resize": {"shortest_edge": 8}}));
    let (square, wide) = (Picture::from_rgb(3, 3, vec![9; 27]), Picture::from_rgb(6, 3, vec![9; 54]));
    assert_eq!(Pixels::from_pictures(&[&square], &how).unwrap().0.shape(), [1, 3, 8, 8]);
    let error = Pixels::from_pictures(&[&square, &wide], &how).unwrap_err();
    assert!(matches!(error, PixelsError::Unfit { picture: 1, width: 16, height: 8, .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        "is 16×8 in the end (shorter side resized to 8), the model takes 8×8; cut the picture to a square"
    );
}

#[test]
fn resizing_equals_pillow_in_every_byte() {
    let mut n_compared = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let Some(side) = name.split('.').nth(1).and_then(|part| part.parse().ok()) else { continue };
        let source = open(&folder().join(format!("{}.rgb.png", name.split('.').next().unwrap())));
        assert_eq!(compare(&resize(&source, side, side, Resample::Bicubic), &open(&path)), (0, 1.0), "{name}");
        n_compared += 1;
    }
    assert!(n_compared >= 4);
}

/// A generator that needs no crate: the constants are Knuth's MMIX.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

#[test]
fn damaged_files_are_refused_or_decoded_but_never_panic() {
    let limits = Limits { max_pixels: 1 << 20, ..Limits::default() };
    let (mut random, mut n_refused, mut n_decoded) = (Lcg(1), 0, 0);
    for path in inputs() {
        let whole = std::fs::read(&path).unwrap();
        for round in 0..40 {
            let mut bytes = whole.clone();
            if round % 2 == 0 {
                bytes.truncate(random.below(whole.len()));
            } else {
                for _ in 0..=random.below(4) {
                    // Headers are where lengths and sizes stand.
                    let reach = if round % 4 == 1 { whole.len().min(200) } else { whole.len() };
                    let at = random.below(reach);
                    bytes[at] = random.below(256) as u8;
                }
            }
            match Picture::decode(&bytes, &limits) {
                Ok(picture) => {
                    assert_eq!(picture.rgb.len(), picture.width as usize * picture.height as usize * 3);
                    n_decoded += 1;
                }
                Err(_) => n_refused += 1,
            }
        }
    }
    assert!(n_refused > 500 && n_decoded > 100, "{n_refused} refused, {n_decoded} decoded");
}

#[test]
fn pictures_that_are_cut_off_are_refused() {
    // Half of an animation still holds its first frame.
    for path in inputs().into_iter().filter(|path| !path.to_str().unwrap().contains("animated")) {
        let whole = std::fs::read(&path).unwrap();
        let half = Picture::decode(&whole[..whole.len() / 2], &Limits::default());
        assert!(half.is_err(), "{}", path.display());
    }
}
