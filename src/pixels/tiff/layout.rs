//! What the samples of a picture are: the kinds that Pillow reads, and names for those that it does not.

use super::TiffError;
use super::directory::Directory;

/// How samples become colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// One sample, 0 is black.
    Grey,
    /// One sample, 0 is white.
    InvertedGrey,
    /// An index of the colour map.
    Palette,
    Rgb,
    Cmyk,
    YCbCr,
    Lab,
}

/// How a sample is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sample {
    /// 1, 2, 4, 8, 12, 16 or 32 bits.
    Unsigned(u32),
    /// 16 or 32 bits.
    Signed(u32),
    Float32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlphaKind {
    Straight,
    /// Colours are multiplied by it.
    Associated,
}

/// The shape of a picture and of its pixels.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub width: u32,
    pub height: u32,
    pub colour: Colour,
    pub sample: Sample,
    /// Samples of a pixel in the file, those that are not looked at included.
    pub n_samples: usize,
    pub alpha: Option<AlphaKind>,
    /// Each sample has strips or tiles of its own.
    pub is_planar: bool,
    pub compression: u64,
    pub is_big_endian: bool,
}

impl Colour {
    pub fn n_samples(self) -> usize {
        match self {
            Self::Grey | Self::InvertedGrey | Self::Palette => 1,
            Self::Rgb | Self::YCbCr | Self::Lab => 3,
            Self::Cmyk => 4,
        }
    }
}

impl Sample {
    pub fn bits(self) -> u32 {
        match self {
            Self::Unsigned(bits) | Self::Signed(bits) => bits,
            Self::Float32 => 32,
        }
    }
}

impl Layout {
    /// Samples of a pixel that are looked at.
    pub fn n_kept(&self) -> usize {
        self.colour.n_samples() + usize::from(self.alpha.is_some())
    }

    pub fn read(directory: &Directory<'_>) -> Result<Self, TiffError> {
        let side = |tag| directory.number(tag).and_then(|side| u32::try_from(side).ok());
        let (Some(width), Some(height)) = (side(IMAGE_WIDTH), side(IMAGE_LENGTH)) else {
            return Err(TiffError::Damaged("its width or height is missing"));
        };
        let compression = directory.number(COMPRESSION).unwrap_or(1);
        let is_planar = directory.number(PLANAR_CONFIGURATION) == Some(2);
        let is_old_jpeg = compression == OLD_JPEG;
        let photometric = if is_old_jpeg { 6 } else { directory.number(PHOTOMETRIC).unwrap_or(0) };
        let default_samples = if is_old_jpeg { 3 } else { 1 };
        let n_samples = directory.number(SAMPLES_PER_PIXEL).unwrap_or(default_samples) as usize;
        let extra: Vec<u64> = directory.get(EXTRA_SAMPLES).map_or_else(Vec::new, |field| field.numbers().take(9).collect());
        let bits = bits(directory)?;
        let colour = colour(photometric, n_samples)?;
        let sample = sample(colour, bits, directory)?;
        let alpha = alpha(colour, sample, n_samples, &extra)?;
        Ok(Self {
            width,
            height,
            colour,
            sample,
            n_samples,
            alpha,
            is_planar,
            compression,
            is_big_endian: directory.source.big_endian,
        })
    }
}

fn bits(directory: &Directory<'_>) -> Result<u32, TiffError> {
    let Some(field) = directory.get(BITS_PER_SAMPLE) else { return Ok(1) };
    let first = field.number(0).unwrap_or(1);
    if field.numbers().any(|bits| bits != first) {
        return Err(TiffError::unsupported("samples of different sizes"));
    }
    Ok(first.min(u64::from(u32::MAX)) as u32)
}

fn colour(photometric: u64, n_samples: usize) -> Result<Colour, TiffError> {
    Ok(match photometric {
        0 => Colour::InvertedGrey,
        1 => Colour::Grey,
        2 => Colour::Rgb,
        3 => Colour::Palette,
        5 => Colour::Cmyk,
        6 if n_samples == 1 => Colour::Grey,
        6 => Colour::YCbCr,
        8 => Colour::Lab,
        other => return Err(TiffError::Unsupported(format!("{} colours", photometric_name(other)))),
    })
}

fn sample(colour: Colour, bits: u32, directory: &Directory<'_>) -> Result<Sample, TiffError> {
    let format = directory.get(SAMPLE_FORMAT);
    let first = format.and_then(|field| field.number(0)).unwrap_or(1);
    if format.is_some_and(|field| field.numbers().any(|format| format != first)) {
        return Err(TiffError::unsupported("samples of different formats"));
    }
    let is_grey = matches!(colour, Colour::Grey | Colour::InvertedGrey);
    match (first, bits) {
        (1, 8) => Ok(Sample::Unsigned(8)),
        (1, 1 | 2 | 4) if is_grey || colour == Colour::Palette => Ok(Sample::Unsigned(bits)),
        (1, 16) if is_grey || matches!(colour, Colour::Rgb | Colour::Cmyk) => Ok(Sample::Unsigned(16)),
        (1, 12 | 32) if colour == Colour::Grey => Ok(Sample::Unsigned(bits)),
        // Pillow takes these for unsigned.
        (2, 8) if colour == Colour::Grey => Ok(Sample::Unsigned(8)),
        (2, 16 | 32) if colour == Colour::Grey => Ok(Sample::Signed(bits)),
        (3, 32) if is_grey => Ok(Sample::Float32),
        _ => Err(TiffError::Unsupported(format!("{} of {bits}-bit {}", colour_name(colour), format_name(first)))),
    }
}

fn alpha(colour: Colour, sample: Sample, n_samples: usize, extra: &[u64]) -> Result<Option<AlphaKind>, TiffError> {
    let unknown = || TiffError::Unsupported(format!("{} with {n_samples} samples a pixel, extra {extra:?}", colour_name(colour)));
    let n_extra = n_samples.checked_sub(colour.n_samples()).ok_or_else(unknown)?;
    let has_wide_samples = !matches!(sample, Sample::Unsigned(8 | 16));
    if n_extra > 2 + usize::from(colour == Colour::Rgb) || n_extra > 0 && has_wide_samples {
        return Err(unknown());
    }
    match (colour, n_extra, extra.first()) {
        (_, 0, _) => Ok(None),
        // A fourth colour that nothing is said about is taken for alpha.
        (Colour::Rgb, 1, None) | (Colour::Rgb, _, Some(2 | 999)) | (Colour::Grey | Colour::Palette, 1, Some(2)) => {
            Ok(Some(AlphaKind::Straight))
        }
        (Colour::Rgb, _, Some(1)) => Ok(Some(AlphaKind::Associated)),
        (Colour::Rgb | Colour::Cmyk | Colour::Grey | Colour::Palette, _, Some(0)) => Ok(None),
        (Colour::Grey, 1, Some(1)) => Err(TiffError::unsupported("grey with associated alpha")),
        _ => Err(unknown()),
    }
}

fn colour_name(colour: Colour) -> &'static str {
    match colour {
        Colour::Grey => "grey",
        Colour::InvertedGrey => "grey from white to black",
        Colour::Palette => "a palette",
        Colour::Rgb => "RGB",
        Colour::Cmyk => "CMYK",
        Colour::YCbCr => "YCbCr",
        Colour::Lab => "LAB",
    }
}

fn format_name(format: u64) -> &'static str {
    match format {
        1 => "unsigned samples",
        2 => "signed samples",
        3 => "floating-point samples",
        5 | 6 => "complex samples",
        _ => "samples of an unknown format",
    }
}

fn photometric_name(photometric: u64) -> String {
    match photometric {
        4 => "transparency mask".into(),
        9 => "ICC LAB".into(),
        10 => "ITU LAB".into(),
        32803 => "sensor (CFA)".into(),
        32844 | 32845 => "LogLuv".into(),
        34892 => "linear raw".into(),
        other => format!("photometric {other}"),
    }
}

pub const OLD_JPEG: u64 = 6;

const IMAGE_WIDTH: u16 = 256;
const IMAGE_LENGTH: u16 = 257;
const BITS_PER_SAMPLE: u16 = 258;
const COMPRESSION: u16 = 259;
const PHOTOMETRIC: u16 = 262;
const SAMPLES_PER_PIXEL: u16 = 277;
const PLANAR_CONFIGURATION: u16 = 284;
const EXTRA_SAMPLES: u16 = 338;
const SAMPLE_FORMAT: u16 = 339;
