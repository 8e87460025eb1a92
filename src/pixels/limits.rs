//! What is refused before any decoding.

use super::PixelsError;

/// Largest files and pictures.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest file.
    pub max_bytes: u64,
    /// Largest `width × height`. Decoding takes up to eight bytes for each of them, and three for the picture itself.
    pub max_pixels: u64,
    /// Longest side.
    pub max_side: u32,
}

impl Default for Limits {
    /// 64 MiB; the number of pixels at which Pillow warns of a decompression bomb; the longest side of a JPEG or GIF, which also keeps
    /// the table of resizing weights, as long as a side, below a few megabytes.
    fn default() -> Self {
        Self { max_bytes: 64 << 20, max_pixels: 89_478_485, max_side: 65_535 }
    }
}

impl Limits {
    pub(super) fn check(&self, width: u32, height: u32) -> Result<(), PixelsError> {
        if width == 0 || height == 0 {
            return Err(PixelsError::NoPixels { width, height });
        }
        if u64::from(width) * u64::from(height) > self.max_pixels {
            return Err(PixelsError::TooManyPixels { width, height, limit: self.max_pixels });
        }
        if width.max(height) > self.max_side {
            return Err(PixelsError::TooLong { width, height, limit: self.max_side });
        }
        Ok(())
    }
}
