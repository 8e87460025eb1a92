//! JPEG, decoded by libjpeg's code: Pillow uses the same, and no other decoder rounds its transform, its chroma upsampling and its colour
//! conversion alike.

use std::any::Any;
use std::cell::Cell;
use std::io::{BufRead, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};

use mozjpeg::{ColorSpace, Compress, Decompress};

use super::orientation::Metadata;
use super::{Limits, Picture, PictureWarning, PixelsError};

/// Decodes a whole JPEG file, whatever its colour space.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    // libjpeg reports fatal errors by unwinding; no state outlives the call.
    let decoded = catch_unwind(AssertUnwindSafe(|| decode_rgb(bytes, limits)));
    let unreadable =
        |panic: Box<dyn Any + Send>| panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "unreadable data".into());
    Ok(decoded.map_err(|panic| damaged(&unreadable(panic)))??.turned(metadata(bytes).orientation()))
}

/// Encodes a picture, `rgb` row by row, as most files are encoded: chroma at half the size, no progression.
///
/// # Panics
/// If `rgb` has another number of bytes, or a side is 0 or beyond what JPEG holds.
pub fn encode(width: u32, height: u32, rgb: &[u8], quality: f32) -> Vec<u8> {
    assert_eq!(rgb.len(), 3 * width as usize * height as usize, "three bytes a pixel");
    let mut compress = Compress::new(ColorSpace::JCS_RGB);
    compress.set_size(width as usize, height as usize);
    compress.set_quality(quality);
    let written = compress.start_compress(Vec::new()).and_then(|mut started| {
        started.write_scanlines(rgb)?;
        started.finish()
    });
    written.expect("memory takes everything")
}

/// libjpeg fills a picture that is cut off with grey, which nobody would notice. Pillow refuses it if the data ends before the last row is
/// there; what follows that row may be missing.
fn decode_rgb(bytes: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    let broken = |error: std::io::Error| PixelsError::Damaged(error.into());
    let asked_for_more = Cell::new(false);
    let decompress = Decompress::new_reader(Source { rest: bytes, asked_for_more: &asked_for_more }).map_err(broken)?;
    let (width, height) = (decompress.width() as u32, decompress.height() as u32);
    limits.check(width, height)?;
    check_scans(bytes, width, height)?;
    let (wanted, n_channels) = match decompress.color_space() {
        ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK => (ColorSpace::JCS_CMYK, 4),
        ColorSpace::JCS_GRAYSCALE => (ColorSpace::JCS_GRAYSCALE, 1),
        _ => (ColorSpace::JCS_RGB, 3),
    };
    let mut started = decompress.to_colorspace(wanted).map_err(broken)?;
    // The coefficients of a progressive picture take up to eight bytes a pixel, so inks become colours row by row.
    let mut rgb = Vec::with_capacity(width as usize * height as usize * 3);
    let mut row = vec![0; width as usize * n_channels];
    for _ in 0..height {
        started.read_scanlines_into(&mut row).map_err(broken)?;
        if asked_for_more.get() {
            return Err(damaged("the data ends before the picture does"));
        }
        match n_channels {
            4 => rgb.extend(row.as_chunks().0.iter().flat_map(|inks| rgb_of_inverted_cmyk(*inks))),
            1 => rgb.extend(row.iter().flat_map(|grey| [*grey; 3])),
            _ => rgb.extend_from_slice(&row),
        }
    }
    started.finish().map_err(broken)?;
    let mut picture = Picture::from_rgb(width, height, rgb);
    picture.warnings.extend(asked_for_more.get().then_some(PictureWarning::NoEnd));
    Ok(picture)
}

/// Every scan goes through the whole picture, even where it holds a few bytes only. The progression of libjpeg has 18 for four inks.
pub(super) fn check_scans(bytes: &[u8], width: u32, height: u32) -> Result<(), PixelsError> {
    let n_scans = segments(bytes).take_while(|(marker, _)| *marker != END).filter(|(marker, _)| *marker == START_OF_SCAN).count();
    if n_scans as u64 * u64::from(width) * u64::from(height) > MAX_SCANNED {
        return Err(damaged(&format!("{n_scans} scans of {width}×{height} pixels are too many")));
    }
    Ok(())
}

const MAX_SCANNED: u64 = 18 * 89_478_485;

/// Knows whether more was asked for than there is.
struct Source<'a> {
    rest: &'a [u8],
    asked_for_more: &'a Cell<bool>,
}

impl Read for Source<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.rest.read(into)
    }
}

impl BufRead for Source<'_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.asked_for_more.set(self.asked_for_more.get() || self.rest.is_empty());
        Ok(self.rest)
    }

    fn consume(&mut self, n_bytes: usize) {
        self.rest.consume(n_bytes);
    }
}

/// What the segments before the first scan say. EXIF that is spread over several of them is one.
fn metadata(bytes: &[u8]) -> Metadata {
    let mut found = Metadata::default();
    for (marker, segment) in segments(bytes).take_while(|(marker, _)| *marker != START_OF_SCAN) {
        if let (APP1, Some(exif)) = (marker, segment.strip_prefix(b"Exif\0\0")) {
            found.exif.get_or_insert_default().extend(exif);
        } else if let (APP1, Some(xmp)) = (marker, segment.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0")) {
            found.xmp = Some(xmp.to_vec());
        }
    }
    found
}

/// Markers and what belongs to them, up to the first that is cut off.
fn segments(bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = bytes.get(2..).unwrap_or_default();
    std::iter::from_fn(move || {
        let marker = rest.windows(2).position(is_marker)?;
        let (kind, behind) = (rest[marker + 1], &rest[marker + 2..]);
        if matches!(kind, 0xC8 | 0xD8..=END | 0xF0..=0xFD) {
            rest = behind;
            return Some((kind, &[][..]));
        }
        let length = behind.first_chunk().map_or(0, |length| usize::from(u16::from_be_bytes(*length)));
        let (segment, behind) = behind.split_at_checked(length.max(2))?;
        rest = behind;
        Some((kind, &segment[2..]))
    })
}

const END: u8 = 0xD9;
const START_OF_SCAN: u8 = 0xDA;
const APP1: u8 = 0xE1;

/// Not a stuffed 0xFF, a fill byte or a restart marker.
fn is_marker(pair: &[u8]) -> bool {
    pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF | 0xD0..=0xD7)
}

/// JPEG files hold inks the other way round, 255 for none. Pillow's integer formula.
pub(super) fn rgb_of_inverted_cmyk([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    [cyan, magenta, yellow].map(|ink| divided_by_255(u32::from(ink) * u32::from(black)))
}

fn divided_by_255(product: u32) -> u8 {
    let rounded = product + 128;
    (((rounded >> 8) + rounded) >> 8) as u8
}

fn damaged(reason: &str) -> PixelsError {
    PixelsError::Damaged(reason.into())
}
