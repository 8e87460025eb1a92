//! JPEG, decoded by libjpeg's code: Pillow uses the same, and no other decoder rounds its transform, its chroma upsampling and its colour
//! conversion alike.

use std::any::Any;
use std::cell::Cell;
use std::io::{BufRead, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};

use mozjpeg::{ColorSpace, Decompress};

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

/// libjpeg fills a picture that is cut off with grey, which nobody would notice. Pillow refuses it if the data ends before the last row is
/// there; what follows that row may be missing.
fn decode_rgb(bytes: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    let broken = |error: std::io::Error| PixelsError::Damaged(error.into());
    let asked_for_more = Cell::new(false);
    let decompress = Decompress::new_reader(Source { rest: bytes, asked_for_more: &asked_for_more }).map_err(broken)?;
    let (width, height) = (decompress.width() as u32, decompress.height() as u32);
    limits.check(width, height)?;
    let wanted = match decompress.color_space() {
        ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK => ColorSpace::JCS_CMYK,
        ColorSpace::JCS_GRAYSCALE => ColorSpace::JCS_GRAYSCALE,
        _ => ColorSpace::JCS_RGB,
    };
    let mut started = decompress.to_colorspace(wanted).map_err(broken)?;
    let rows: Vec<u8> = started.read_scanlines().map_err(broken)?;
    if asked_for_more.get() {
        return Err(damaged("the data ends before the picture does"));
    }
    started.finish().map_err(broken)?;
    let rgb = match wanted {
        ColorSpace::JCS_CMYK => rows.as_chunks().0.iter().flat_map(|inks| rgb_of_inverted_cmyk(*inks)).collect(),
        ColorSpace::JCS_GRAYSCALE => rows.into_iter().flat_map(|grey| [grey; 3]).collect(),
        _ => rows,
    };
    let mut picture = Picture::from_rgb(width, height, rgb);
    picture.warnings.extend(asked_for_more.get().then_some(PictureWarning::NoEnd));
    Ok(picture)
}

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
    let (mut found, mut rest) = (Metadata::default(), bytes.get(2..).unwrap_or_default());
    while let Some(at) = rest.windows(2).position(is_marker) {
        let marker = rest[at + 1];
        rest = &rest[at + 2..];
        if marker == START_OF_SCAN {
            break;
        }
        if matches!(marker, 0xC8 | 0xD8..=0xD9 | 0xF0..=0xFD) {
            continue;
        }
        let length = rest.first_chunk().map_or(0, |length| usize::from(u16::from_be_bytes(*length)));
        let Some((segment, behind)) = rest.split_at_checked(length.max(2)) else { break };
        if let (APP1, Some(exif)) = (marker, segment[2..].strip_prefix(b"Exif\0\0")) {
            found.exif.get_or_insert_default().extend(exif);
        } else if let (APP1, Some(xmp)) = (marker, segment[2..].strip_prefix(b"http://ns.adobe.com/xap/1.0/\0")) {
            found.xmp = Some(xmp.to_vec());
        }
        rest = behind;
    }
    found
}

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
