//! Decoding and resizing against Pillow, on the pictures that `tests/pictures/make.py` draws.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use blip2::pixels::{Alpha, Header, Limits, Picture, Pixels, PixelsError, Preprocess, Resample, resize};
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
        path.extension().is_some_and(|extension| extension != "py" && extension != "json") && name.matches('.').count() == 1
    };
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).filter(is_input).collect();
    found.sort();
    found
}

/// The largest difference, and the share of equal values.
fn compare(found: &Picture, wanted: &Picture) -> (u8, f64) {
    if (found.width, found.height) != (wanted.width, wanted.height) {
        return (u8::MAX, 0.0);
    }
    let differences = found.rgb.iter().zip(&wanted.rgb).map(|(a, b)| a.abs_diff(*b));
    let equal = differences.clone().filter(|d| *d == 0).count();
    (differences.max().unwrap(), equal as f64 / wanted.rgb.len() as f64)
}

#[test]
fn every_format_decodes_to_what_pillow_gives_in_every_byte() {
    let inputs = inputs();
    assert!(inputs.len() > 180, "run tests/pictures/make.py");
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
fn headers_say_how_large_pictures_are() {
    let (mut n_read, mut n_grown, mut forms) = (0, 0, std::collections::BTreeSet::new());
    for path in inputs() {
        let extension = path.extension().unwrap().to_str().unwrap().replace("jpg", "jpeg");
        let found = Header::read(&std::fs::read(&path).unwrap());
        let Some(Header { format, width, height, bit_depth }) = found else {
            assert!(!["jpeg", "png", "gif", "webp"].contains(&&*extension), "{}", path.display());
            continue;
        };
        let picture = open(&path);
        let grows = format == "gif" && width <= picture.width && height <= picture.height;
        n_grown += usize::from(grows && (width, height) != (picture.width, picture.height));
        let sizes = [(width, height), (height, width)];
        assert!(grows || sizes.contains(&(picture.width, picture.height)), "{}: {width} by {height}", path.display());
        assert!(format == extension && [1, 2, 4, 8, 16, 24, 32, 48, 64].contains(&bit_depth), "{}: {found:?}", path.display());
        n_read += 1;
        forms.insert((format, bit_depth));
    }
    assert!(n_read > 90 && n_grown < 6 && forms.len() > 12, "{n_read} {n_grown} {forms:?}");
    let cut = |bytes: &[u8]| (0..bytes.len()).filter(|n| Header::read(&bytes[..*n]).is_some()).count();
    assert_eq!(cut(b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x11\x08\x00\x02\x00"), 0);
    assert_eq!((cut(b"\x89PNG\r\n\x1a\n"), cut(b"GIF89a\x01\x00"), cut(b"RIFF\0\0\0\0WEBPVP8 ")), (0, 0, 0));
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
    assert!(n_transparent > 40, "{n_transparent}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn damaged_files_that_pillow_opens_come_with_a_warning_and_no_others_do() {
    let inputs = inputs();
    let is_damaged = |path: &Path| path.file_name().unwrap().to_str().unwrap().starts_with("damaged_");
    assert!(inputs.iter().filter(|path| is_damaged(path)).count() >= 8);
    for path in inputs {
        let picture = open(&path);
        assert_eq!(picture.warnings().is_empty(), !is_damaged(&path), "{}: {:?}", path.display(), picture.warnings());
    }
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

#[test]
fn pictures_that_are_cut_off_are_refused() {
    // Half of an animation still holds its first frame, half of a TIFF file its first page, and half of a file with more behind it the file.
    let is_alone = |path: &PathBuf| !["animated", "pages", "followed"].iter().any(|more| path.to_str().unwrap().contains(more));
    for path in inputs().into_iter().filter(is_alone) {
        let whole = std::fs::read(&path).unwrap();
        let half = Picture::decode(&whole[..whole.len() / 2], &Limits::default());
        assert!(half.is_err(), "{}", path.display());
    }
}

#[test]
fn a_picture_that_says_more_than_it_holds_ends_itself_only() {
    let mut short = Picture::from_rgb(1, 1, vec![0; 3]);
    (short.width, short.height) = (9, 9);
    let how = preprocess(&json!({"size": 8}));
    assert!(matches!(Pixels::from_pictures(&[&short], &how), Err(PixelsError::Damaged(_))));
}

fn refusal(bytes: &[u8]) -> String {
    Picture::decode(bytes, &Limits::default()).unwrap_err().to_string()
}

fn with(name: &str, at: usize, number: &[u8]) -> Vec<u8> {
    let mut bytes = std::fs::read(folder().join(name)).unwrap();
    bytes[at..at + number.len()].copy_from_slice(number);
    bytes
}

/// Changes a number in the directory of a little-endian TIFF file.
fn with_tag(name: &str, tag: u16, value: u32) -> Vec<u8> {
    let bytes = std::fs::read(folder().join(name)).unwrap();
    let directory = u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize;
    let is_wanted = |at: &usize| bytes[*at..*at + 2] == tag.to_le_bytes();
    let entry = (directory + 2..bytes.len()).step_by(12).find(is_wanted).unwrap();
    with(name, entry + 8, &value.to_le_bytes())
}

#[test]
fn a_picture_without_a_pixel_is_refused_in_every_format() {
    for (width, height) in [(0, 4), (4, 0), (0, 0)] {
        let pnm = |kind| format!("{kind}\n{width} {height}\n255\n").into_bytes();
        let png = with("png_rgb.png", 16, &[u32::to_be_bytes(width), u32::to_be_bytes(height)].concat());
        let bmp = with("bmp_rgb.bmp", 18, &[u32::to_le_bytes(width), u32::to_le_bytes(height)].concat());
        let tiff = with_tag("tiff_raw.tiff", if width == 0 { 256 } else { 257 }, 0);
        for bytes in [pnm("P6"), pnm("P5"), pnm("P3"), png, bmp, tiff] {
            let said = refusal(&bytes);
            assert!(said.contains("without any pixel") || said == "is damaged or cut off", "{said}");
        }
    }
    let screen = with("gif_plain.gif", 6, &[0, 0]);
    assert!(Picture::decode(&screen, &Limits::default()).is_ok_and(|picture| picture.width == 45), "a GIF grows with its frame");
    let jpeg = std::fs::read(folder().join("jpeg_420.jpg")).unwrap();
    let frame = jpeg.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
    assert_eq!(refusal(&with("jpeg_420.jpg", frame + 7, &[0, 0])), "is damaged or cut off");
}

#[test]
fn a_size_beyond_the_limits_is_told_before_anything_is_decoded() {
    let png = |width: u32, height: u32| {
        let mut bytes = with("png_rgb.png", 16, &[width.to_be_bytes(), height.to_be_bytes()].concat());
        let mut checksum = flate2::Crc::new();
        checksum.update(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&checksum.sum().to_be_bytes());
        bytes
    };
    assert_eq!(refusal(&png(1 << 30, 1 << 30)), "is 1073741824×1073741824, more than the 89478485 pixels allowed");
    assert_eq!(refusal(&png(89_000_000, 1)), "is 89000000×1, a side of it longer than the 65535 pixels allowed");
    assert_eq!(refusal(b"P6\n90000 90000\n255\n"), "is 90000×90000, more than the 89478485 pixels allowed");
    let short = Limits { max_side: 44, ..Limits::default() };
    let error = Picture::open(&folder().join("webp_lossy.webp"), &short).unwrap_err();
    assert_eq!(error.to_string(), "is 45×37, a side of it longer than the 44 pixels allowed");
    assert_eq!(refusal(&with_tag("tiff_raw.tiff", 257, 9_000_000)), "is 45×9000000, more than the 89478485 pixels allowed");
}

#[test]
fn kinds_of_tiff_that_are_not_read_are_named() {
    let odd: [(&str, u16, u32, &str); 9] = [
        ("tiff_raw.tiff", 259, 50001, "WebP compression"),
        ("tiff_raw.tiff", 259, 34676, "LogLuv compression"),
        ("tiff_raw.tiff", 259, 4, "fax compression of more than one bit"),
        ("tiff_raw.tiff", 259, 777, "compression 777"),
        ("tiff_raw.tiff", 262, 32803, "sensor (CFA) colours"),
        ("tiff_grey.tiff", 258, 64, "grey of 64-bit unsigned samples"),
        ("tiff_12bit.tiff", 262, 0, "grey from white to black of 12-bit unsigned samples"),
        ("tiff_extra_1_2.tiff", 338, 1, "grey with associated alpha"),
        ("tiff_ycbcr_22.tiff", 530, 3, "YCbCr with 3×0 subsampling"),
    ];
    for (name, tag, value, wanted) in odd {
        let said = refusal(&with_tag(name, tag, value));
        assert_eq!(said, format!("TIFF of this kind ({wanted}) is not supported; convert it to PNG"), "{name}");
    }
}

#[test]
fn known_formats_that_are_not_read_are_named_whatever_their_file_is_called() {
    let heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic rest";
    assert_eq!(refusal(heic), "is a HEIC picture, which is not supported; convert it to JPEG or PNG");
    let avif = b"\0\0\0\x1Cftypavif\0\0\0\0mif1avifmiaf rest";
    assert_eq!(refusal(avif), "is an AVIF picture, which is not supported; convert it to JPEG or PNG");
    assert_eq!(refusal(b"%PDF-1.7 and so on"), "is a PDF document, which is not supported; convert it to JPEG or PNG");
    assert!(refusal(b"only text").contains("is not a picture in a known format"));
}

#[cfg(unix)]
#[test]
fn a_pipe_is_a_file_and_what_never_ends_is_read_up_to_the_limit() {
    let pipe = std::env::temp_dir().join(format!("blip2-pipe-{}", std::process::id()));
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let writer = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::write(pipe, std::fs::read(folder().join("png_rgb.png")).unwrap()).unwrap()
    });
    assert_eq!(open(&pipe), open(&folder().join("png_rgb.png")));
    writer.join().unwrap();
    std::fs::remove_file(&pipe).unwrap();
    let limits = Limits { max_bytes: 1000, ..Limits::default() };
    let endless = Picture::open(Path::new("/dev/zero"), &limits).unwrap_err();
    assert_eq!(endless.to_string(), "has more than the 1000 bytes allowed");
    assert!(matches!(Picture::open(&folder(), &limits), Err(PixelsError::NotAFile)));
}
