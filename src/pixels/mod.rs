//! Bytes → [`Picture`] → [`Pixels`]. The only door to the `image` and `mozjpeg` crates.
//!
//! Decoding gives what Pillow's `convert("RGB")` gives after EXIF orientation is applied: alpha is dropped, palettes are expanded,
//! 16-bit colours keep their high byte, 16-bit greys above 255 are white. Resizing is Pillow's, bit for bit.

mod foreign;
mod guard;
mod jpeg;
mod limits;
mod resize;
mod tiff;

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};
use ndarray::Array4;
use serde::Deserialize;

pub use limits::Limits;
pub use resize::resize;

/// A decoded picture: 8-bit RGB, row by row, three bytes a pixel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `width × height × 3` bytes.
    pub rgb: Vec<u8>,
}

/// How a bundle wants its pixels: `(crop(resize(rgb)) × rescale − mean) / std`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocess {
    /// Side of the square that the image encoder takes.
    pub size: u32,
    /// What becomes of transparency.
    pub alpha: Alpha,
    /// What a picture is resized to; absent: `size` × `size`, whatever its shape.
    #[serde(default)]
    pub resize: ResizeTo,
    /// Whether the middle of the resized picture, `size` × `size`, is cut out; what lies beyond its edges is black.
    #[serde(default)]
    pub center_crop: bool,
    /// Mean of each channel.
    pub mean: [f32; 3],
    /// Standard deviation of each channel.
    pub std: [f32; 3],
    /// Factor from 8-bit values to the range of `mean` and `std`.
    pub rescale: f64,
    /// Resampling filter.
    pub resample: Resample,
}

/// What becomes of transparency.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Alpha {
    /// The picture lies over white, as `transformers` 5 has it.
    White,
    /// Colours count as they are stored, as LAVIS and `transformers` 4 have it.
    Drop,
}

/// What a picture is resized to before the middle may be cut out.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum ResizeTo {
    /// The square that the image encoder takes, whatever the picture's shape.
    #[default]
    Square,
    /// These sides, whatever the picture's shape.
    Exact {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// The shorter side becomes this long, the shape stays.
    ShortestEdge(u32),
    /// Nothing: the picture stays as it is.
    Keep,
}

/// Pillow's convolution filters.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Resample {
    /// Cubic with a = −0.5, support 2.
    Bicubic,
    /// Triangle, support 1.
    Bilinear,
    /// Windowed sinc, support 3.
    Lanczos,
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
}

impl Picture {
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
        let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(PixelsError::Io)?;
        if tiff::is_tiff(bytes) {
            let tiff::Decoded { width, height, rgb, orientation, .. } = tiff::decode(bytes, limits)?;
            let turn = orientation.and_then(|turn| Orientation::from_exif(turn as u8)).unwrap_or(Orientation::NoTransforms);
            let mut turned = image::RgbImage::from_raw(width, height, rgb).map(DynamicImage::from).ok_or(PixelsError::NotAPicture)?;
            turned.apply_orientation(turn);
            return Ok(self::rgb(turned));
        }
        if reader.format().is_none_or(|format| !READ.contains(&format)) {
            return Err(foreign::name(bytes).map_or(PixelsError::NotAPicture, PixelsError::Foreign));
        }
        let mut allocations = image::Limits::default();
        allocations.max_alloc = Some(limits.max_pixels.saturating_mul(16));
        reader.limits(allocations);
        let format = reader.format();
        let mut decoder = reader.into_decoder().map_err(undecodable)?;
        let (width, height) = decoder.dimensions();
        limits.check(width, height)?;
        let turn = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let mut decoded = match format {
            Some(ImageFormat::Jpeg) => DynamicImage::from(jpeg::decode(bytes)?),
            _ => DynamicImage::from_decoder(decoder).map_err(|error| PixelsError::Damaged(error.into()))?,
        };
        decoded.apply_orientation(turn);
        Ok(rgb(decoded))
    }
}

const READ: [ImageFormat; 6] =
    [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::Gif, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Pnm];

fn undecodable(error: ImageError) -> PixelsError {
    match error {
        ImageError::Unsupported(_) => PixelsError::NotAPicture,
        other => PixelsError::Damaged(other.into()),
    }
}

fn rgb(decoded: DynamicImage) -> Picture {
    let (width, height) = (decoded.width(), decoded.height());
    let high = |samples: &[u16]| samples.iter().map(|s| (s >> 8) as u8).collect::<Vec<u8>>();
    let rgb = match decoded {
        DynamicImage::ImageRgb8(p) => p.into_raw(),
        DynamicImage::ImageRgba8(p) => p.pixels().flat_map(|p| [p[0], p[1], p[2]]).collect(),
        DynamicImage::ImageLuma8(p) => p.pixels().flat_map(|p| [p[0]; 3]).collect(),
        DynamicImage::ImageLumaA8(p) => p.pixels().flat_map(|p| [p[0]; 3]).collect(),
        DynamicImage::ImageRgb16(p) => high(p.as_raw()),
        DynamicImage::ImageRgba16(p) => p.pixels().flat_map(|p| [p[0], p[1], p[2]].map(|s| (s >> 8) as u8)).collect(),
        // Pillow clips here, where it scales everywhere else.
        DynamicImage::ImageLuma16(p) => p.pixels().flat_map(|p| [p[0].min(255) as u8; 3]).collect(),
        DynamicImage::ImageLumaA16(p) => p.pixels().flat_map(|p| [(p[0] >> 8) as u8; 3]).collect(),
        other => other.into_rgb8().into_raw(),
    };
    Picture { width, height, rgb }
}

/// Resized and normalised pixels, channels first: `[batch, 3, size, size]`.
#[derive(Clone, Debug)]
pub struct Pixels(pub Array4<f32>);

impl Pixels {
    /// One batch row per picture.
    pub fn from_pictures(pictures: &[&Picture], how: &Preprocess) -> Self {
        let side = how.size as usize;
        let mut pixels = Array4::zeros((pictures.len(), 3, side, side));
        for (picture, mut row) in pictures.iter().zip(pixels.outer_iter_mut()) {
            let resized = resize(picture, how.size, how.size, how.resample);
            for (channel, mut plane) in row.outer_iter_mut().enumerate() {
                let normalised: [f32; 256] = std::array::from_fn(|value| how.normalise(value as u8, channel));
                for (into, pixel) in plane.iter_mut().zip(resized.rgb.chunks_exact(3)) {
                    *into = normalised[usize::from(pixel[channel])];
                }
            }
        }
        Self(pixels)
    }
}

impl Preprocess {
    fn normalise(&self, value: u8, channel: usize) -> f32 {
        ((f64::from(value) * self.rescale) as f32 - self.mean[channel]) / self.std[channel]
    }
}

impl std::fmt::Display for Resample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Bicubic => "bicubic",
            Self::Bilinear => "bilinear",
            Self::Lanczos => "lanczos",
        })
    }
}
