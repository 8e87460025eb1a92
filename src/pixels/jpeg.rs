//! JPEG, decoded by libjpeg's code: Pillow uses the same, and no other decoder rounds its transform, its chroma upsampling and its colour
//! conversion alike.

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::RgbImage;
use mozjpeg::{ColorSpace, Decompress};

use super::PixelsError;

/// Decodes a whole JPEG file, whatever its colour space, without EXIF orientation.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, PixelsError> {
    let damaged = |reason: String| PixelsError::Damaged(reason.into());
    if !is_complete(bytes) {
        return Err(damaged("the data ends before the picture does".into()));
    }
    // libjpeg reports fatal errors by unwinding; no state outlives the call.
    match catch_unwind(AssertUnwindSafe(|| decode_complete(bytes))) {
        Ok(decoded) => decoded.map_err(|error| damaged(error.to_string())),
        Err(panic) => Err(damaged(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "unreadable data".into()))),
    }
}

fn decode_complete(bytes: &[u8]) -> std::io::Result<RgbImage> {
    let decompress = Decompress::new_mem(bytes)?;
    let (width, height) = (decompress.width() as u32, decompress.height() as u32);
    let rgb = match decompress.color_space() {
        ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK => {
            let mut started = decompress.to_colorspace(ColorSpace::JCS_CMYK)?;
            let inks: Vec<[u8; 4]> = started.read_scanlines()?;
            inks.into_iter().flat_map(rgb_of_inverted_cmyk).collect()
        }
        ColorSpace::JCS_GRAYSCALE => {
            let mut started = decompress.grayscale()?;
            let greys: Vec<u8> = started.read_scanlines()?;
            greys.into_iter().flat_map(|grey| [grey; 3]).collect()
        }
        _ => decompress.rgb()?.read_scanlines::<[u8; 3]>()?.into_flattened(),
    };
    RgbImage::from_raw(width, height, rgb).ok_or_else(|| std::io::Error::other("rows are missing"))
}

/// JPEG files hold inks the other way round, 255 for none. Pillow's integer formula.
pub(super) fn rgb_of_inverted_cmyk([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    [cyan, magenta, yellow].map(|ink| divided_by_255(u32::from(ink) * u32::from(black)))
}

fn divided_by_255(product: u32) -> u8 {
    let rounded = product + 128;
    (((rounded >> 8) + rounded) >> 8) as u8
}

/// Whether the markers lead to the end of the image. libjpeg fills a picture that is cut off with grey, which nobody would notice.
fn is_complete(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(2..).unwrap_or_default();
    loop {
        let Some(at) = rest.windows(2).position(is_marker) else { return false };
        let marker = rest[at + 1];
        rest = &rest[at + 2..];
        if marker == END_OF_IMAGE {
            return true;
        }
        if marker == TEMPORARY {
            continue;
        }
        let Some(length) = rest.first_chunk::<2>().map(|length| usize::from(u16::from_be_bytes(*length))) else { return false };
        let Some(behind) = rest.get(length..) else { return false };
        rest = behind;
    }
}

const END_OF_IMAGE: u8 = 0xD9;
const TEMPORARY: u8 = 0x01;

/// Not a stuffed 0xFF, a fill byte or a restart marker, all of which belong to the data of a scan.
fn is_marker(pair: &[u8]) -> bool {
    pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF | 0xD0..=0xD7)
}
