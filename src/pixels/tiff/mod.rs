//! TIFF and BigTIFF: the kinds that Pillow reads, with the bytes that it gives. Of several pages the first counts.
//!
//! ```text
//! directory → layout ┐
//! strips and tiles ──┴codec→ rows of samples ─samples→ canvas, 8 bits a sample ─colour→ RGB and alpha
//! ```

mod chunks;
mod codec;
mod colour;
mod directory;
mod fax;
mod jpeg;
mod layout;
mod samples;

use super::orientation::Metadata;
use super::{Limits, Picture, PixelsError};
use directory::Directory;
use layout::Layout;

/// Why a TIFF file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TiffError {
    #[error("{0}")]
    Damaged(&'static str),
    #[error("{0}")]
    Unsupported(String),
    #[error("{0}")]
    Data(#[from] std::io::Error),
}

impl TiffError {
    fn unsupported(what: &str) -> Self {
        Self::Unsupported(what.into())
    }
}

impl From<TiffError> for PixelsError {
    fn from(error: TiffError) -> Self {
        match error {
            TiffError::Unsupported(what) => Self::UnsupportedTiff(what),
            other => Self::Damaged(other.into()),
        }
    }
}

/// Whether the bytes begin as a TIFF file does, the two spellings that Pillow forgives included.
pub fn is_tiff(bytes: &[u8]) -> bool {
    let marks: [&[u8]; 6] = [b"MM\0*", b"II*\0", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0"];
    marks.iter().any(|mark| bytes.starts_with(mark))
}

/// Decodes the first page.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    let directory = Directory::read(bytes)?;
    let layout = Layout::read(&directory)?;
    limits.check(layout.width, layout.height)?;
    let canvas = chunks::read(&directory, &layout)?;
    let (rgb, alpha) = colour::convert(canvas, &layout, &directory)?;
    Ok(Picture { alpha, ..Picture::from_rgb(layout.width, layout.height, rgb) }.turned(orientation(&directory)))
}

/// The tag, as any kind of number, or what XMP says where there is none.
fn orientation(directory: &Directory<'_>) -> u8 {
    let Some(stored) = directory.get(ORIENTATION).and_then(|field| field.real(0)) else {
        let xmp = directory.get(XMP).map(|field| field.bytes().to_vec());
        return Metadata { exif: None, xmp }.orientation();
    };
    (2..=8).find(|known| f32::from(*known) == stored).unwrap_or(1)
}

const ORIENTATION: u16 = 274;
const XMP: u16 = 700;
