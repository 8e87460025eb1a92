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

use super::{Limits, PixelsError};
use directory::Directory;
use layout::Layout;

/// What a file holds, before it is turned.
pub struct Decoded {
    pub width: u32,
    pub height: u32,
    /// Three bytes a pixel.
    pub rgb: Vec<u8>,
    /// One byte a pixel.
    pub alpha: Option<Vec<u8>>,
    /// As in EXIF.
    pub orientation: Option<u16>,
    /// The XMP packet.
    pub xmp: Option<Vec<u8>>,
}

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
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Decoded, PixelsError> {
    let directory = Directory::read(bytes)?;
    let layout = Layout::read(&directory)?;
    limits.check(layout.width, layout.height)?;
    let canvas = chunks::read(&directory, &layout)?;
    let (rgb, alpha) = colour::convert(canvas, &layout, &directory)?;
    let xmp = directory.get(XMP).map(|field| field.bytes().to_vec());
    let orientation = directory.number(ORIENTATION).map(|turn| turn.min(u64::from(u16::MAX)) as u16);
    Ok(Decoded { width: layout.width, height: layout.height, rgb, alpha, orientation, xmp })
}

const ORIENTATION: u16 = 274;
const XMP: u16 = 700;
