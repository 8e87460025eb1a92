//! PNG, read as Pillow reads it, which decides what is transparent, what is forgiven and which way is up.

use std::io::Read;

use flate2::read::ZlibDecoder;
use flate2::{Decompress, FlushDecompress, Status};

use super::orientation::Metadata;
use super::{Limits, Picture, PictureWarning, PixelsError};

const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
/// Longest compressed text that Pillow reads.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// Decodes a file that begins with the signature; of an animation, the picture that stands for it.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    let chunks = Chunks::read(bytes)?;
    limits.check(chunks.header.width, chunks.header.height)?;
    let mut picture = chunks.paint()?.turned(chunks.metadata().orientation());
    picture.warnings.extend((!chunks.ended).then_some(PictureWarning::NoEnd));
    picture.warnings.extend(chunks.has_wrong_sum.then_some(PictureWarning::WrongSum));
    Ok(picture)
}

/// What `IHDR` says.
#[derive(Default)]
struct Header {
    width: u32,
    height: u32,
    depth: u8,
    colour: u8,
    interlaced: bool,
}

const GREY: u8 = 0;
const RGB: u8 = 2;
const PALETTE: u8 = 3;
const GREY_ALPHA: u8 = 4;

#[derive(Default)]
struct Chunks<'a> {
    header: Header,
    palette: &'a [u8],
    transparency: Option<&'a [u8]>,
    /// The first run of `IDAT`.
    data: Vec<&'a [u8]>,
    /// Keys and values.
    texts: Vec<(&'a [u8], Vec<u8>)>,
    /// Whether `IEND` was reached.
    ended: bool,
    has_wrong_sum: bool,
}

/// What could be read of a chunk.
struct Chunk<'a> {
    kind: [u8; 4],
    data: &'a [u8],
    is_whole: bool,
    /// Nothing where the file ends before.
    has_right_sum: Option<bool>,
    behind: &'a [u8],
}

impl<'a> Chunk<'a> {
    /// Nothing where there is no chunk.
    fn first(bytes: &'a [u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (kind, rest) = rest.split_first_chunk::<4>()?;
        if !kind.iter().all(|letter| letter.is_ascii_alphanumeric() || *letter == b'_') {
            return None;
        }
        let length = u32::from_be_bytes(*length) as usize;
        let (data, sum) = rest.split_at(length.min(rest.len()));
        let (sum, behind) = sum.split_at(sum.len().min(4));
        let mut found = flate2::Crc::new();
        found.update(kind);
        found.update(data);
        let has_right_sum = sum.first_chunk().map(|sum| u32::from_be_bytes(*sum) == found.sum());
        Some(Self { kind: *kind, data, is_whole: data.len() == length, has_right_sum, behind })
    }
}

impl<'a> Chunks<'a> {
    /// Sums count before the pixels only.
    fn read(bytes: &'a [u8]) -> Result<Self, PixelsError> {
        let mut found = Self::default();
        let mut rest = bytes.strip_prefix(SIGNATURE).ok_or(PixelsError::NotAPicture)?;
        loop {
            let chunk = Chunk::first(rest).ok_or_else(|| damaged("there are no pixels"))?;
            if &chunk.kind == b"IDAT" {
                break;
            }
            if !chunk.is_whole || chunk.has_right_sum != Some(true) {
                return Err(damaged("the sum of a chunk is wrong"));
            }
            found.take(&chunk)?;
            rest = chunk.behind;
        }
        while let Some(chunk) = Chunk::first(rest).filter(|chunk| &chunk.kind == b"IDAT") {
            found.data.push(chunk.data);
            found.has_wrong_sum |= chunk.has_right_sum == Some(false);
            rest = chunk.behind;
        }
        while let Some(chunk) = Chunk::first(rest) {
            found.ended = &chunk.kind == b"IEND";
            if found.ended {
                break;
            }
            if !chunk.is_whole {
                return Err(damaged("a chunk is cut off"));
            }
            found.has_wrong_sum |= chunk.has_right_sum == Some(false);
            if &chunk.kind != b"PLTE" {
                found.take(&chunk)?;
            }
            rest = chunk.behind;
        }
        Ok(found)
    }

    fn take(&mut self, chunk: &Chunk<'a>) -> Result<(), PixelsError> {
        let data = chunk.data;
        match &chunk.kind {
            b"IHDR" => self.header = Header::read(data).ok_or_else(|| damaged("the header is no PNG header"))?,
            b"IEND" => return Err(damaged("there are no pixels")),
            b"PLTE" => self.palette = data,
            b"tRNS" => self.transparency = self.header.transparency(data)?,
            b"eXIf" => self.texts.push((b"exif", data.to_vec())),
            b"tEXt" | b"zTXt" | b"iTXt" => self.texts.extend(text(&chunk.kind, data)),
            _ => {}
        }
        Ok(())
    }

    fn metadata(&self) -> Metadata {
        let last = |key: &[u8]| self.texts.iter().rev().find(|(found, _)| *found == key).map(|(_, value)| value.clone());
        let profile = || last(b"Raw profile type exif").and_then(|profile| unhexed(&profile));
        Metadata { exif: last(b"exif").or_else(profile), xmp: last(b"XML:com.adobe.xmp") }
    }

    fn paint(&self) -> Result<Picture, PixelsError> {
        let (width, height) = (self.header.width, self.header.height);
        let n_pixels = width as usize * height as usize;
        let mut picture = Picture::from_rgb(width, height, vec![0; n_pixels * 3]);
        let mut alpha = self.has_alpha().then(|| vec![0; n_pixels]);
        let (paints, mut rows) = (self.paints(), Rows::new(self.data.concat(), self.header.bytes_a_pixel()));
        for &[left, top, step, down] in self.header.passes().iter().filter(|pass| pass[0] < width) {
            rows.begin(self.header.bytes_a_row((width - left).div_ceil(step)));
            for y in (top..height).step_by(down as usize) {
                let Some(row) = rows.next()? else { break };
                let samples = self.header.samples(row);
                for (x, pixel) in (left..width).step_by(step as usize).zip(samples.chunks_exact(self.header.n_channels())) {
                    let place = y as usize * width as usize + x as usize;
                    let [red, green, blue, opacity] = paints.of(pixel);
                    picture.rgb[place * 3..][..3].copy_from_slice(&[red, green, blue]);
                    if let Some(alpha) = &mut alpha {
                        alpha[place] = opacity;
                    }
                }
            }
        }
        picture.alpha = alpha;
        picture.warnings.extend(rows.ended_early.then_some(PictureWarning::RowsMissing));
        Ok(picture)
    }

    fn has_alpha(&self) -> bool {
        self.header.colour >= GREY_ALPHA || self.transparency.is_some()
    }

    fn paints(&self) -> Paints {
        let transparency = self.transparency.unwrap_or_default();
        let low = |at: usize| transparency.get(at).copied().unwrap_or_default();
        match self.header.colour {
            // Pillow compares the low byte of a key with what became of the samples.
            GREY if self.header.depth == 1 => Paints::Grey(self.transparency.map(|key| if key[..2] == [0, 0] { 0 } else { 255 })),
            GREY => Paints::Grey(self.transparency.map(|_| low(1))),
            RGB => Paints::Rgb(self.transparency.map(|_| [low(1), low(3), low(5)])),
            PALETTE => {
                let mut entries = Box::new([[0, 0, 0, 255]; 256]);
                for (entry, colour) in entries.iter_mut().zip(self.palette.chunks_exact(3)) {
                    entry[..3].copy_from_slice(colour);
                }
                for (entry, alpha) in entries.iter_mut().zip(transparency) {
                    entry[3] = *alpha;
                }
                Paints::Palette(entries)
            }
            GREY_ALPHA => Paints::GreyAlpha,
            _ => Paints::Rgba,
        }
    }
}

/// Inflates and restores one row after the other.
struct Rows {
    inflate: Decompress,
    data: Vec<u8>,
    read: usize,
    bytes_a_pixel: usize,
    /// The row before, with its filter in front.
    last: Vec<u8>,
    row: Vec<u8>,
    ended_early: bool,
}

impl Rows {
    fn new(data: Vec<u8>, bytes_a_pixel: usize) -> Self {
        let inflate = Decompress::new(true);
        Self { inflate, data, read: 0, bytes_a_pixel, last: Vec::new(), row: Vec::new(), ended_early: false }
    }

    /// A pass whose rows have this many bytes.
    fn begin(&mut self, n_bytes: usize) {
        self.last = vec![0; n_bytes + 1];
        self.row = vec![0; n_bytes + 1];
    }

    /// Nothing where the data says that it ends between two rows, which Pillow lets pass.
    fn next(&mut self) -> Result<Option<&[u8]>, PixelsError> {
        std::mem::swap(&mut self.last, &mut self.row);
        let mut row = std::mem::take(&mut self.row);
        let (n_filled, ended) = self.inflate(&mut row)?;
        self.row = row;
        self.ended_early |= ended && n_filled == 0;
        if self.ended_early {
            return Ok(None);
        }
        if n_filled < self.row.len() || !unfilter(&mut self.row, &self.last, self.bytes_a_pixel) {
            return Err(damaged("rows are missing"));
        }
        Ok(Some(&self.row[1..]))
    }

    /// How many bytes came, and whether the data says that no more will.
    fn inflate(&mut self, into: &mut [u8]) -> Result<(usize, bool), PixelsError> {
        let mut n_filled = 0;
        loop {
            let before = (self.inflate.total_in(), self.inflate.total_out());
            let status = self
                .inflate
                .decompress(&self.data[self.read..], &mut into[n_filled..], FlushDecompress::None)
                .map_err(|error| PixelsError::Damaged(error.into()))?;
            let (n_in, n_out) = (self.inflate.total_in() - before.0, self.inflate.total_out() - before.1);
            self.read += n_in as usize;
            n_filled += n_out as usize;
            if status == Status::StreamEnd || n_filled == into.len() || (n_in, n_out) == (0, 0) {
                return Ok((n_filled, status == Status::StreamEnd));
            }
        }
    }
}

/// Whether there is such a filter.
fn unfilter(row: &mut [u8], last: &[u8], bytes_a_pixel: usize) -> bool {
    match bytes_a_pixel {
        1 => unfilter_pixels::<1>(row, last),
        2 => unfilter_pixels::<2>(row, last),
        3 => unfilter_pixels::<3>(row, last),
        4 => unfilter_pixels::<4>(row, last),
        6 => unfilter_pixels::<6>(row, last),
        _ => unfilter_pixels::<8>(row, last),
    }
}

fn unfilter_pixels<const N: usize>(row: &mut [u8], last: &[u8]) -> bool {
    let ([filter, row @ ..], [_, last @ ..]) = (row, last) else { return false };
    match filter {
        0 => {}
        1 => add::<N>(row, last, |left, _, _| left),
        2 => add::<N>(row, last, |_, above, _| above),
        3 => add::<N>(row, last, |left, above, _| u8::midpoint(left, above)),
        4 => add::<N>(row, last, paeth),
        _ => return false,
    }
    true
}

fn add<const N: usize>(row: &mut [u8], last: &[u8], predicted: impl Fn(u8, u8, u8) -> u8) {
    let (mut left, mut above_left) = ([0; N], [0; N]);
    for (pixel, above) in row.as_chunks_mut::<N>().0.iter_mut().zip(last.as_chunks::<N>().0) {
        for at in 0..N {
            pixel[at] = pixel[at].wrapping_add(predicted(left[at], above[at], above_left[at]));
        }
        (left, above_left) = (*pixel, *above);
    }
}

fn paeth(left: u8, above: u8, above_left: u8) -> u8 {
    let (a, b, c) = (i16::from(left), i16::from(above), i16::from(above_left));
    let (to_left, to_above, to_corner) = ((b - c).abs(), (a - c).abs(), (a + b - 2 * c).abs());
    if to_left <= to_above && to_left <= to_corner {
        left
    } else if to_above <= to_corner {
        above
    } else {
        above_left
    }
}

/// How samples become colour and opacity.
enum Paints {
    Grey(Option<u8>),
    Rgb(Option<[u8; 3]>),
    Palette(Box<[[u8; 4]; 256]>),
    GreyAlpha,
    Rgba,
}

impl Paints {
    fn of(&self, samples: &[u8]) -> [u8; 4] {
        match (self, samples) {
            (Self::Grey(key), &[grey]) => [grey, grey, grey, if *key == Some(grey) { 0 } else { 255 }],
            (Self::Rgb(key), &[r, g, b]) => [r, g, b, if *key == Some([r, g, b]) { 0 } else { 255 }],
            (Self::Palette(entries), &[index]) => entries[usize::from(index)],
            (Self::GreyAlpha, &[grey, alpha]) => [grey, grey, grey, alpha],
            (_, &[r, g, b, alpha]) => [r, g, b, alpha],
            _ => [0; 4],
        }
    }
}

impl Header {
    fn read(data: &[u8]) -> Option<Self> {
        let (width, rest) = data.split_first_chunk::<4>()?;
        let (height, rest) = rest.split_first_chunk::<4>()?;
        let &[depth, colour, _, filter, interlaced, ..] = rest else { return None };
        let known = match colour {
            GREY => matches!(depth, 1 | 2 | 4 | 8 | 16),
            PALETTE => matches!(depth, 1 | 2 | 4 | 8),
            RGB | GREY_ALPHA | 6 => matches!(depth, 8 | 16),
            _ => false,
        };
        let (width, height) = (u32::from_be_bytes(*width), u32::from_be_bytes(*height));
        (known && filter == 0).then_some(Self { width, height, depth, colour, interlaced: interlaced != 0 })
    }

    fn transparency<'a>(&self, data: &'a [u8]) -> Result<Option<&'a [u8]>, PixelsError> {
        let at_least = match self.colour {
            GREY => 2,
            RGB => 6,
            PALETTE => 0,
            _ => return Ok(None),
        };
        if data.len() < at_least { Err(damaged("the transparent colour is cut off")) } else { Ok(Some(data)) }
    }

    fn bytes_a_row(&self, n_pixels: u32) -> usize {
        (n_pixels as usize * self.n_channels() * usize::from(self.depth)).div_ceil(8)
    }

    fn bytes_a_pixel(&self) -> usize {
        self.bytes_a_row(1)
    }

    fn n_channels(&self) -> usize {
        match self.colour {
            GREY | PALETTE => 1,
            GREY_ALPHA => 2,
            RGB => 3,
            _ => 4,
        }
    }

    /// First column and row of each pass, and the steps between its columns and its rows.
    fn passes(&self) -> &'static [[u32; 4]] {
        const ADAM7: [[u32; 4]; 7] =
            [[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2]];
        if self.interlaced { &ADAM7 } else { &[[0, 0, 1, 1]] }
    }

    /// In 8 bits, indices as they are.
    fn samples(&self, row: &[u8]) -> Vec<u8> {
        match (self.depth, self.colour) {
            (8, _) => row.to_vec(),
            // Pillow clips here, where it scales everywhere else.
            (16, GREY) => row.as_chunks::<2>().0.iter().map(|[high, low]| if *high > 0 { 255 } else { *low }).collect(),
            (16, _) => row.iter().step_by(2).copied().collect(),
            (depth, colour) => {
                let most = (1 << depth) - 1;
                let scale = if colour == PALETTE { 1 } else { 255 / most };
                let places = (0..8 / depth).rev().map(|place| place * depth);
                row.iter().flat_map(|byte| places.clone().map(move |place| (byte >> place & most) * scale)).collect()
            }
        }
    }
}

/// Key and value.
fn text<'a>(kind: &[u8; 4], data: &'a [u8]) -> Option<(&'a [u8], Vec<u8>)> {
    let (key, rest) = split_at_zero(data)?;
    match kind {
        b"tEXt" => Some((key, rest.to_vec())),
        b"zTXt" => Some((key, inflated(rest.strip_prefix(&[0])?)?)),
        _ => {
            let (&[compressed, method], rest) = rest.split_first_chunk::<2>()?;
            let (_, value) = split_at_zero(split_at_zero(rest)?.1)?;
            match (compressed, method) {
                (0, _) => Some((key, value.to_vec())),
                (_, 0) => Some((key, inflated(value)?)),
                _ => None,
            }
        }
    }
}

fn split_at_zero(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = data.iter().position(|byte| *byte == 0)?;
    Some((&data[..at], &data[at + 1..]))
}

fn inflated(data: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    ZlibDecoder::new(data).take(MAX_TEXT_BYTES).read_to_end(&mut text).ok()?;
    Some(text)
}

/// Three lines of name and length, then hexadecimal digits in lines.
fn unhexed(profile: &[u8]) -> Option<Vec<u8>> {
    let digits: Vec<u8> =
        profile.split(|byte| *byte == b'\n').skip(3).flatten().copied().filter(|b| !b.is_ascii_whitespace()).collect();
    let pairs = digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    if digits.len().is_multiple_of(2) { pairs.collect() } else { None }
}

fn damaged(reason: &str) -> PixelsError {
    PixelsError::Damaged(reason.into())
}
