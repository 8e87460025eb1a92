//! Bytes → [`Picture`] → [`Pixels`]. The only door to the crates that decode pictures.
//!
//! Decoding gives what Pillow's `convert("RGB")` gives after EXIF orientation is applied: palettes are expanded, 16-bit colours keep their
//! high byte, 16-bit greys above 255 are white, transparency is kept beside the colours. Resizing is Pillow's, bit for bit.

mod alpha;
mod bmp;
mod foreign;
mod gif;
mod guard;
mod header;
mod jpeg;
mod limits;
mod orientation;
mod png;
mod pnm;
mod preprocess;
mod resize;
mod tiff;
mod warning;
mod webp;

use std::fs::File;
use std::io::Read;
use std::path::Path;

use image::{DynamicImage, ImageFormat};

pub use alpha::Alpha;
pub use header::Header;
pub use jpeg::encode as encode_jpeg;
pub use limits::Limits;
pub use preprocess::{Pixels, Preprocess, Resample, ResizeTo};
pub use resize::resize;
pub use warning::PictureWarning;

/// A decoded picture: 8-bit RGB, row by row, three bytes a pixel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `width × height × 3` bytes.
    pub rgb: Vec<u8>,
    /// `width × height` bytes where something is transparent, 255 for opaque.
    alpha: Option<Vec<u8>>,
    warnings: Vec<PictureWarning>,
}

/// Why a picture cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PixelsError {
    /// The file cannot be opened or read.
    #[error("cannot be read")]
    Io(#[source] std::io::Error),
    /// A folder.
    #[error("is a folder, not a file")]
    NotAFile,
    /// No bytes at all.
    #[error("is empty")]
    Empty,
    /// More bytes than allowed; of a pipe no more than one of these is read.
    #[error("has more than the {limit} bytes allowed")]
    TooManyBytes {
        /// The limit in force.
        limit: u64,
    },
    /// The content is of no known image format.
    #[error("is not a picture in a known format (JPEG, PNG, GIF, WebP, BMP, TIFF, PNM)")]
    NotAPicture,
    /// A format that is known and not read; its name with an article.
    #[error("is {0}, which is not supported; convert it to JPEG or PNG")]
    Foreign(&'static str),
    /// A TIFF file of a kind that is not read, and what is odd about it.
    #[error("TIFF of this kind ({0}) is not supported; convert it to PNG")]
    UnsupportedTiff(String),
    /// The header declares no columns or no rows.
    #[error("is {width}×{height}, without any pixel")]
    NoPixels {
        /// Declared columns.
        width: u32,
        /// Declared rows.
        height: u32,
    },
    /// The header declares a side that is too long.
    #[error("is {width}×{height}, a side of it longer than the {limit} pixels allowed")]
    TooLong {
        /// Declared columns.
        width: u32,
        /// Declared rows.
        height: u32,
        /// The limit in force.
        limit: u32,
    },
    /// The header declares too many pixels.
    #[error("is {width}×{height}, more than the {limit} pixels allowed")]
    TooManyPixels {
        /// Declared columns.
        width: u32,
        /// Declared rows.
        height: u32,
        /// The limit in force.
        limit: u64,
    },
    /// The header is right but the data is cut off or damaged.
    #[error("is damaged or cut off")]
    Damaged(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The bundle does not make every shape a square.
    #[error("is {width}×{height} in the end ({how}), the model takes {size}×{size}; cut the picture to a square")]
    Unfit {
        /// Place of the picture among those that were given.
        picture: usize,
        /// Columns, once it was resized.
        width: u64,
        /// Rows, once it was resized.
        height: u64,
        /// How it was resized.
        how: ResizeTo,
        /// What the model takes.
        size: u32,
    },
}

impl Picture {
    /// An opaque picture.
    ///
    /// # Panics
    /// If these are not `width × height × 3` bytes.
    pub fn from_rgb(width: u32, height: u32, rgb: Vec<u8>) -> Self {
        assert_eq!(rgb.len() as u64, u64::from(width) * u64::from(height) * 3, "three bytes a pixel");
        Self { width, height, rgb, alpha: None, warnings: Vec::new() }
    }

    /// `width × height` bytes where something is transparent, 255 for opaque.
    pub fn alpha(&self) -> Option<&[u8]> {
        self.alpha.as_deref()
    }

    /// What is wrong with the file, although the picture is whole.
    pub fn warnings(&self) -> &[PictureWarning] {
        &self.warnings
    }

    /// Opens and decodes a file, a pipe or a device; the format is told from its content.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self, PixelsError> {
        let metadata = std::fs::metadata(path).map_err(PixelsError::Io)?;
        if metadata.is_dir() {
            return Err(PixelsError::NotAFile);
        }
        let file = File::open(path).map_err(PixelsError::Io)?;
        Self::read(file, limits)
    }

    /// Reads to the end, never more than the limit, and decodes.
    pub fn read(reader: impl Read, limits: &Limits) -> Result<Self, PixelsError> {
        let mut bytes = Vec::new();
        reader.take(limits.max_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(PixelsError::Io)?;
        Self::decode(&bytes, limits)
    }

    /// Decodes a picture in memory.
    pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Self, PixelsError> {
        if bytes.is_empty() {
            return Err(PixelsError::Empty);
        }
        if bytes.len() as u64 > limits.max_bytes {
            return Err(PixelsError::TooManyBytes { limit: limits.max_bytes });
        }
        guard::contained(|| Self::decode_known(bytes, limits))
    }

    fn decode_known(bytes: &[u8], limits: &Limits) -> Result<Self, PixelsError> {
        if tiff::is_tiff(bytes) {
            return tiff::decode(bytes, limits);
        }
        match image::guess_format(bytes) {
            Ok(ImageFormat::Bmp) => bmp::decode(bytes, limits),
            Ok(ImageFormat::Gif) => gif::decode(bytes, limits),
            Ok(ImageFormat::Jpeg) => jpeg::decode(bytes, limits),
            Ok(ImageFormat::Png) => png::decode(bytes, limits),
            Ok(ImageFormat::Pnm) => pnm::decode(bytes, limits),
            Ok(ImageFormat::WebP) => webp::decode(bytes, limits),
            _ => foreign::name(bytes).map_or_else(|| pnm::decode(bytes, limits), |name| Err(PixelsError::Foreign(name))),
        }
    }
}

fn rgb(decoded: DynamicImage) -> Picture {
    let (width, height) = (decoded.width(), decoded.height());
    let high = |samples: &[u16]| samples.iter().map(|s| (s >> 8) as u8).collect::<Vec<u8>>();
    let last = |samples: &[u8], n_channels| samples.iter().skip(n_channels - 1).step_by(n_channels).copied().collect::<Vec<u8>>();
    let alpha = match &decoded {
        DynamicImage::ImageRgba8(p) => Some(last(p, 4)),
        DynamicImage::ImageLumaA8(p) => Some(last(p, 2)),
        DynamicImage::ImageRgba16(p) => Some(last(&high(p), 4)),
        DynamicImage::ImageLumaA16(p) => Some(last(&high(p), 2)),
        _ => None,
    };
    let rgb = match decoded {
        DynamicImage::ImageRgb8(p) => p.into_raw(),
        DynamicImage::ImageRgba8(p) => without_fourth(p.into_raw()),
        DynamicImage::ImageLuma8(p) => p.pixels().flat_map(|p| [p[0]; 3]).collect(),
        DynamicImage::ImageLumaA8(p) => p.pixels().flat_map(|p| [p[0]; 3]).collect(),
        DynamicImage::ImageRgb16(p) => high(p.as_raw()),
        DynamicImage::ImageRgba16(p) => p.pixels().flat_map(|p| [p[0], p[1], p[2]].map(|s| (s >> 8) as u8)).collect(),
        // Pillow clips here, where it scales everywhere else.
        DynamicImage::ImageLuma16(p) => p.pixels().flat_map(|p| [p[0].min(255) as u8; 3]).collect(),
        DynamicImage::ImageLumaA16(p) => p.pixels().flat_map(|p| [(p[0] >> 8) as u8; 3]).collect(),
        other => other.into_rgb8().into_raw(),
    };
    Picture { alpha, ..Picture::from_rgb(width, height, rgb) }
}

/// Within the same memory, which takes half the time where pictures are large.
fn without_fourth(mut samples: Vec<u8>) -> Vec<u8> {
    let n_pixels = samples.len() / 4;
    (1..n_pixels).for_each(|pixel| samples.copy_within(pixel * 4..pixel * 4 + 3, pixel * 3));
    samples.truncate(n_pixels * 3);
    samples.shrink_to_fit();
    samples
}
