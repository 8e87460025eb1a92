//! Which way up a picture is, as `exif_transpose` of Pillow finds it: EXIF first, XMP where that says nothing.

use super::Picture;

const ORIENTATION: u64 = 274;

/// What a file says beside its pixels.
#[derive(Debug, Default)]
pub struct Metadata {
    /// With or without the prefix that JPEG gives it.
    pub exif: Option<Vec<u8>>,
    pub xmp: Option<Vec<u8>>,
}

impl Metadata {
    /// 1 to 8; 1, upright, where nothing is said or another value.
    pub fn orientation(&self) -> u8 {
        let stored = self.exif.as_deref().and_then(stored_in_exif);
        upright_or(stored.or_else(|| self.xmp.as_deref().and_then(stored_in_xmp)))
    }
}

fn upright_or(said: Option<f64>) -> u8 {
    (2..=8u8).find(|known| said == Some(f64::from(*known))).unwrap_or(1)
}

/// The value as a number, whatever its type; of several values the first.
fn stored_in_exif(exif: &[u8]) -> Option<f64> {
    let bare = |exif| <[u8]>::strip_prefix(exif, b"Exif\0\0").unwrap_or(exif);
    let tiff = Tiff::new(bare(bare(exif)))?;
    let (kind, value) = tiff.entry(ORIENTATION)?;
    tiff.value(kind, value)
}

fn size_of(kind: u64) -> Option<u64> {
    match kind {
        1 | 2 | 6 | 7 => Some(1),
        3 | 8 => Some(2),
        4 | 9 | 11 | 13 => Some(4),
        5 | 10 | 12 | 16 => Some(8),
        _ => None,
    }
}

struct Tiff<'a> {
    bytes: &'a [u8],
    big_endian: bool,
}

impl<'a> Tiff<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first_chunk::<4>()? {
            b"MM\0*" | b"MM*\0" => Some(Self { bytes, big_endian: true }),
            b"II*\0" | b"II\0*" => Some(Self { bytes, big_endian: false }),
            _ => None,
        }
    }

    /// Type and value of the first usable entry of the first directory. Pillow reads no further where a value lies outside.
    fn entry(&self, wanted: u64) -> Option<(u64, &'a [u8])> {
        let directory = number(self.big_endian, self.bytes.get(4..8)?) as usize;
        let short = |at: usize| Some(number(self.big_endian, self.bytes.get(at..)?.get(..2)?));
        let long = |at: usize| Some(number(self.big_endian, self.bytes.get(at..)?.get(..4)?));
        let mut n_read = 0;
        for at in (0..short(directory)? as usize).map(|entry| directory.saturating_add(2 + 12 * entry)) {
            let (tag, kind, count, place) = (short(at)?, short(at + 2)?, long(at + 4)?, long(at + 8)? as usize);
            let Some(size) = size_of(kind).map(|size| size * count) else { continue };
            let mut value = self.bytes.get(at + 8..)?.get(..4.min(size as usize))?;
            if size > 4 {
                n_read += size;
                if n_read > self.bytes.len() as u64 {
                    continue;
                }
                value = self.bytes.get(place..)?.get(..size as usize)?;
            }
            if tag == wanted && size > 0 {
                return Some((kind, value));
            }
        }
        None
    }

    /// Bytes and texts are no numbers, even where they hold one.
    fn value(&self, kind: u64, value: &[u8]) -> Option<f64> {
        let unsigned = |range: std::ops::Range<usize>| Some(number(self.big_endian, value.get(range)?));
        let signed = |range| Some(f64::from(unsigned(range)? as u32 as i32));
        Some(match kind {
            3 => unsigned(0..2)? as f64,
            4 | 13 => unsigned(0..4)? as f64,
            5 => unsigned(0..4)? as f64 / unsigned(4..8)? as f64,
            6 => f64::from(unsigned(0..1)? as u8 as i8),
            8 => f64::from(unsigned(0..2)? as u16 as i16),
            9 => signed(0..4)?,
            10 => signed(0..4)? / signed(4..8)?,
            11 => f64::from(f32::from_bits(unsigned(0..4)? as u32)),
            12 => f64::from_bits(unsigned(0..8)?),
            16 => unsigned(0..8)? as f64,
            _ => f64::NAN,
        })
    }
}

fn number(big_endian: bool, bytes: &[u8]) -> u64 {
    let join = |whole, byte: &u8| whole << 8 | u64::from(*byte);
    if big_endian { bytes.iter().fold(0, join) } else { bytes.iter().rev().fold(0, join) }
}

/// As an attribute or as an element.
fn stored_in_xmp(xmp: &[u8]) -> Option<f64> {
    const NAME: &[u8] = b"tiff:Orientation";
    let names = (0..xmp.len()).filter(|at| xmp[*at..].starts_with(NAME));
    names.into_iter().find_map(|at| {
        let rest = &xmp[at + NAME.len()..];
        let digit = rest.strip_prefix(b"=\"").or_else(|| rest.strip_prefix(b">"))?.first()?;
        digit.is_ascii_digit().then(|| f64::from(digit - b'0'))
    })
}

impl Picture {
    /// Upright, from one of the eight ways that EXIF numbers.
    pub(super) fn turned(mut self, orientation: u8) -> Self {
        if !(2..=8).contains(&orientation) {
            return self;
        }
        let (width, height) = (self.width as usize, self.height as usize);
        self.rgb = turned(self.rgb.as_chunks::<3>().0, width, height, orientation).into_flattened();
        self.alpha = self.alpha.map(|alpha| turned(&alpha, width, height, orientation));
        if orientation >= 5 {
            (self.width, self.height) = (self.height, self.width);
        }
        self
    }
}

fn turned<T: Copy + Default>(pixels: &[T], width: usize, height: usize, orientation: u8) -> Vec<T> {
    let (rightmost_first, lowest_first) = (matches!(orientation, 2 | 3 | 7 | 8), matches!(orientation, 3 | 4 | 6 | 7));
    let place = |at: usize, length: usize, from_the_end: bool| if from_the_end { length - 1 - at } else { at };
    let mut turned = vec![T::default(); pixels.len()];
    if orientation < 5 {
        for (y, row) in pixels.chunks_exact(width).enumerate() {
            let into = &mut turned[place(y, height, lowest_first) * width..][..width];
            into.copy_from_slice(row);
            if rightmost_first {
                into.reverse();
            }
        }
        return turned;
    }
    // Column by column through a few rows, which stay in the cache: one row at a time takes five times as long.
    for (n, rows) in pixels.chunks(STRIP * width).enumerate() {
        for x in 0..width {
            let into = &mut turned[place(x, width, rightmost_first) * height..][..height];
            let column = rows[x..].iter().step_by(width);
            if lowest_first {
                into[..height - n * STRIP].iter_mut().rev().zip(column).for_each(|(into, pixel)| *into = *pixel);
            } else {
                into[n * STRIP..].iter_mut().zip(column).for_each(|(into, pixel)| *into = *pixel);
            }
        }
    }
    turned
}

const STRIP: usize = 32;
