//! PBM, PGM, PPM and grey PFM, binary and in letters, as Pillow reads them.

use super::{Limits, Picture, PixelsError};

/// Decodes a file that begins with `P1` to `P6` or `Pf`; anything else is no picture.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    let mut rest = Letters(bytes);
    let kind = rest.kind().ok_or(PixelsError::NotAPicture)?;
    let header = "the header is no PNM header";
    let number = |word: Option<&str>| word.and_then(|word| word.parse::<u32>().ok()).ok_or_else(|| damaged(header));
    let (width, height) = (number(rest.word().as_deref())?, number(rest.word().as_deref())?);
    limits.check(width, height)?;
    let n_pixels = width as usize * height as usize;
    let short = || damaged("rows are missing");
    let greys = |greys: Vec<u8>| greys.into_iter().flat_map(|grey| [grey; 3]).collect();
    let rgb = match kind {
        b'1' => greys(rest.bits(n_pixels).ok_or_else(short)?),
        b'4' => greys(unpacked(rest.0, width as usize, height as usize).ok_or_else(short)?),
        b'f' => {
            let scale = rest.word().and_then(|word| word.parse::<f64>().ok()).filter(|scale| *scale != 0.0 && scale.is_finite());
            greys(floats(rest.0, width as usize, n_pixels, scale.ok_or_else(|| damaged(header))?).ok_or_else(short)?)
        }
        _ => {
            let most = number(rest.word().as_deref())?;
            if !(1..=65535).contains(&most) {
                return Err(damaged(header));
            }
            let n_channels = if matches!(kind, b'3' | b'6') { 3 } else { 1 };
            let values =
                if kind <= b'3' { rest.numbers(n_pixels * n_channels, most) } else { stored(rest.0, n_pixels * n_channels, most) };
            let values = scaled(values.ok_or_else(short)?, most, n_channels);
            if n_channels == 3 { values } else { greys(values) }
        }
    };
    Ok(Picture::from_rgb(width, height, rgb))
}

/// Colours scale to 8 bits, greys of more than 8 to 16, where Pillow clips what is above 255.
fn scaled(values: Vec<u32>, most: u32, n_channels: usize) -> Vec<u8> {
    let top = if n_channels == 1 && most > 255 { 65535.0 } else { 255.0 };
    let scale = |value: u32| (f64::from(value) / f64::from(most) * top).round_ties_even().min(255.0) as u8;
    values.into_iter().map(scale).collect()
}

/// One or two bytes a value.
fn stored(data: &[u8], n_values: usize, most: u32) -> Option<Vec<u32>> {
    if most < 256 {
        return Some(data.get(..n_values)?.iter().map(|byte| u32::from(*byte)).collect());
    }
    Some(data.get(..n_values * 2)?.as_chunks().0.iter().map(|pair| u32::from(u16::from_be_bytes(*pair))).collect())
}

/// A set bit is black.
fn unpacked(data: &[u8], width: usize, height: usize) -> Option<Vec<u8>> {
    let rows = data.get(..width.div_ceil(8) * height)?.chunks_exact(width.div_ceil(8).max(1));
    let bit = |row: &[u8], x: usize| if row[x / 8] & (0x80 >> (x % 8)) > 0 { 0 } else { 255 };
    Some(rows.flat_map(|row| (0..width).map(move |x| bit(row, x))).collect())
}

/// The last row comes first; a negative scale says that the last byte does too.
fn floats(data: &[u8], width: usize, n_pixels: usize, scale: f64) -> Option<Vec<u8>> {
    let rows = data.get(..n_pixels * 4)?.as_chunks().0.chunks_exact(width.max(1)).rev();
    let value = |bytes: &[u8; 4]| if scale < 0.0 { f32::from_le_bytes(*bytes) } else { f32::from_be_bytes(*bytes) };
    Some(rows.flatten().map(|bytes| value(bytes) as u8).collect())
}

/// What is left to read.
struct Letters<'a>(&'a [u8]);

impl Letters<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    /// The letter behind `P`.
    fn kind(&mut self) -> Option<u8> {
        let &[b'P', kind, behind, ..] = self.0 else { return None };
        self.0 = &self.0[3..];
        (matches!(kind, b'1'..=b'6' | b'f') && is_space(behind)).then_some(kind)
    }

    /// Up to a space, which is read too. What follows a `#` in its line does not count.
    fn word(&mut self) -> Option<String> {
        let mut word = String::new();
        while word.len() <= 10 {
            match self.byte() {
                None => break,
                Some(b'#') => while self.byte().is_some_and(|byte| !matches!(byte, b'\r' | b'\n')) {},
                Some(byte) if is_space(byte) && word.is_empty() => {}
                Some(byte) if is_space(byte) => break,
                Some(byte) => word.push(char::from(byte)),
            }
        }
        (!word.is_empty() && word.len() <= 10).then_some(word)
    }

    fn numbers(&mut self, n_values: usize, most: u32) -> Option<Vec<u32>> {
        (0..n_values).map(|_| self.word()?.parse().ok().filter(|value| *value <= most)).collect()
    }

    /// Digits that need no space between them; a 1 is black.
    fn bits(&mut self, n_pixels: usize) -> Option<Vec<u8>> {
        let mut bits = Vec::new();
        while bits.len() < n_pixels {
            match self.byte()? {
                b'0' => bits.push(255),
                b'1' => bits.push(0),
                b'#' => while self.byte().is_some_and(|byte| !matches!(byte, b'\r' | b'\n')) {},
                space if is_space(space) => {}
                _ => return None,
            }
        }
        Some(bits)
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | 0x0B | 0x0C | b'\r')
}

fn damaged(reason: &str) -> PixelsError {
    PixelsError::Damaged(reason.into())
}
