//! What a file says of its picture before anything is decoded.

use std::io::Cursor;

use image::ImageDecoder;
use image::codecs::webp::WebPDecoder;

/// Size and form of a JPEG, PNG, GIF or WebP, as the file stores it: nothing is turned yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// `jpeg`, `png`, `gif` or `webp`.
    pub format: &'static str,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Bits of a pixel.
    pub bit_depth: u16,
}

impl Header {
    /// Reads it; none of other formats, or where it is not whole.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0xff, 0xd8, rest @ ..] => jpeg(rest),
            [0x89, b'P', b'N', b'G', ..] => png(bytes),
            [b'G', b'I', b'F', b'8', ..] => gif(bytes),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => webp(bytes),
            _ => None,
        }
    }
}

/// The first frame header (SOF) says it. All segments before it have their length.
fn jpeg(mut rest: &[u8]) -> Option<Header> {
    loop {
        let start = rest.iter().position(|byte| *byte == 0xff)?;
        let marker = start + rest[start..].iter().position(|byte| *byte != 0xff)?;
        let (kind, behind) = (rest[marker], &rest[marker + 1..]);
        rest = match kind {
            0xc0..=0xcf if ![0xc4, 0xc8, 0xcc].contains(&kind) => {
                let &[_, _, precision, h0, h1, w0, w1, n_components, ..] = behind else { return None };
                let (width, height) = (u16::from_be_bytes([w0, w1]).into(), u16::from_be_bytes([h0, h1]).into());
                return Some(Header { format: "jpeg", width, height, bit_depth: u16::from(precision) * u16::from(n_components) });
            }
            0x00 | 0x01 | 0xd0..=0xd9 => behind,
            _ => behind.get(usize::from(u16::from_be_bytes(*behind.first_chunk()?))..)?,
        };
    }
}

/// The first chunk (IHDR) says it.
fn png(bytes: &[u8]) -> Option<Header> {
    let side = |at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let (depth, kind) = (bytes.get(24)?, bytes.get(25)?);
    let n_channels = [1, 0, 3, 1, 2, 0, 4].get(usize::from(*kind))?;
    Some(Header { format: "png", width: side(16)?, height: side(20)?, bit_depth: u16::from(*depth) * n_channels })
}

/// The size is that of the canvas, which grows where a frame goes beyond it.
fn gif(bytes: &[u8]) -> Option<Header> {
    let &[w0, w1, h0, h1, ..] = bytes.get(6..)? else { return None };
    let (width, height) = (u16::from_le_bytes([w0, w1]).into(), u16::from_le_bytes([h0, h1]).into());
    Some(Header { format: "gif", width, height, bit_depth: 8 })
}

fn webp(bytes: &[u8]) -> Option<Header> {
    let decoder = WebPDecoder::new(Cursor::new(bytes)).ok()?;
    let ((width, height), bit_depth) = (decoder.dimensions(), decoder.color_type().bits_per_pixel());
    Some(Header { format: "webp", width, height, bit_depth })
}
