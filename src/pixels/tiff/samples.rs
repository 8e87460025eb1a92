//! Rows of samples of any kind become rows of bytes, as Pillow makes them on the way to RGB.

use std::io::Read;

use super::TiffError;
use super::chunks::Place;
use super::codec::{Codec, Predictor};
use super::layout::{Colour, Layout, Sample};

/// The rows of one strip or tile, 8 bits a sample.
pub struct Rows<'a> {
    data: Box<dyn Read + 'a>,
    stored: Vec<u8>,
    row: Vec<u8>,
    predictor: Predictor,
    n_samples: usize,
    colour: Colour,
    sample: Sample,
    is_big_endian: bool,
}

impl<'a> Rows<'a> {
    pub fn new(codec: &Codec<'_>, data: &'a [u8], place: Place, layout: &Layout) -> Result<Self, TiffError> {
        let n_values = place.width as usize * place.n_samples;
        Ok(Self {
            data: codec.open(data, place)?,
            stored: vec![0; (n_values * layout.sample.bits() as usize).div_ceil(8)],
            row: vec![0; n_values],
            predictor: codec.predictor,
            n_samples: place.n_samples,
            colour: layout.colour,
            sample: layout.sample,
            is_big_endian: layout.is_big_endian,
        })
    }

    pub fn next_row(&mut self) -> Result<&[u8], TiffError> {
        self.data.read_exact(&mut self.stored)?;
        match self.predictor {
            Predictor::None => {}
            Predictor::Horizontal => self.add_left(),
            Predictor::FloatingPoint => self.join_floats(),
        }
        self.write_bytes();
        Ok(&self.row)
    }

    fn add_left(&mut self) {
        let width = self.sample.bits() as usize / 8;
        let big_endian = self.is_big_endian;
        for at in (self.n_samples * width..self.stored.len()).step_by(width) {
            let left = value(&self.stored[at - self.n_samples * width..][..width], big_endian);
            let sum = value(&self.stored[at..][..width], big_endian).wrapping_add(left);
            let bytes = if big_endian { sum.to_be_bytes() } else { sum.to_le_bytes() };
            let from = if big_endian { 4 - width } else { 0 };
            self.stored[at..][..width].copy_from_slice(&bytes[from..from + width]);
        }
    }

    /// The row holds all first bytes, then all second ones; whatever the file's order, the first is the most significant.
    fn join_floats(&mut self) {
        for at in self.n_samples..self.stored.len() {
            self.stored[at] = self.stored[at].wrapping_add(self.stored[at - self.n_samples]);
        }
        let n_values = self.stored.len() / 4;
        let joined: Vec<u8> = (0..n_values).flat_map(|at| [0, 1, 2, 3].map(|byte| self.stored[byte * n_values + at])).collect();
        self.stored = joined;
        self.is_big_endian = true;
    }

    fn write_bytes(&mut self) {
        let big_endian = self.is_big_endian;
        let is_grey = matches!(self.colour, Colour::Grey | Colour::InvertedGrey);
        match self.sample {
            Sample::Unsigned(8) => self.row.copy_from_slice(&self.stored),
            Sample::Unsigned(bits @ (1 | 2 | 4)) => {
                let scale = if is_grey { 255 / ((1 << bits) - 1) } else { 1 };
                unpack(&self.stored, &mut self.row, bits as usize, scale as u8);
            }
            Sample::Unsigned(12) => unpack_twelve(&self.stored, &mut self.row),
            // Greys are clipped, where colours are scaled.
            Sample::Unsigned(16) if is_grey => self.each(2, |bytes| value(bytes, big_endian).min(255) as u8),
            Sample::Unsigned(16) => self.each(2, |bytes| bytes[usize::from(!big_endian)]),
            Sample::Signed(16) => self.each(2, |bytes| (value(bytes, big_endian) as u16 as i16).clamp(0, 255) as u8),
            Sample::Unsigned(_) | Sample::Signed(_) => self.each(4, |bytes| (value(bytes, big_endian) as i32).clamp(0, 255) as u8),
            Sample::Float32 => self.each(4, |bytes| f32::from_bits(value(bytes, big_endian)) as u8),
        }
        // Pillow knows no other samples that begin with white.
        if self.colour == Colour::InvertedGrey && self.sample.bits() <= 8 {
            self.row.iter_mut().for_each(|value| *value = 255 - *value);
        }
    }

    fn each(&mut self, width: usize, byte: impl Fn(&[u8]) -> u8) {
        for (into, from) in self.row.iter_mut().zip(self.stored.chunks_exact(width)) {
            *into = byte(from);
        }
    }
}

fn value(bytes: &[u8], big_endian: bool) -> u32 {
    let join = |sum: u32, byte: &u8| sum << 8 | u32::from(*byte);
    if big_endian { bytes.iter().fold(0, join) } else { bytes.iter().rev().fold(0, join) }
}

fn unpack(stored: &[u8], row: &mut [u8], bits: usize, scale: u8) {
    let mask = (1u8 << bits) - 1;
    for (values, byte) in row.chunks_mut(8 / bits).zip(stored) {
        for (place, value) in values.iter_mut().enumerate() {
            *value = (byte >> (8 - bits * (place + 1)) & mask) * scale;
        }
    }
}

fn unpack_twelve(stored: &[u8], row: &mut [u8]) {
    for (pair, bytes) in row.chunks_mut(2).zip(stored.chunks(3)) {
        pair[0] = (u16::from(bytes[0]) << 4 | u16::from(bytes[1] >> 4)).min(255) as u8;
        if let [_, second] = pair {
            *second = (u16::from(bytes[1] & 15) << 8 | u16::from(bytes[2])).min(255) as u8;
        }
    }
}
