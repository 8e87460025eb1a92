//! The first directory of a TIFF or BigTIFF file: tags and their numbers, read where they lie.

use super::TiffError;

/// A file's bytes and the numbers in them.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub bytes: &'a [u8],
    pub big_endian: bool,
}

/// The tags of the first picture.
pub struct Directory<'a> {
    pub source: Source<'a>,
    entries: Vec<(u16, Field<'a>)>,
}

/// The values of one tag.
#[derive(Clone, Copy)]
pub struct Field<'a> {
    source: Source<'a>,
    kind: u16,
    data: &'a [u8],
}

impl<'a> Source<'a> {
    pub fn number(self, at: u64, n_bytes: u64) -> Option<u64> {
        let start = usize::try_from(at).ok()?;
        let slice = self.bytes.get(start..start.checked_add(n_bytes as usize)?)?;
        Some(self.value(slice))
    }

    fn value(self, slice: &[u8]) -> u64 {
        let join = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        if self.big_endian { slice.iter().fold(0, join) } else { slice.iter().rev().fold(0, join) }
    }

    fn slice(self, at: u64, n_bytes: u64) -> Option<&'a [u8]> {
        self.bytes.get(usize::try_from(at).ok()?..usize::try_from(at.checked_add(n_bytes)?).ok()?)
    }
}

impl<'a> Directory<'a> {
    pub fn read(bytes: &'a [u8]) -> Result<Self, TiffError> {
        Self::first(bytes).ok_or(TiffError::Damaged("its directory is cut off"))
    }

    fn first(bytes: &'a [u8]) -> Option<Self> {
        let source = Source { bytes, big_endian: bytes.starts_with(b"MM") };
        let is_big = bytes.get(2..4)?.contains(&43);
        // BigTIFF widens counts and offsets to 8 bytes, and puts the width of an offset in front of the first.
        let (first_at, count_bytes, offset_bytes) = if is_big { (8, 8, 8) } else { (4, 2, 4) };
        let start = source.number(first_at, offset_bytes)?;
        let n_entries = source.number(start, count_bytes)?;
        let entry_bytes = 4 + 2 * offset_bytes;
        let table = source.slice(start.checked_add(count_bytes)?, n_entries.checked_mul(entry_bytes)?)?;
        let base = start + count_bytes;
        let entries = (0..n_entries.min(table.len() as u64 / entry_bytes))
            .filter_map(|entry| Self::entry(source, base + entry * entry_bytes, offset_bytes))
            .collect();
        Some(Self { source, entries })
    }

    /// Values of up to one offset's width stand in its place. What points outside the file is as if it were not there.
    fn entry(source: Source<'a>, at: u64, offset_bytes: u64) -> Option<(u16, Field<'a>)> {
        let tag = source.number(at, 2)? as u16;
        let kind = source.number(at + 2, 2)? as u16;
        let n_bytes = source.number(at + 4, offset_bytes)?.checked_mul(width(kind)?)?;
        let inline = at + 4 + offset_bytes;
        let place = if n_bytes <= offset_bytes { inline } else { source.number(inline, offset_bytes)? };
        Some((tag, Field { source, kind, data: source.slice(place, n_bytes)? }))
    }

    pub fn get(&self, tag: u16) -> Option<Field<'a>> {
        self.entries.iter().find(|(known, _)| *known == tag).map(|(_, field)| *field)
    }

    /// The first value of a tag.
    pub fn number(&self, tag: u16) -> Option<u64> {
        self.get(tag).and_then(|field| field.number(0))
    }
}

impl<'a> Field<'a> {
    pub fn len(&self) -> usize {
        width(self.kind).map_or(0, |bytes| self.data.len() / bytes as usize)
    }

    /// The file that the values stand in.
    pub fn file(&self) -> &'a [u8] {
        self.source.bytes
    }

    pub fn bytes(&self) -> &'a [u8] {
        self.data
    }

    pub fn number(&self, index: usize) -> Option<u64> {
        self.item(index).map(|slice| self.source.value(slice))
    }

    pub fn numbers(&self) -> impl Iterator<Item = u64> + use<'a> {
        let field = *self;
        (0..field.len()).filter_map(move |index| field.number(index))
    }

    /// Whole numbers, fractions and floats; nothing of bytes and texts.
    pub fn real(&self, index: usize) -> Option<f32> {
        let slice = self.item(index)?;
        Some(match self.kind {
            1 | 2 | 7 => return None,
            5 => {
                let (over, under) = slice.split_at(4);
                (self.source.value(over) as f64 / self.source.value(under) as f64) as f32
            }
            11 => f32::from_bits(self.source.value(slice) as u32),
            12 => f64::from_bits(self.source.value(slice)) as f32,
            _ => self.source.value(slice) as f32,
        })
    }

    fn item(&self, index: usize) -> Option<&'a [u8]> {
        self.data.chunks_exact(width(self.kind)? as usize).nth(index)
    }
}

/// Bytes of a value; the kinds are numbered in TIFF 6.0 section 2 and in BigTIFF.
fn width(kind: u16) -> Option<u64> {
    match kind {
        1 | 2 | 6 | 7 => Some(1),
        3 | 8 => Some(2),
        4 | 9 | 11 | 13 => Some(4),
        5 | 10 | 12 | 16 | 17 | 18 => Some(8),
        _ => None,
    }
}
