//! Pillow's `Image.resize`, bit for bit.

use std::borrow::Cow;
use std::ops::Range;

use super::{Picture, Resample};

/// Three bytes a pixel, row by row.
pub struct Rgb<'a> {
    pub width: u32,
    pub rgb: Cow<'a, [u8]>,
}

/// Size of the resized picture, and which part of it is wanted.
pub struct Target {
    pub width: u64,
    pub height: u64,
    pub columns: Range<u64>,
    pub rows: Range<u64>,
}

/// The whole picture, without transparency.
pub fn resize(picture: &Picture, width: u32, height: u32, resample: Resample) -> Picture {
    let (columns, rows) = (0..u64::from(width), 0..u64::from(height));
    let target = Target { width: columns.end, height: rows.end, columns, rows };
    let source = Rgb { width: picture.width, rgb: Cow::Borrowed(&picture.rgb) };
    Picture::from_rgb(width, height, resize_part(&source, &target, resample))
}

/// A horizontal and a vertical pass. Only what the wanted part needs is computed: a long side may be longer than memory.
pub fn resize_part(source: &Rgb, target: &Target, resample: Resample) -> Vec<u8> {
    let height = (source.rgb.len() / 3 / source.width as usize) as u32;
    let columns = windows(source.width, target.width, &target.columns, resample);
    let rows = windows(height, target.height, &target.rows, resample);
    if goes_vertically_first((source.width, height), target) {
        return horizontal(&vertical(source, &rows, 0), &columns, 0..rows.len()).rgb.into_owned();
    }
    let first = rows.iter().map(|window| window.start).min().unwrap_or(0);
    let end = rows.iter().map(|window| window.start + window.weights.len()).max().unwrap_or(0);
    vertical(&horizontal(source, &columns, first..end), &rows, first).rgb.into_owned()
}

/// Pillow 13 starts with the rows where that takes away more than twice as many of them as there are columns to take away. Rounding
/// between the passes makes the order visible.
fn goes_vertically_first(source: (u32, u32), target: &Target) -> bool {
    let rows = i64::from(source.1) - target.height as i64;
    let columns = i64::from(source.0) - target.width as i64;
    rows > 0 && rows > 2 * columns
}

// Pillow rounds to 8 bit between the two passes. So do we, or pixels differ by one.
const FRACTION_BITS: u32 = 32 - 8 - 2;

/// The source pixels of one target pixel and their weights in fixed point.
struct Window {
    start: usize,
    weights: Vec<i32>,
}

/// Where a side keeps its length, these are the pixels themselves.
fn windows(from: u32, to: u64, wanted: &Range<u64>, resample: Resample) -> Vec<Window> {
    let scale = f64::from(from) / to as f64;
    let stretch = scale.max(1.0);
    let support = resample.support() * stretch;
    let window = |target: u64| {
        let centre = (target as f64 + 0.5) * scale;
        let start = ((centre - support + 0.5) as i64).max(0);
        let end = ((centre + support + 0.5) as i64).min(i64::from(from));
        let raw: Vec<f64> = (start..end).map(|source| resample.weight((source as f64 - centre + 0.5) * (1.0 / stretch))).collect();
        let total: f64 = raw.iter().sum();
        Window { start: start as usize, weights: raw.iter().map(|w| fixed(w / total)).collect() }
    };
    wanted.clone().map(window).collect()
}

fn fixed(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << FRACTION_BITS);
    (if scaled < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
}

fn rounded(sum: i32) -> u8 {
    (sum >> FRACTION_BITS).clamp(0, 255) as u8
}

fn horizontal(source: &Rgb, windows: &[Window], rows: Range<usize>) -> Rgb<'static> {
    let stride = source.width as usize * 3;
    let mut rgb = Vec::with_capacity(windows.len() * rows.len() * 3);
    for row in source.rgb[rows.start * stride..rows.end * stride].chunks_exact(stride) {
        for window in windows {
            let [mut red, mut green, mut blue] = [1 << (FRACTION_BITS - 1); 3];
            for ([r, g, b], &weight) in row.as_chunks::<3>().0[window.start..].iter().zip(&window.weights) {
                red += i32::from(*r) * weight;
                green += i32::from(*g) * weight;
                blue += i32::from(*b) * weight;
            }
            rgb.extend([rounded(red), rounded(green), rounded(blue)]);
        }
    }
    Rgb { width: windows.len() as u32, rgb: Cow::Owned(rgb) }
}

/// `first` is the row that `source` begins with.
fn vertical(source: &Rgb, windows: &[Window], first: usize) -> Rgb<'static> {
    let stride = source.width as usize * 3;
    let mut rgb = Vec::with_capacity(stride * windows.len());
    let mut sums = vec![0i32; stride];
    for window in windows {
        sums.fill(1 << (FRACTION_BITS - 1));
        for (row, &weight) in source.rgb[(window.start - first) * stride..].chunks_exact(stride).zip(&window.weights) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        rgb.extend(sums.iter().map(|s| rounded(*s)));
    }
    Rgb { width: source.width, rgb: Cow::Owned(rgb) }
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
