//! [`Picture`]s → [`Pixels`], as a bundle wants them: laid over white, resized, cropped, normalised.

use std::ops::Range;

use ndarray::{Array4, Axis};
use serde::Deserialize;

use super::resize::{Rgb, Target, resize_part};
use super::{Alpha, Picture, PixelsError, guard};

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

/// Resized and normalised pixels, channels first: `[batch, 3, size, size]`.
#[derive(Clone, Debug)]
pub struct Pixels(pub Array4<f32>);

impl Pixels {
    /// One batch row per picture; an error for the first that does not end as the square that the image encoder takes.
    pub fn from_pictures(pictures: &[&Picture], how: &Preprocess) -> Result<Self, PixelsError> {
        let side = how.size as usize;
        let mut pixels = Array4::zeros((pictures.len(), 3, side, side));
        for (index, (picture, mut row)) in pictures.iter().zip(pixels.outer_iter_mut()).enumerate() {
            let square = guard::contained(|| {
                check_size(picture)?;
                how.square(picture).ok_or_else(|| how.unfit(picture, index))
            })?;
            for (channel, mut plane) in row.outer_iter_mut().enumerate() {
                let normalised: [f32; 256] = std::array::from_fn(|value| how.normalise(value as u8, channel));
                for (into, pixel) in plane.iter_mut().zip(square.rgb.chunks_exact(3)) {
                    *into = normalised[usize::from(pixel[channel])];
                }
            }
        }
        Ok(Self(pixels))
    }
}

impl Pixels {
    /// Batches of pictures as one.
    ///
    /// # Panics
    /// If there are none, or their sizes differ.
    pub fn stack(batches: &[&Self]) -> Self {
        let views: Vec<_> = batches.iter().map(|batch| batch.0.view()).collect();
        Self(ndarray::concatenate(Axis(0), &views).expect("pictures of one size"))
    }

    /// Batches of at most `n` of these pictures.
    pub fn chunks(&self, n: usize) -> impl Iterator<Item = Self> {
        let n = n.clamp(1, self.0.len_of(Axis(0)).max(1));
        self.0.axis_chunks_iter(Axis(0), n).map(|pictures| Self(pictures.to_owned()))
    }
}

/// Callers may put pictures together themselves.
fn check_size(picture: &Picture) -> Result<(), PixelsError> {
    let n_pixels = picture.width as usize * picture.height as usize;
    let alpha = picture.alpha.as_ref().map_or(n_pixels, Vec::len);
    if picture.rgb.len() == n_pixels * 3 && alpha == n_pixels {
        return Ok(());
    }
    let (found, Picture { width, height, .. }) = (picture.rgb.len(), picture);
    Err(PixelsError::Damaged(format!("{width}×{height} with {found} bytes of colour and {alpha} of alpha").into()))
}

impl Preprocess {
    /// The square that the image encoder takes, in 8 bits; nothing if the picture has another shape in the end.
    pub fn square(&self, picture: &Picture) -> Option<Picture> {
        let side = u64::from(self.size);
        let target = self.resize.target(picture, self.size);
        let middle = |length: u64| (length as i64 - i64::from(self.size)).div_euclid(2);
        let (left, top) = (middle(target.width), middle(target.height));
        if !self.center_crop && (target.width, target.height) != (side, side) {
            return None;
        }
        let (columns, rows) = (inside(left, side, target.width), inside(top, side, target.height));
        let width = (columns.end - columns.start) as usize * 3;
        let source = Rgb { width: picture.width, rgb: picture.opaque(self.alpha) };
        let found = resize_part(&source, &Target { columns: columns.clone(), rows: rows.clone(), ..target }, self.resample);
        let mut square = vec![0; self.size as usize * self.size as usize * 3];
        let first = ((rows.start as i64 - top) as usize * self.size as usize + (columns.start as i64 - left) as usize) * 3;
        for (into, row) in square[first..].chunks_mut(self.size as usize * 3).zip(found.chunks_exact(width)) {
            into[..width].copy_from_slice(row);
        }
        Some(Picture::from_rgb(self.size, self.size, square))
    }

    fn normalise(&self, value: u8, channel: usize) -> f32 {
        ((f64::from(value) * self.rescale) as f32 - self.mean[channel]) / self.std[channel]
    }

    fn unfit(&self, picture: &Picture, index: usize) -> PixelsError {
        let Target { width, height, .. } = self.resize.target(picture, self.size);
        PixelsError::Unfit { picture: index, width, height, how: self.resize, size: self.size }
    }
}

/// The part of `first..first + length` that lies within `0..whole`.
fn inside(first: i64, length: u64, whole: u64) -> Range<u64> {
    first.max(0) as u64..(first + length as i64).min(whole as i64) as u64
}

impl ResizeTo {
    /// The whole of the resized picture.
    fn target(self, picture: &Picture, size: u32) -> Target {
        let (width, height) = (u64::from(picture.width), u64::from(picture.height));
        let (width, height) = match self {
            Self::Square => (u64::from(size), u64::from(size)),
            Self::Exact { width, height } => (u64::from(width), u64::from(height)),
            Self::ShortestEdge(shorter) if width <= height => (u64::from(shorter), longer(shorter, height, width)),
            Self::ShortestEdge(shorter) => (longer(shorter, width, height), u64::from(shorter)),
            Self::Keep => (width, height),
        };
        Target { width, height, columns: 0..width, rows: 0..height }
    }
}

/// `int(shorter * long / short)` of `get_resize_output_image_size` in `transformers`: a quotient of floats, cut off.
fn longer(shorter: u32, long: u64, short: u64) -> u64 {
    ((u64::from(shorter) * long) as f64 / short as f64) as u64
}

impl std::fmt::Display for ResizeTo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Square => f.write_str("resized to a square"),
            Self::Exact { width, height } => write!(f, "resized to {width}×{height}"),
            Self::ShortestEdge(side) => write!(f, "shorter side resized to {side}"),
            Self::Keep => f.write_str("not resized"),
        }
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
