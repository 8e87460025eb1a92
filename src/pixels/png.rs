//! PNG. The chunks are read as Pillow reads them, which decides what is transparent, what is forgiven and which way is up; the `png` crate
//! gets the pixels alone.

use std::io::{Cursor, Read};

use flate2::read::ZlibDecoder;
use png::{DecodeOptions, Decoder, DecodingError};

use super::orientation::Metadata;
use super::{Limits, Picture, PictureWarning, PixelsError};

const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
/// Longest compressed text that Pillow reads.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// Decodes a file that begins with the signature; of an animation, the picture that stands for it.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    let chunks = Chunks::read(bytes)?;
    limits.check(chunks.header.width, chunks.header.height)?;
    let mut picture = chunks.paint(limits)?.turned(chunks.metadata().orientation());
    if !chunks.ended {
        picture.warnings.push(PictureWarning::NoEnd);
    }
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
}

/// What could be read of a chunk.
struct Chunk<'a> {
    kind: [u8; 4],
    data: &'a [u8],
    is_whole: bool,
    has_right_sum: bool,
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
        let has_right_sum = sum == found.sum().to_be_bytes();
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
            if !chunk.is_whole || !chunk.has_right_sum {
                return Err(damaged("the sum of a chunk is wrong"));
            }
            found.take(&chunk)?;
            rest = chunk.behind;
        }
        while let Some(chunk) = Chunk::first(rest).filter(|chunk| &chunk.kind == b"IDAT") {
            found.data.push(chunk.data);
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

    fn paint(&self, limits: &Limits) -> Result<Picture, PixelsError> {
        let (width, height) = (self.header.width, self.header.height);
        let n_pixels = width as usize * height as usize;
        let mut picture = Picture::from_rgb(width, height, vec![0; n_pixels * 3]);
        let has_alpha = self.header.colour >= GREY_ALPHA || self.transparency.is_some();
        let mut alpha = vec![0; if has_alpha { n_pixels } else { 0 }];
        let paints = self.paints();
        let mut options = DecodeOptions::default();
        options.set_ignore_checksums(true);
        let mut decoder = Decoder::new_with_options(Cursor::new(self.pixels_alone()), options);
        decoder.set_limits(png::Limits { bytes: limits.max_pixels.saturating_mul(16) as usize });
        let mut reader = decoder.read_info().map_err(broken)?;
        for &[left, top, step, down] in self.header.passes() {
            for y in (top..height).step_by(down as usize).take_while(|_| left < width) {
                let row = reader.next_row().map_err(broken)?.ok_or_else(|| damaged("rows are missing"))?;
                let samples = self.header.samples(row.data());
                for (x, pixel) in (left..width).step_by(step as usize).zip(samples.chunks_exact(self.header.n_channels())) {
                    let place = y as usize * width as usize + x as usize;
                    let [red, green, blue, opacity] = paints.of(pixel);
                    picture.rgb[place * 3..][..3].copy_from_slice(&[red, green, blue]);
                    if has_alpha {
                        alpha[place] = opacity;
                    }
                }
            }
        }
        picture.alpha = has_alpha.then_some(alpha);
        Ok(picture)
    }

    /// Header and data in a file of their own. What lies in a palette passes as grey: only its indices are wanted.
    fn pixels_alone(&self) -> Vec<u8> {
        let Header { width, height, depth, colour, interlaced } = &self.header;
        let colour = if *colour == PALETTE { GREY } else { *colour };
        let mut header = [width.to_be_bytes(), height.to_be_bytes()].concat();
        header.extend([*depth, colour, 0, 0, u8::from(*interlaced)]);
        let mut file = SIGNATURE.to_vec();
        for (kind, data) in [(b"IHDR", &header[..]), (b"IDAT", &self.data.concat()), (b"IEND", &[])] {
            file.extend((data.len() as u32).to_be_bytes());
            file.extend(kind);
            file.extend(data);
            file.extend([0; 4]);
        }
        file
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
    if digits.len() % 2 == 0 { pairs.collect() } else { None }
}

fn damaged(reason: &str) -> PixelsError {
    PixelsError::Damaged(reason.into())
}

fn broken(error: DecodingError) -> PixelsError {
    PixelsError::Damaged(error.into())
}
