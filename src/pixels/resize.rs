//! Pillow's `Image.resize`, bit for bit.

use super::{Picture, Resample};

/// A horizontal and a vertical pass, each only where that side changes.
pub fn resize(picture: &Picture, width: u32, height: u32, resample: Resample) -> Picture {
    let mut now = picture.clone();
    let vertical_first = goes_vertically_first(picture, width, height);
    if vertical_first {
        now = vertical(&now, height, resample);
    }
    if width != now.width {
        now = horizontal(&now, width, resample);
    }
    if height != now.height {
        now = vertical(&now, height, resample);
    }
    now
}

/// Pillow 13 starts with the rows where that takes away more than twice as many of them as there are columns to take away. Rounding
/// between the passes makes the order visible.
fn goes_vertically_first(picture: &Picture, width: u32, height: u32) -> bool {
    let rows = i64::from(picture.height) - i64::from(height);
    let columns = i64::from(picture.width) - i64::from(width);
    rows > 0 && rows > 2 * columns
}

// Pillow rounds to 8 bit between the two passes. So do we, or pixels differ by one.
const FRACTION_BITS: u32 = 32 - 8 - 2;

/// The source pixels of one target pixel and their weights in fixed point.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

fn windows(from: u32, to: u32, resample: Resample) -> Vec<Window> {
    let scale = f64::from(from) / f64::from(to);
    let stretch = scale.max(1.0);
    let support = resample.support() * stretch;
    (0..to)
        .map(|target| {
            let centre = (f64::from(target) + 0.5) * scale;
            let start = ((centre - support + 0.5) as i64).max(0);
            let end = ((centre + support + 0.5) as i64).min(i64::from(from));
            let raw: Vec<f64> =
                (start..end).map(|source| resample.weight((source as f64 - centre + 0.5) * (1.0 / stretch))).collect();
            let total: f64 = raw.iter().sum();
            Window { start: start as usize, weights: raw.iter().map(|w| fixed(w / total)).collect() }
        })
        .collect()
}

fn fixed(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << FRACTION_BITS);
    (if scaled < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

fn rounded(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

fn horizontal(picture: &Picture, width: u32, resample: Resample) -> Picture {
    let windows = windows(picture.width, width, resample);
    let mut rgb = Vec::with_capacity((width * picture.height * 3) as usize);
    for row in picture.rgb.chunks_exact(picture.width as usize * 3) {
        for window in &windows {
            let mut sum = [1 << (FRACTION_BITS - 1); 3];
            for (pixel, weight) in row[window.start * 3..].chunks_exact(3).zip(&window.weights) {
                for channel in 0..3 {
                    sum[channel] += i32::from(pixel[channel]) * weight;
                }
            }
            rgb.extend(sum.map(rounded));
        }
    }
    Picture { width, height: picture.height, rgb }
}

fn vertical(picture: &Picture, height: u32, resample: Resample) -> Picture {
    let stride = picture.width as usize * 3;
    let mut rgb = Vec::with_capacity(stride * height as usize);
    let mut sums = vec![0i32; stride];
    for window in windows(picture.height, height, resample) {
        sums.fill(1 << (FRACTION_BITS - 1));
        for (row, weight) in picture.rgb[window.start * stride..].chunks_exact(stride).zip(&window.weights) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        rgb.extend(sums.iter().map(|s| rounded(*s)));
    }
    Picture { width: picture.width, height, rgb }
}

impl Resample {
    fn support(self) -> f64 {
        match self {
            Self::Bicubic => 2.0,
            Self::Bilinear => 1.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Self::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => ((x - 5.0) * x + 8.0) * x * -0.5 + 2.0,
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Lanczos if x < 3.0 => sinc(x) * sinc(x / 3.0),
            _ => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) }
}
