//! Which way up a picture is, as `exif_transpose` of Pillow finds it: EXIF first, XMP where that says nothing.

use super::Picture;

const ORIENTATION: u16 = 274;

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
        let said = stored.or_else(|| self.xmp.as_deref().and_then(stored_in_xmp)).unwrap_or(1.0);
        (2..=8u8).find(|known| f64::from(*known) == said).unwrap_or(1)
    }
}

/// The value as a number, whatever its type. The first usable entry counts, and of several values the first.
fn stored_in_exif(exif: &[u8]) -> Option<f64> {
    let mut tiff = exif;
    for _ in 0..2 {
        tiff = tiff.strip_prefix(b"Exif\0\0").unwrap_or(tiff);
    }
    let big_endian = match tiff.first_chunk::<4>()? {
        b"MM\0*" | b"MM*\0" => true,
        b"II*\0" | b"II\0*" => false,
        _ => return None,
    };
    let tiff = Tiff { bytes: tiff, big_endian };
    let directory = tiff.number::<4>(4)? as usize;
    let mut read = 0;
    for entry in 0..tiff.number::<2>(directory)? as usize {
        let at = directory.checked_add(2 + 12 * entry)?;
        let [tag, kind, count] = [tiff.number::<2>(at)?, tiff.number::<2>(at + 2)?, tiff.number::<4>(at + 4)?];
        tiff.number::<4>(at + 8)?;
        let Some(size) = size_of(kind).map(|size| size.saturating_mul(count)) else { continue };
        let mut value = at + 8;
        if size > 4 {
            read += size;
            if read > tiff.bytes.len() as u64 {
                continue;
            }
            value = tiff.number::<4>(at + 8)? as usize;
            // Pillow reads no further where a value lies outside.
            tiff.bytes.get(value..)?.get(..size as usize)?;
        }
        if tag == u64::from(ORIENTATION) && size > 0 {
            return tiff.value(kind, value);
        }
    }
    None
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

impl Tiff<'_> {
    /// Integer of `N` bytes.
    fn number<const N: usize>(&self, at: usize) -> Option<u64> {
        let bytes = self.bytes.get(at..)?.first_chunk::<N>()?;
        let join = |whole, byte: &u8| whole << 8 | u64::from(*byte);
        Some(if self.big_endian { bytes.iter().fold(0, join) } else { bytes.iter().rev().fold(0, join) })
    }

    /// Bytes and texts are no numbers, even where they hold one.
    fn value(&self, kind: u64, at: usize) -> Option<f64> {
        let signed = |at| Some(f64::from(self.number::<4>(at)? as u32 as i32));
        match kind {
            3 => Some(self.number::<2>(at)? as f64),
            4 | 13 => Some(self.number::<4>(at)? as f64),
            5 => Some(self.number::<4>(at)? as f64 / self.number::<4>(at + 4)? as f64),
            6 => Some(f64::from(self.number::<1>(at)? as u8 as i8)),
            8 => Some(f64::from(self.number::<2>(at)? as u16 as i16)),
            9 => signed(at),
            10 => Some(signed(at)? / signed(at + 4)?),
            11 => Some(f64::from(f32::from_bits(self.number::<4>(at)? as u32))),
            12 => Some(f64::from_bits(self.number::<8>(at)?)),
            16 => Some(self.number::<8>(at)? as f64),
            _ => Some(f64::NAN),
        }
    }
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

fn turned<T: Copy>(pixels: &[T], width: usize, height: usize, orientation: u8) -> Vec<T> {
    let (columns, rows) = if orientation >= 5 { (height, width) } else { (width, height) };
    let source = |x: usize, y: usize| match orientation {
        2 => (width - 1 - x, y),
        3 => (width - 1 - x, height - 1 - y),
        4 => (x, height - 1 - y),
        5 => (y, x),
        6 => (y, height - 1 - x),
        7 => (width - 1 - y, height - 1 - x),
        _ => (width - 1 - y, x),
    };
    let places = (0..rows).flat_map(|y| (0..columns).map(move |x| (x, y)));
    places.map(|(x, y)| source(x, y)).map(|(x, y)| pixels[y * width + x]).collect()
}
