//! WebP: a still picture, or the first frame of an animation on its canvas.

use std::io::Cursor;

use image::codecs::webp::WebPDecoder;
use image::{DynamicImage, ImageDecoder};

use super::orientation::Metadata;
use super::{Limits, Picture, PixelsError, rgb};

const HAS_ALPHA: u8 = 0x10;
const HAS_EXIF: u8 = 0x08;
const HAS_XMP: u8 = 0x04;

/// Decodes a file that begins with `RIFF` and `WEBP`.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    let declared = bytes.get(4..).and_then(|rest| rest.first_chunk()).map(|size| u32::from_le_bytes(*size) as usize + 8);
    let whole = declared.and_then(|size| bytes.get(..size)).ok_or_else(|| damaged("the file is shorter than it says"))?;
    let chunks = whole.get(12..).ok_or_else(|| damaged("there is no picture in it"))?;
    let Some(extended) = Extended::read(chunks) else { return still(whole, limits) };
    let picture = match extended.first_frame {
        Some(frame) => extended.with(frame, limits)?,
        None => still(whole, limits)?,
    };
    Ok(picture.turned(extended.metadata.orientation()))
}

fn still(file: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    let broken = |error: image::ImageError| PixelsError::Damaged(error.into());
    let decoder = WebPDecoder::new(Cursor::new(file)).map_err(broken)?;
    let (width, height) = decoder.dimensions();
    limits.check(width, height)?;
    Ok(rgb(DynamicImage::from_decoder(decoder).map_err(broken)?))
}

/// A file with more in it than pixels.
struct Extended<'a> {
    flags: u8,
    width: u32,
    height: u32,
    first_frame: Option<&'a [u8]>,
    metadata: Metadata,
}

impl<'a> Extended<'a> {
    fn read(chunks: &'a [u8]) -> Option<Self> {
        let (header, mut rest) = chunk(chunks).filter(|(header, _)| header.kind == b"VP8X")?;
        let &[flags, _, _, _, w0, w1, w2, h0, h1, h2, ..] = header.data else { return None };
        let (width, height) = (u32::from_le_bytes([w0, w1, w2, 0]) + 1, u32::from_le_bytes([h0, h1, h2, 0]) + 1);
        let mut found = Self { flags, width, height, first_frame: None, metadata: Metadata::default() };
        while let Some((chunk, behind)) = chunk(rest) {
            match chunk.kind {
                b"ANMF" => found.first_frame = found.first_frame.or(Some(chunk.data)),
                b"EXIF" if flags & HAS_EXIF > 0 => _ = found.metadata.exif.get_or_insert_with(|| chunk.data.to_vec()),
                b"XMP " if flags & HAS_XMP > 0 => _ = found.metadata.xmp.get_or_insert_with(|| chunk.data.to_vec()),
                _ => {}
            }
            rest = behind;
        }
        Some(found)
    }

    /// The canvas is empty before the first frame, so that nothing shows through it.
    fn with(&self, frame: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
        limits.check(self.width, self.height)?;
        let (place, data) = frame.split_first_chunk::<16>().ok_or_else(|| damaged("the first frame is cut off"))?;
        let u24 = |at: usize| u32::from_le_bytes([place[at], place[at + 1], place[at + 2], 0]);
        let (left, top, width, height) = (u24(0) * 2, u24(3) * 2, u24(6) + 1, u24(9) + 1);
        let drawn = still(&alone(data, width, height), limits)?;
        if left + drawn.width > self.width || top + drawn.height > self.height || (drawn.width, drawn.height) != (width, height) {
            return Err(damaged("the first frame does not lie on the canvas"));
        }
        let n_pixels = self.width as usize * self.height as usize;
        let mut picture = Picture::from_rgb(self.width, self.height, vec![0; n_pixels * 3]);
        let mut alpha = vec![0; n_pixels];
        for y in 0..height as usize {
            let (from, n) = (y * width as usize, width as usize);
            let to = (top as usize + y) * self.width as usize + left as usize;
            picture.rgb[to * 3..][..n * 3].copy_from_slice(&drawn.rgb[from * 3..][..n * 3]);
            match &drawn.alpha {
                Some(drawn) => alpha[to..][..n].copy_from_slice(&drawn[from..][..n]),
                None => alpha[to..][..n].fill(255),
            }
        }
        picture.alpha = (self.flags & HAS_ALPHA > 0).then_some(alpha);
        Ok(picture)
    }
}

/// A frame in a file of its own.
fn alone(frame: &[u8], width: u32, height: u32) -> Vec<u8> {
    let mut file = b"RIFF____WEBP".to_vec();
    if frame.starts_with(b"ALPH") {
        file.extend(b"VP8X\x0a\0\0\0\x10\0\0\0");
        file.extend([width - 1, height - 1].into_iter().flat_map(|side| [0, 8, 16].map(|place| (side >> place) as u8)));
    }
    file.extend(frame);
    let size = (file.len() as u32 - 8).to_le_bytes();
    file[4..8].copy_from_slice(&size);
    file
}

struct Chunk<'a> {
    kind: &'a [u8; 4],
    data: &'a [u8],
}

/// The first chunk and what lies behind it.
fn chunk(bytes: &[u8]) -> Option<(Chunk<'_>, &[u8])> {
    let (kind, rest) = bytes.split_first_chunk::<4>()?;
    let (size, rest) = rest.split_first_chunk::<4>()?;
    let (data, behind) = rest.split_at_checked(u32::from_le_bytes(*size) as usize)?;
    Some((Chunk { kind, data }, behind.get(data.len() % 2..).unwrap_or_default()))
}

fn damaged(reason: &str) -> PixelsError {
    PixelsError::Damaged(reason.into())
}
