//! BMP, with the headers, layouts and compressions that Pillow knows.

use super::{Limits, Picture, PixelsError};

/// Decodes a file that begins with `BM`.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    let bitmap = Bitmap::read(bytes).ok_or_else(|| damaged("this kind of BMP is not known"))?;
    limits.check(bitmap.width, bitmap.height)?;
    bitmap.paint().ok_or_else(|| damaged("rows are missing"))
}

const PLAIN: u32 = 0;
const RUNS_OF_8_BITS: u32 = 1;
const RUNS_OF_4_BITS: u32 = 2;
const BIT_FIELDS: u32 = 3;

struct Bitmap<'a> {
    width: u32,
    height: u32,
    top_down: bool,
    /// Between two rows.
    stride: usize,
    compression: u32,
    samples: Samples,
    data: &'a [u8],
}

/// How bytes become colours.
enum Samples {
    /// So many bits an index.
    Indices(usize, Box<[[u8; 3]; 256]>),
    /// Two bytes: bits of green; blue lies below it and red above, five bits each.
    Packed(u32),
    /// So many bytes, and the places of red, green, blue and opacity among them.
    Bytes(usize, [usize; 3], Option<usize>),
}

impl<'a> Bitmap<'a> {
    fn read(file: &'a [u8]) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(*file.get(at..)?.first_chunk()?));
        let u16_at = |at: usize| Some(u32::from(u16::from_le_bytes(*file.get(at..)?.first_chunk()?)));
        let (offset, header_size) = (u32_at(10)? as usize, u32_at(14)? as usize);
        file.get(..14 + header_size)?;
        let (width, mut height, bits, compression, n_colours) = match header_size {
            12 => (u16_at(18)?, u16_at(20)?, u16_at(24)?, PLAIN, 0),
            40 | 52 | 56 | 64 | 108 | 124 => (u32_at(18)?, u32_at(22)?, u16_at(28)?, u32_at(30)?, u32_at(46)?),
            _ => return None,
        };
        let top_down = header_size > 12 && file[25] == 0xFF;
        height = if top_down { height.wrapping_neg() } else { height };
        let mut at = 14 + header_size;
        let mut masks = [0; 4];
        if compression == BIT_FIELDS {
            let n_masks = if header_size >= 56 { 4 } else { 3 };
            for (place, mask) in masks.iter_mut().enumerate().take(n_masks) {
                *mask = u32_at(54 + 4 * place)?;
            }
            at += if header_size == 40 { 12 } else { 0 };
        }
        let entry_size = if header_size == 12 { 3 } else { 4 };
        let n_colours = if n_colours == 0 { 1usize << bits.min(8) } else { n_colours as usize };
        let palette_at = at;
        let is_packed_close = offset == 14 + header_size && bits <= 8;
        at = if offset == 0 { at + if bits <= 8 { entry_size * n_colours } else { 0 } } else { offset };
        at += if is_packed_close { entry_size * n_colours } else { 0 };
        let stride = (width as usize * bits as usize).div_ceil(32) * 4;
        let samples = match (bits, compression) {
            (1 | 4 | 8, PLAIN | RUNS_OF_8_BITS | RUNS_OF_4_BITS) => {
                indexed(bits as usize, file.get(palette_at..)?, n_colours, entry_size)?
            }
            (16 | 24 | 32, PLAIN | RUNS_OF_8_BITS | RUNS_OF_4_BITS) => plain(bits),
            (16 | 24 | 32, BIT_FIELDS) => masked(bits, masks)?,
            _ => return None,
        };
        Some(Self { width, height, top_down, stride, compression, samples, data: file.get(at..)? })
    }

    fn runs(&self) -> Runs<'a> {
        let width = self.width as usize;
        let (n_wanted, of_4_bits) = (width * self.height as usize, self.compression == RUNS_OF_4_BITS);
        Runs { rest: self.data, width, n_wanted, of_4_bits, indices: Vec::new(), x: 0 }
    }

    fn paint(&self) -> Option<Picture> {
        let (width, height) = (self.width as usize, self.height as usize);
        let (data, stride, samples) = match (self.compression, &self.samples) {
            (RUNS_OF_8_BITS | RUNS_OF_4_BITS, Samples::Indices(_, palette)) => {
                (&self.runs().unrolled()[..], width, &Samples::Indices(8, palette.clone()))
            }
            (RUNS_OF_8_BITS | RUNS_OF_4_BITS, _) => return None,
            _ => (self.data, self.stride, &self.samples),
        };
        let row_size = samples.bytes_a_row(width);
        let has_alpha = matches!(samples, Samples::Bytes(_, _, Some(_)));
        let (mut rgb, mut alpha) = (Vec::with_capacity(width * height * 3), Vec::new());
        for y in 0..height {
            let stored = if self.top_down { y } else { height - 1 - y };
            // The last row may lack what fills it up.
            let row = data.get(stored * stride..)?.get(..row_size).filter(|_| row_size <= stride)?;
            samples.append(row, width, &mut rgb, &mut alpha);
        }
        let mut picture = Picture::from_rgb(self.width, self.height, rgb);
        picture.alpha = has_alpha.then_some(alpha);
        Some(picture)
    }
}

impl Samples {
    fn bytes_a_row(&self, width: usize) -> usize {
        match self {
            Self::Indices(bits, _) => (width * bits).div_ceil(8),
            Self::Packed(_) => width * 2,
            Self::Bytes(size, ..) => width * size,
        }
    }

    fn append(&self, row: &[u8], width: usize, rgb: &mut Vec<u8>, alpha: &mut Vec<u8>) {
        match self {
            Self::Indices(bits, palette) => {
                let index = |x: usize| row[x * bits / 8] >> (8 - bits - x * bits % 8) & (0xFF >> (8 - bits));
                rgb.extend((0..width).flat_map(|x| palette[usize::from(index(x))]));
            }
            Self::Packed(bits_of_green) => {
                let widened = |value: u32, bits: u32| (((value & ((1 << bits) - 1)) * 255) / ((1 << bits) - 1)) as u8;
                for pair in row.as_chunks::<2>().0 {
                    let pixel = u32::from(u16::from_le_bytes(*pair));
                    let (red, green) = (pixel >> (5 + bits_of_green), pixel >> 5);
                    rgb.extend([widened(red, 5), widened(green, *bits_of_green), widened(pixel, 5)]);
                }
            }
            Self::Bytes(size, colours, opacity) => {
                for pixel in row.chunks_exact(*size) {
                    rgb.extend(colours.map(|place| pixel[place]));
                    alpha.extend(opacity.map(|place| pixel[place]));
                }
            }
        }
    }
}

/// A palette of greys in order is none: what lies beyond its end is grey, not black.
fn indexed(bits: usize, file: &[u8], n_colours: usize, entry_size: usize) -> Option<Samples> {
    if n_colours > 256 {
        return None;
    }
    let stored = &file[..file.len().min(n_colours * entry_size)];
    let mut palette = Box::new([[0; 3]; 256]);
    for (entry, bgr) in palette.iter_mut().zip(stored.chunks(entry_size).filter_map(|entry| entry.first_chunk::<3>())) {
        *entry = [bgr[2], bgr[1], bgr[0]];
    }
    let greys: Box<[[u8; 3]; 256]> = Box::new(std::array::from_fn(|grey| [grey as u8; 3]));
    let is_grey = stored.len() == n_colours * entry_size
        && if n_colours == 2 { palette[..2] == [[0; 3], [255; 3]] } else { palette[..n_colours] == greys[..n_colours] };
    match (is_grey, n_colours) {
        // Pillow takes the bits of these for one and for eight, whatever the header says.
        (true, ..=2) => Some(Samples::Indices(1, palette)),
        (true, _) => Some(Samples::Indices(8, greys)),
        _ => Some(Samples::Indices(bits, palette)),
    }
}

fn plain(bits: u32) -> Samples {
    if bits == 16 { Samples::Packed(5) } else { Samples::Bytes(bits as usize / 8, [2, 1, 0], None) }
}

/// The layouts that Pillow knows.
fn masked(bits: u32, masks: [u32; 4]) -> Option<Samples> {
    match (bits, masks) {
        (16, [0xF800, 0x07E0, 0x001F, _]) => Some(Samples::Packed(6)),
        (16, [0x7C00, 0x03E0, 0x001F, _]) => Some(Samples::Packed(5)),
        (24, [0xFF_0000, 0xFF00, 0xFF, _]) => Some(plain(24)),
        (32, [0xFF_0000, 0xFF00, 0xFF, 0]) => Some(Samples::Bytes(4, [2, 1, 0], None)),
        (32, [0xFF00_0000, 0xFF_0000, 0xFF00, 0]) => Some(Samples::Bytes(4, [3, 2, 1], None)),
        (32, [0xFF00_0000, 0xFF00, 0xFF, 0]) => Some(Samples::Bytes(4, [3, 1, 0], None)),
        (32, [0xFF00_0000, 0xFF_0000, 0xFF00, 0xFF]) => Some(Samples::Bytes(4, [3, 2, 1], Some(0))),
        (32, [0xFF, 0xFF00, 0xFF_0000, 0xFF00_0000]) => Some(Samples::Bytes(4, [0, 1, 2], Some(3))),
        (32, [0xFF_0000, 0xFF00, 0xFF, 0xFF00_0000] | [0, 0, 0, 0]) => Some(Samples::Bytes(4, [2, 1, 0], Some(3))),
        (32, [0xFF00_0000, 0xFF00, 0xFF, 0xFF_0000]) => Some(Samples::Bytes(4, [3, 1, 0], Some(2))),
        _ => None,
    }
}

/// Indices of run lengths, one a byte. Runs that go beyond their row end with it.
struct Runs<'a> {
    rest: &'a [u8],
    width: usize,
    n_wanted: usize,
    of_4_bits: bool,
    indices: Vec<u8>,
    /// Where the next run begins in its row.
    x: usize,
}

impl<'a> Runs<'a> {
    fn unrolled(mut self) -> Vec<u8> {
        while self.indices.len() < self.n_wanted && self.step().is_some() {}
        self.indices
    }

    /// Nothing at the end.
    fn step(&mut self) -> Option<()> {
        match *self.take(2)? {
            [0, 0] => {
                self.indices.resize(self.indices.len().next_multiple_of(self.width), 0);
                self.x = 0;
            }
            [0, 1] => return None,
            [0, 2] => {
                let &[right, up] = self.take(2)? else { return None };
                let skipped = self.n_wanted.min(self.indices.len() + usize::from(right) + usize::from(up) * self.width);
                self.indices.resize(skipped, 0);
                self.x = skipped % self.width;
            }
            [0, n] => self.verbatim(usize::from(n))?,
            [n, value] => {
                let n = usize::from(n).min(self.width.saturating_sub(self.x));
                let pair = if self.of_4_bits { [value >> 4, value & 0xF] } else { [value; 2] };
                self.indices.extend((0..n).map(|k| pair[k % 2]));
                self.x += n;
            }
            _ => return None,
        }
        Some(())
    }

    /// What follows begins at an even place of the file.
    fn verbatim(&mut self, n: usize) -> Option<()> {
        let n_indices = n.min(self.n_wanted - self.indices.len());
        let stored = self.take(if self.of_4_bits { n_indices.div_ceil(2) } else { n_indices })?;
        if self.of_4_bits {
            self.indices.extend(stored.iter().flat_map(|pair| [pair >> 4, pair & 0xF]).take(n_indices));
        } else {
            self.indices.extend(stored);
        }
        self.x += n;
        self.rest = self.rest.get(stored.len() % 2..).unwrap_or_default();
        Some(())
    }

    fn take(&mut self, n_bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(n_bytes)?;
        self.rest = rest;
        Some(taken)
    }
}

fn damaged(reason: &str) -> PixelsError {
    PixelsError::Damaged(reason.into())
}
