//! GIF: the first frame on its canvas, as Pillow puts it there.

use weezl::BitOrder;
use weezl::decode::Decoder;

use super::{Limits, Picture, PictureWarning, PixelsError};

/// Decodes a file that begins with `GIF87a` or `GIF89a`.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Picture, PixelsError> {
    let frame = Frame::first(bytes).ok_or_else(|| damaged("there is no whole frame"))?;
    let (width, height) = frame.canvas();
    limits.check(width, height)?;
    let mut indices = vec![frame.transparent.unwrap_or(0); width as usize * height as usize];
    frame.draw(&mut indices, width as usize)?;
    let rgb = indices.iter().flat_map(|index| frame.palette[usize::from(*index)]).collect();
    let mut picture = Picture::from_rgb(width, height, rgb);
    picture.alpha = frame.transparent.map(|key| indices.iter().map(|index| if *index == key { 0 } else { 255 }).collect());
    if !frame.ended {
        picture.warnings.push(PictureWarning::NoEnd);
    }
    Ok(picture)
}

struct Frame {
    screen: [u16; 2],
    at: [u16; 2],
    size: [u16; 2],
    palette: Box<[[u8; 3]; 256]>,
    transparent: Option<u8>,
    interlaced: bool,
    code_size: u8,
    /// The blocks in one piece.
    data: Vec<u8>,
    /// Whether anything follows the data.
    ended: bool,
}

impl Frame {
    fn first(bytes: &[u8]) -> Option<Self> {
        let mut rest = Reader(bytes.get(6..)?);
        let (screen, flags) = ([rest.u16()?, rest.u16()?], rest.byte()?);
        rest.take(2)?;
        let mut palette = greys();
        if flags & 0x80 > 0 {
            palette = colours(rest.take(6 << (flags & 7))?).unwrap_or(palette);
        }
        let mut transparent = None;
        loop {
            match rest.byte()? {
                b'!' => transparent = rest.extension()?.or(transparent),
                b',' => break,
                b';' => return None,
                _ => {}
            }
        }
        let (at, size, flags) = ([rest.u16()?, rest.u16()?], [rest.u16()?, rest.u16()?], rest.byte()?);
        if flags & 0x80 > 0 {
            palette = colours(rest.take(6 << (flags & 7))?).unwrap_or(palette);
        }
        let (interlaced, code_size) = (flags & 0x40 > 0, rest.byte()?);
        let (mut data, mut ended) = (Vec::new(), !rest.0.is_empty());
        while let Some(block) = rest.block() {
            data.extend(block);
            ended = !rest.0.is_empty();
        }
        Some(Self { screen, at, size, palette, transparent, interlaced, code_size, data, ended })
    }

    /// The screen grows with a frame that lies beyond it.
    fn canvas(&self) -> (u32, u32) {
        let side = |axis: usize| u32::from(self.screen[axis]).max(u32::from(self.at[axis]) + u32::from(self.size[axis]));
        (side(0), side(1))
    }

    fn draw(&self, canvas: &mut [u8], stride: usize) -> Result<(), PixelsError> {
        let [left, top] = self.at.map(usize::from);
        let [width, height] = self.size.map(usize::from);
        if width == 0 || height == 0 || !(1..=12).contains(&self.code_size) {
            return Err(damaged("the frame is empty"));
        }
        let mut indices = vec![0; width * height];
        let mut decoder = Decoder::new(BitOrder::Lsb, self.code_size);
        let (mut read, mut written) = (0, 0);
        while written < indices.len() {
            let progress = decoder.decode_bytes(&self.data[read..], &mut indices[written..]);
            read += progress.consumed_in;
            written += progress.consumed_out;
            let is_stuck = progress.status.is_err() || (progress.consumed_in, progress.consumed_out) == (0, 0);
            if is_stuck && written < indices.len() {
                return Err(damaged("rows are missing"));
            }
        }
        for (row, y) in indices.chunks_exact(width).zip(self.rows(height)) {
            canvas[(top + y) * stride + left..][..width].copy_from_slice(row);
        }
        Ok(())
    }

    /// Rows in the order in which they are stored.
    fn rows(&self, height: usize) -> impl Iterator<Item = usize> {
        let passes: &[[usize; 2]] = if self.interlaced { &[[0, 8], [4, 8], [2, 4], [1, 2]] } else { &[[0, 1]] };
        passes.iter().flat_map(move |[first, step]| (*first..height).step_by(*step))
    }
}

/// Nothing where a palette only says what its indices say: Pillow passes over such a one. What lies beyond the end of another is black.
fn colours(palette: &[u8]) -> Option<Box<[[u8; 3]; 256]>> {
    let mut found = Box::new([[0; 3]; 256]);
    let stored = palette.as_chunks::<3>().0;
    found[..stored.len()].copy_from_slice(stored);
    (stored != &greys()[..stored.len()]).then_some(found)
}

fn greys() -> Box<[[u8; 3]; 256]> {
    Box::new(std::array::from_fn(|grey| [grey as u8; 3]))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n_bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n_bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|byte| byte[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    /// The transparent index, where this says one. What is cut off counts as far as it goes.
    fn extension(&mut self) -> Option<Option<u8>> {
        let label = self.byte()?;
        let block = self.part_of_a_block();
        let transparent = match (label, block) {
            (0xF9, Some(block)) if block.first()? & 1 > 0 => Some(*block.get(3)?),
            (0xFE, None) => return Some(None),
            (0xFF, Some(block)) if block.starts_with(b"NETSCAPE2.0") => self.part_of_a_block().and(None),
            _ => None,
        };
        while self.part_of_a_block().is_some() {}
        Some(transparent)
    }

    fn part_of_a_block(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.byte().filter(|length| *length > 0)?);
        self.take(length.min(self.0.len()))
    }

    /// Nothing at the end of a chain of blocks.
    fn block(&mut self) -> Option<&'a [u8]> {
        let length = self.byte().filter(|length| *length > 0)?;
        self.take(usize::from(length))
    }
}

fn damaged(reason: &str) -> PixelsError {
    PixelsError::Damaged(reason.into())
}
