//! ITU-T T.4 (Group 3) and T.6 (Group 4), one row at a time. White is 0.

use std::io::{self, Read};

use fax::BitReader;
use fax::maps::{Mode, black, mode, white};

use super::codec::Bytes;

/// How rows are coded and kept apart.
#[derive(Clone, Copy)]
pub enum Scheme {
    /// Runs only, each row begins at a multiple of so many bits.
    Rows { aligned_to: usize },
    /// An end-of-line code stands in front of a row, and a bit that says whether runs or differences follow.
    Group3 { two_dimensional: bool },
    /// Differences from the row above.
    Group4,
}

/// A strip or tile.
pub struct Fax<'a> {
    bits: Bits<'a>,
    scheme: Scheme,
    width: u32,
    /// Columns where the colour changes in the row above.
    above: Vec<u32>,
    packed: Vec<u8>,
    n_given: usize,
    is_over: bool,
}

struct Bits<'a> {
    data: Bytes<'a>,
    at: usize,
}

impl<'a> Fax<'a> {
    pub fn new(data: Bytes<'a>, width: u32, scheme: Scheme) -> Self {
        let packed = vec![0; width.div_ceil(8) as usize];
        let n_given = packed.len();
        Self { bits: Bits { data, at: 0 }, scheme, width, above: Vec::new(), packed, n_given, is_over: false }
    }

    fn row(&mut self) -> io::Result<Vec<u32>> {
        match self.scheme {
            Scheme::Rows { aligned_to } => {
                let row = self.runs();
                self.bits.at = self.bits.at.next_multiple_of(aligned_to);
                row
            }
            Scheme::Group3 { two_dimensional } => {
                self.skip_end_of_line();
                let is_runs = !two_dimensional || self.bits.take() == 1;
                if is_runs { self.runs() } else { self.differences() }
            }
            Scheme::Group4 => self.differences(),
        }
    }

    /// Runs of white and black in turn until the row is full or an end-of-line code comes.
    fn runs(&mut self) -> io::Result<Vec<u32>> {
        let (mut row, mut at) = (Vec::new(), 0);
        while at < self.width && !self.bits.is_at_end_of_line() {
            at += self.run(row.len() % 2 == 1)?;
            self.push(&mut row, at)?;
        }
        Ok(row)
    }

    fn run(&mut self, is_black: bool) -> io::Result<u32> {
        let mut sum = 0;
        loop {
            let code = if is_black { black::decode(&mut self.bits) } else { white::decode(&mut self.bits) };
            let length = u32::from(code.ok_or_else(damaged)?);
            sum += length;
            if length < 64 {
                return Ok(sum);
            }
            if sum > self.width {
                return Err(damaged());
            }
        }
    }

    fn differences(&mut self) -> io::Result<Vec<u32>> {
        let (mut row, mut at, mut is_first) = (Vec::new(), 0, true);
        while at < self.width {
            let is_black = row.len() % 2 == 1;
            let (b1, b2) = self.changes_above(at, is_black, is_first);
            match mode::decode(&mut self.bits).ok_or_else(damaged)? {
                Mode::Pass => at = b2,
                Mode::Vertical(shift) => {
                    let target = i64::from(b1) + i64::from(shift);
                    if target < i64::from(at) {
                        return Err(damaged());
                    }
                    at = target.min(i64::from(self.width)) as u32;
                    self.push(&mut row, at)?;
                }
                Mode::Horizontal => {
                    for is_black in [is_black, !is_black] {
                        at = (at + self.run(is_black)?).min(self.width);
                        self.push(&mut row, at)?;
                    }
                }
                Mode::EOF => {
                    self.is_over = is_first;
                    return Ok(row);
                }
                Mode::Extension => return Err(io::Error::other("uncompressed fax data is not supported")),
            }
            is_first = false;
        }
        Ok(row)
    }

    /// Runs of no length may repeat, but never for long.
    fn push(&self, row: &mut Vec<u32>, at: u32) -> io::Result<()> {
        row.push(at.min(self.width));
        if row.len() > 2 * self.width as usize + 2 { Err(damaged()) } else { Ok(()) }
    }

    /// The first change in the row above to the right of `at` that leads away from the present colour, and the one behind it.
    fn changes_above(&self, at: u32, is_black: bool, is_first: bool) -> (u32, u32) {
        let mut place = self.above.partition_point(|change| *change < at || *change == at && !is_first);
        if place % 2 != usize::from(is_black) {
            place += 1;
        }
        let change = |place: usize| self.above.get(place).copied().unwrap_or(self.width);
        (change(place), change(place + 1))
    }

    fn skip_end_of_line(&mut self) {
        if self.bits.is_at_end_of_line() {
            while self.bits.at < self.bits.len() && self.bits.take() == 0 {}
        }
    }

    fn pack(&mut self, row: &[u32]) {
        self.packed.fill(0);
        for black in row.chunks(2) {
            let end = black.get(1).copied().unwrap_or(if row.len() % 2 == 1 { self.width } else { 0 });
            for column in black[0]..end {
                self.packed[column as usize / 8] |= 0x80 >> (column % 8);
            }
        }
    }
}

impl Read for Fax<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.n_given == self.packed.len() {
            let row = if self.is_over { Vec::new() } else { self.row()? };
            self.pack(&row);
            self.above = row;
            self.n_given = 0;
        }
        let n = into.len().min(self.packed.len() - self.n_given);
        into[..n].copy_from_slice(&self.packed[self.n_given..self.n_given + n]);
        self.n_given += n;
        Ok(n)
    }
}

impl Bits<'_> {
    fn len(&self) -> usize {
        self.data.len() * 8
    }

    fn take(&mut self) -> u16 {
        let bit = self.peek(1).unwrap_or(0);
        self.at += 1;
        bit
    }

    /// Eleven zeros or more; no run begins with more than seven.
    fn is_at_end_of_line(&self) -> bool {
        self.at + 11 <= self.len() && self.peek(11) == Some(0)
    }
}

impl BitReader for Bits<'_> {
    type Error = io::Error;

    /// Behind the end stand zeros, so that the last code can be looked up.
    fn peek(&self, bits: u8) -> Option<u16> {
        let byte = |place: usize| u32::from(self.data.get(self.at / 8 + place).unwrap_or(0));
        let joined = byte(0) << 16 | byte(1) << 8 | byte(2);
        let shifted = joined << (8 + self.at % 8) >> (32 - u32::from(bits));
        (self.at < self.len()).then_some(shifted as u16)
    }

    fn consume(&mut self, bits: u8) -> Result<(), io::Error> {
        self.at += usize::from(bits);
        Ok(())
    }

    fn bits_to_byte_boundary(&self) -> u8 {
        (8 - self.at % 8) as u8 % 8
    }
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "its fax data is unreadable")
}
