//! From the samples of a canvas to RGB and alpha.

use lcms2::{CIExyY, GlobalContext, Intent, PixelFormat, Profile, Transform};

use super::TiffError;
use super::chunks::Canvas;
use super::codec::{JPEG, NO_COMPRESSION};
use super::directory::Directory;
use super::layout::{AlphaKind, Colour, Layout};
use crate::pixels::jpeg::rgb_of_inverted_cmyk;

/// Three bytes a pixel, and one for alpha where there is some.
pub fn convert(canvas: Canvas, layout: &Layout, directory: &Directory<'_>) -> Result<(Vec<u8>, Option<Vec<u8>>), TiffError> {
    let Canvas { mut samples, n_channels, .. } = canvas;
    let last = || samples.iter().skip(n_channels - 1).step_by(n_channels).copied().collect();
    let alpha = layout.alpha.map(|_| last());
    if layout.alpha == Some(AlphaKind::Associated) {
        samples.chunks_exact_mut(4).for_each(divide_by_alpha);
    }
    let rgb = match layout.colour {
        Colour::Grey | Colour::InvertedGrey => expand(&samples, n_channels, |grey| [grey; 3]),
        Colour::Palette => {
            let palette = palette(directory, layout)?;
            expand(&samples, n_channels, |index| palette[usize::from(index)])
        }
        Colour::Rgb => compact(samples, n_channels, |pixel| [pixel[0], pixel[1], pixel[2]]),
        Colour::Cmyk => compact(samples, n_channels, |inks| rgb_of_inverted_cmyk([0, 1, 2, 3].map(|ink| 255 - inks[ink]))),
        Colour::YCbCr if layout.compression == JPEG && !layout.is_planar => samples,
        Colour::YCbCr => {
            let table = YCbCr::new(layout, directory);
            compact(samples, n_channels, |pixel| table.rgb([pixel[0], pixel[1], pixel[2]]))
        }
        Colour::Lab => lab(samples, layout)?,
    };
    Ok((rgb, alpha))
}

fn expand(samples: &[u8], n_channels: usize, colour: impl Fn(u8) -> [u8; 3]) -> Vec<u8> {
    samples.iter().step_by(n_channels).flat_map(|value| colour(*value)).collect()
}

/// Within the same memory: a second picture of this size may be too much.
fn compact(mut samples: Vec<u8>, n_channels: usize, colour: impl Fn(&[u8]) -> [u8; 3]) -> Vec<u8> {
    let n_pixels = samples.len() / n_channels;
    for pixel in 0..n_pixels {
        let rgb = colour(&samples[pixel * n_channels..][..n_channels]);
        samples[pixel * 3..][..3].copy_from_slice(&rgb);
    }
    samples.truncate(n_pixels * 3);
    samples.shrink_to_fit();
    samples
}

fn divide_by_alpha(pixel: &mut [u8]) {
    let alpha = u32::from(pixel[3]);
    for colour in &mut pixel[..3] {
        *colour = (u32::from(*colour) * 255).checked_div(alpha).map_or(0, |divided| divided.min(255) as u8);
    }
}

fn palette(directory: &Directory<'_>, layout: &Layout) -> Result<[[u8; 3]; 256], TiffError> {
    let map = directory.get(COLOR_MAP).ok_or(TiffError::Damaged("its colour map is missing"))?;
    let n_colours = map.len() / 3;
    if n_colours < 1 << layout.sample.bits() {
        return Err(TiffError::Damaged("its colour map is too short"));
    }
    let value = |plane: usize, index: usize| map.number(plane * n_colours + index).map_or(0, |value| (value >> 8) as u8);
    let colour = |index: usize| if index < n_colours { [0, 1, 2].map(|plane| value(plane, index)) } else { [0; 3] };
    Ok(std::array::from_fn(colour))
}

/// What each value of brightness and chroma adds to the colours.
struct YCbCr {
    brightness: [i32; 256],
    red_of_red: [i32; 256],
    green_of_red: [i32; 256],
    green_of_blue: [i32; 256],
    blue_of_blue: [i32; 256],
    shift: u32,
}

impl YCbCr {
    /// Pillow converts what is not compressed, libtiff the rest; they round differently.
    fn new(layout: &Layout, directory: &Directory<'_>) -> Self {
        if layout.compression == NO_COMPRESSION { Self::pillow() } else { Self::libtiff(directory) }
    }

    fn rgb(&self, [y, cb, cr]: [u8; 3]) -> [u8; 3] {
        let (y, cb, cr) = (self.brightness[usize::from(y)], usize::from(cb), usize::from(cr));
        let green = (self.green_of_blue[cb] + self.green_of_red[cr]) >> self.shift;
        [y + self.red_of_red[cr], y + green, y + self.blue_of_blue[cb]].map(|value| value.clamp(0, 255) as u8)
    }

    /// `ConvertYCbCr.c`: tables of 1/64.
    fn pillow() -> Self {
        let table = |factor: f64| std::array::from_fn(|value| (factor * (value as f64 - 128.0) * 64.0 + 0.5) as i32);
        let whole = |factor: f64| table(factor).map(|value: i32| value >> 6);
        Self {
            brightness: std::array::from_fn(|value| value as i32),
            red_of_red: whole(1.402),
            green_of_red: table(-0.71414),
            green_of_blue: table(-0.34414),
            blue_of_blue: whole(1.772),
            shift: 6,
        }
    }

    /// `tif_color.c`: TIFF 6.0 section 21 in 16-bit fractions.
    fn libtiff(directory: &Directory<'_>) -> Self {
        let reals = |tag, otherwise: &[f32]| -> Vec<f32> {
            let field = directory.get(tag).filter(|field| field.len() >= otherwise.len());
            (0..otherwise.len()).map(|index| field.and_then(|field| field.real(index)).unwrap_or(otherwise[index])).collect()
        };
        let luma = reals(YCBCR_COEFFICIENTS, &[0.299, 0.587, 0.114]);
        let range = reals(REFERENCE_BLACK_WHITE, &[0.0, 255.0, 128.0, 255.0, 128.0, 255.0]);
        let fixed = |factor: f32| (f64::from(if factor >= 0.0 { factor.min(2.0) } else { 0.0 }) * 65536.0 + 0.5) as i32;
        let (red, blue) = (2.0 - 2.0 * luma[0], 2.0 - 2.0 * luma[2]);
        let (red_in_green, blue_in_green) = (luma[0] * red / luma[1], luma[2] * blue / luma[1]);
        let chroma = |value: usize, black: f32, white: f32| in_range(value as i32 - 128, black - 128.0, white - 128.0, 127.0);
        let from_red: [i32; 256] = std::array::from_fn(|value| chroma(value, range[4], range[5]));
        let from_blue: [i32; 256] = std::array::from_fn(|value| chroma(value, range[2], range[3]));
        Self {
            brightness: std::array::from_fn(|value| in_range(value as i32, range[0], range[1], 255.0)),
            red_of_red: from_red.map(|chroma| (fixed(red) * chroma + HALF) >> 16),
            green_of_red: from_red.map(|chroma| -fixed(red_in_green) * chroma),
            green_of_blue: from_blue.map(|chroma| -fixed(blue_in_green) * chroma + HALF),
            blue_of_blue: from_blue.map(|chroma| (fixed(blue) * chroma + HALF) >> 16),
            shift: 16,
        }
    }
}

fn in_range(value: i32, black: f32, white: f32, largest: f32) -> i32 {
    let width = if white == black { 1.0 } else { white - black };
    ((value.wrapping_sub(black as i32)) as f32 * largest / width).clamp(-4096.0, 4096.0) as i32
}

/// Pillow asks Little CMS, which interpolates in a grid of its own: no formula gives the same bytes.
fn lab(mut samples: Vec<u8>, layout: &Layout) -> Result<Vec<u8>, TiffError> {
    let failed = |_| TiffError::unsupported("LAB without colour management");
    let context = GlobalContext::new();
    let profile = Profile::new_lab2_context(context, &D50).map_err(failed)?;
    let transform: Transform<[u8; 4], [u8; 3]> =
        Transform::new(&profile, LAB_V2_PADDED, &Profile::new_srgb(), PixelFormat::RGB_8, Intent::Perceptual).map_err(failed)?;
    // Signed chroma becomes unsigned, but not in planes.
    let flip = if layout.is_planar { 0 } else { 0x80 };
    let mut padded = vec![[0; 4]; layout.width as usize];
    let mut rgb = vec![[0; 3]; layout.width as usize];
    for row in samples.chunks_exact_mut(layout.width as usize * 3) {
        for (into, from) in padded.iter_mut().zip(row.chunks_exact(3)) {
            *into = [from[0], from[1] ^ flip, from[2] ^ flip, 255];
        }
        transform.transform_pixels(&padded, &mut rgb);
        row.copy_from_slice(rgb.as_flattened());
    }
    Ok(samples)
}

const HALF: i32 = 1 << 15;

/// The white of profile connection spaces, from X 0.9642, Y 1, Z 0.8249.
const D50: CIExyY = CIExyY { x: 0.9642 / 2.7891, y: 1.0 / 2.7891, Y: 1.0 };

/// Colour space 30 (LAB of ICC version 2), three channels of one byte, one byte that does not count.
const LAB_V2_PADDED: PixelFormat = PixelFormat(30 << 16 | 1 << 7 | 3 << 3 | 1);

const COLOR_MAP: u16 = 320;
const YCBCR_COEFFICIENTS: u16 = 529;
const REFERENCE_BLACK_WHITE: u16 = 532;
