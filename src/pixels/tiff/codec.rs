//! What a strip or tile is compressed with: bytes in, rows of bytes out, never more of them than are asked for.

use std::io::{self, Read};

use super::chunks::Place;
use super::directory::Directory;
use super::fax::{Fax, Scheme};
use super::jpeg;
use super::layout::{Colour, Layout, OLD_JPEG};
use super::{TiffError, layout::Sample};

/// The tags that decompression depends on.
pub struct Codec<'a> {
    compression: u64,
    pub predictor: Predictor,
    /// Columns and rows that share their chroma.
    pub subsampling: (u32, u32),
    is_reversed: bool,
    fax_options: u64,
    jpeg_tables: &'a [u8],
}

/// How samples are stored as differences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predictor {
    None,
    /// From the sample to the left.
    Horizontal,
    /// From the byte to the left, most significant bytes of the row first.
    FloatingPoint,
}

impl<'a> Codec<'a> {
    pub fn read(directory: &Directory<'a>, layout: &Layout) -> Result<Self, TiffError> {
        let compression = layout.compression;
        if let Some(name) = refused(compression, layout) {
            return Err(TiffError::Unsupported(name));
        }
        let shared = directory.get(YCBCR_SUBSAMPLING);
        let side = |index| shared.and_then(|field| field.number(index)).unwrap_or(2) as u32;
        let subsampling = (side(0), side(1));
        if layout.colour == Colour::YCbCr && ![1, 2, 4].contains(&subsampling.0) | ![1, 2, 4].contains(&subsampling.1) {
            return Err(TiffError::Unsupported(format!("YCbCr with {}×{} subsampling", subsampling.0, subsampling.1)));
        }
        let is_subsampled = layout.colour == Colour::YCbCr && subsampling != (1, 1);
        if is_subsampled && (compression == NO_COMPRESSION || layout.is_planar) {
            return Err(TiffError::unsupported("YCbCr with subsampling, uncompressed or in planes"));
        }
        Ok(Self {
            compression,
            predictor: predictor(directory, layout)?,
            subsampling,
            is_reversed: directory.number(FILL_ORDER) == Some(2),
            fax_options: directory.number(T4_OPTIONS).unwrap_or(0),
            jpeg_tables: directory.get(JPEG_TABLES).map_or(&[], |field| field.bytes()),
        })
    }

    /// The bytes of a chunk, decompressed as they are read.
    pub fn open<'d>(&self, data: &'d [u8], place: Place) -> Result<Box<dyn Read + 'd>, TiffError> {
        let data = Bytes { rest: data, is_reversed: self.is_reversed };
        let fax = |scheme| -> Box<dyn Read + 'd> { Box::new(Fax::new(data, place.width, scheme)) };
        Ok(match self.compression {
            NO_COMPRESSION => Box::new(data),
            2 => fax(Scheme::Rows { aligned_to: 8 }),
            32771 => fax(Scheme::Rows { aligned_to: 16 }),
            3 => fax(Scheme::Group3 { two_dimensional: self.fax_options & 1 == 1 }),
            4 => fax(Scheme::Group4),
            5 if data.get(0) == Some(0) && data.get(1).is_some_and(|byte| byte & 1 == 1) => {
                return Err(TiffError::unsupported("LZW compression of before TIFF 6.0"));
            }
            5 => Box::new(Lzw::new(data)),
            8 | 32946 => Box::new(flate2::read::ZlibDecoder::new(data)),
            32773 => Box::new(PackBits { data, run: Run::Copy(0) }),
            // A dictionary of 64 MiB is what the strongest preset of `xz` asks for.
            34925 => Box::new(lzma_rust2::XzReader::new_mem_limit(data, false, 80 << 10)),
            50000 => {
                let frame = ruzstd::decoding::StreamingDecoder::new(data);
                Box::new(frame.map_err(|_| TiffError::Damaged("its Zstandard data is unreadable"))?)
            }
            other => return Err(TiffError::Unsupported(format!("compression {other}"))),
        })
    }

    /// A chunk that is a JPEG picture.
    pub fn jpeg(&self, data: &'a [u8], layout: &Layout, place: Place) -> Result<jpeg::Chunk<'a>, TiffError> {
        jpeg::chunk(self.jpeg_tables, data, layout, place)
    }
}

fn predictor(directory: &Directory<'_>, layout: &Layout) -> Result<Predictor, TiffError> {
    if ![5, 8, 32946, 34925, 50000].contains(&layout.compression) {
        return Ok(Predictor::None);
    }
    match directory.number(PREDICTOR).unwrap_or(1) {
        1 => Ok(Predictor::None),
        2 if [8, 16, 32].contains(&layout.sample.bits()) => Ok(Predictor::Horizontal),
        3 if layout.sample == Sample::Float32 => Ok(Predictor::FloatingPoint),
        other => Err(TiffError::Unsupported(format!("predictor {other} with {}-bit samples", layout.sample.bits()))),
    }
}

/// What a kind that is not read is called.
fn refused(compression: u64, layout: &Layout) -> Option<String> {
    let name = match compression {
        2 | 3 | 4 | 32771 if layout.sample != Sample::Unsigned(1) => "fax compression of more than one bit",
        NO_COMPRESSION | 2..=5 | 8 | 32771 | 32773 | 32946 | 34925 | 50000 => return None,
        JPEG | OLD_JPEG if layout.sample != Sample::Unsigned(8) => "JPEG compression of other samples than bytes",
        JPEG | OLD_JPEG => return None,
        9 | 10 | 34661 => "JBIG compression",
        32766 => "NeXT compression",
        32809 => "ThunderScan compression",
        32895..=32908 => "prepress (IT8) compression",
        34676 | 34677 => "LogLuv compression",
        33003 | 33004 | 33005 | 34712 => "JPEG 2000 compression",
        34887 => "LERC compression",
        50001 | 34927 => "WebP compression",
        52546 | 50002 => "JPEG XL compression",
        other => return Some(format!("compression {other}")),
    };
    Some(name.into())
}

/// A chunk, the first bit of each byte being the most significant one.
#[derive(Clone, Copy)]
pub struct Bytes<'a> {
    rest: &'a [u8],
    is_reversed: bool,
}

impl Bytes<'_> {
    pub fn len(&self) -> usize {
        self.rest.len()
    }

    pub fn get(&self, at: usize) -> Option<u8> {
        self.rest.get(at).map(|byte| if self.is_reversed { byte.reverse_bits() } else { *byte })
    }

    fn next(&mut self) -> Option<u8> {
        let first = self.get(0)?;
        self.rest = &self.rest[1..];
        Some(first)
    }
}

impl Read for Bytes<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.rest.read(into)?;
        if self.is_reversed {
            into[..n].iter_mut().for_each(|byte| *byte = byte.reverse_bits());
        }
        Ok(n)
    }
}

struct Lzw<'a> {
    data: Bytes<'a>,
    decoder: weezl::decode::Decoder,
    piece: [u8; 1024],
    /// What is left of the piece.
    left: std::ops::Range<usize>,
}

impl<'a> Lzw<'a> {
    fn new(data: Bytes<'a>) -> Self {
        let decoder = weezl::decode::Decoder::with_tiff_size_switch(weezl::BitOrder::Msb, 8);
        Self { data, decoder, piece: [0; 1024], left: 0..0 }
    }
}

impl Read for Lzw<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.left.is_empty() {
                self.left = 0..self.data.read(&mut self.piece)?;
            }
            let done = self.decoder.decode_bytes(&self.piece[self.left.clone()], into);
            self.left.start += done.consumed_in;
            match done.status {
                Ok(weezl::LzwStatus::Ok) if done.consumed_out == 0 && !into.is_empty() => {}
                Ok(_) => return Ok(done.consumed_out),
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
        }
    }
}

struct PackBits<'a> {
    data: Bytes<'a>,
    run: Run,
}

/// What is left of the run that was begun.
enum Run {
    Copy(usize),
    Repeat(u8, usize),
}

impl PackBits<'_> {
    fn begin(&mut self) -> Option<Run> {
        let head = self.data.next()? as i8;
        Some(match head {
            0.. => Run::Copy(head as usize + 1),
            // Does nothing.
            -128 => Run::Copy(0),
            _ => Run::Repeat(self.data.next()?, 1 + usize::from(head.unsigned_abs())),
        })
    }
}

impl Read for PackBits<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while matches!(self.run, Run::Copy(0) | Run::Repeat(_, 0)) {
            let Some(run) = self.begin() else { return Ok(0) };
            self.run = run;
        }
        match &mut self.run {
            Run::Copy(left) => {
                let most = (*left).min(into.len());
                let n = self.data.read(&mut into[..most])?;
                *left -= n;
                Ok(n)
            }
            Run::Repeat(value, left) => {
                let n = (*left).min(into.len());
                into[..n].fill(*value);
                *left -= n;
                Ok(n)
            }
        }
    }
}

pub const NO_COMPRESSION: u64 = 1;
pub const JPEG: u64 = 7;

const FILL_ORDER: u16 = 266;
const T4_OPTIONS: u16 = 292;
const PREDICTOR: u16 = 317;
const JPEG_TABLES: u16 = 347;
const YCBCR_SUBSAMPLING: u16 = 530;
