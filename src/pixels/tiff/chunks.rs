//! Strips and tiles, put together to one canvas with 8 bits a sample.

use std::io::Read;

use super::TiffError;
use super::codec::{self, Codec, NO_COMPRESSION};
use super::directory::{Directory, Field};
use super::jpeg;
use super::layout::{Colour, Layout, OLD_JPEG};
use super::samples::Rows;

/// Samples that are looked at, interleaved, row by row.
pub struct Canvas {
    pub samples: Vec<u8>,
    pub n_channels: usize,
    row_samples: usize,
}

/// Where strips or tiles lie in the file and in the picture.
struct Grid<'a> {
    offsets: Field<'a>,
    lengths: Option<Field<'a>>,
    chunk_width: u32,
    chunk_height: u32,
    is_tiled: bool,
}

/// One strip or tile.
#[derive(Clone, Copy)]
pub struct Place {
    pub x: u32,
    pub y: u32,
    /// Columns and rows that are stored, beyond the picture's edge too.
    pub width: u32,
    pub height: u32,
    /// First channel, and their number.
    pub channel: usize,
    pub n_samples: usize,
}

/// Decodes every strip or tile.
pub fn read(directory: &Directory<'_>, layout: &Layout) -> Result<Canvas, TiffError> {
    let codec = Codec::read(directory, layout)?;
    let n_channels = layout.n_kept();
    let row_samples = layout.width as usize * n_channels;
    if layout.compression == OLD_JPEG {
        return Ok(Canvas { samples: jpeg::old(directory, layout)?, n_channels, row_samples });
    }
    let mut canvas = Canvas { samples: vec![0; row_samples * layout.height as usize], n_channels, row_samples };
    let grid = Grid::read(directory, layout)?;
    for plane in 0..if layout.is_planar { n_channels } else { 1 } {
        grid.each(layout, plane, |place, data| {
            if layout.compression == codec::JPEG {
                return canvas.put_jpeg(codec.jpeg(data, layout, place)?, place, layout);
            }
            if layout.colour == Colour::YCbCr && !layout.is_planar && codec.subsampling != (1, 1) {
                return canvas.put_blocks(codec.open(data, place)?, place, codec.subsampling, layout);
            }
            canvas.put_rows(Rows::new(&codec, data, place, layout)?, place, layout)
        })?;
    }
    Ok(canvas)
}

impl<'a> Grid<'a> {
    fn read(directory: &Directory<'a>, layout: &Layout) -> Result<Self, TiffError> {
        let is_tiled = directory.get(STRIP_OFFSETS).is_none() && directory.get(TILE_OFFSETS).is_some();
        let (offsets, lengths) = if is_tiled { (TILE_OFFSETS, TILE_BYTES) } else { (STRIP_OFFSETS, STRIP_BYTES) };
        let offsets = directory.get(offsets).ok_or(TiffError::Damaged("nothing says where its data lies"))?;
        let side = |tag, most: u32| directory.number(tag).map_or(most, |side| side.min(1 << 24) as u32);
        let (chunk_width, chunk_height) = if is_tiled {
            (side(TILE_WIDTH, 0), side(TILE_LENGTH, 0))
        } else {
            (layout.width, side(ROWS_PER_STRIP, layout.height).min(layout.height))
        };
        if chunk_width == 0 || chunk_height == 0 {
            return Err(TiffError::Damaged("its strips or tiles are empty"));
        }
        let chunks = Self { offsets, lengths: directory.get(lengths), chunk_width, chunk_height, is_tiled };
        chunks.check_work(layout)?;
        Ok(chunks)
    }

    /// Decoding a tile costs at least its own size and what it takes to begin, so that tiles far beyond the picture's edges or millions of
    /// tiny ones would make work out of nothing.
    fn check_work(&self, layout: &Layout) -> Result<(), TiffError> {
        let (across, down) = (layout.width.div_ceil(self.chunk_width), layout.height.div_ceil(self.chunk_height));
        let n_chunks = u64::from(across) * u64::from(down);
        if n_chunks > MAX_CHUNKS {
            return Err(TiffError::Unsupported(format!("{n_chunks} strips or tiles")));
        }
        if self.is_tiled && n_chunks * u64::from(self.chunk_width) * u64::from(self.chunk_height) > MAX_TILED {
            return Err(TiffError::unsupported("tiles of more than 128 megapixels, most of them beyond the picture's edges"));
        }
        Ok(())
    }

    /// Goes through one plane from left to right and from top to bottom.
    fn each(
        &self,
        layout: &Layout,
        plane: usize,
        mut work: impl FnMut(Place, &'a [u8]) -> Result<(), TiffError>,
    ) -> Result<(), TiffError> {
        let (across, down) = (layout.width.div_ceil(self.chunk_width), layout.height.div_ceil(self.chunk_height));
        let first = plane * across as usize * down as usize;
        // Where one chunk is the whole picture, Pillow takes the last of several.
        let is_whole = across == 1 && down == 1 && self.chunk_width == layout.width && !layout.is_planar;
        let last = is_whole && layout.compression == NO_COMPRESSION;
        for row in 0..down {
            for column in 0..across {
                let index = first + row as usize * across as usize + column as usize;
                let index = if last { self.offsets.len().saturating_sub(1) } else { index };
                let (x, y) = (column * self.chunk_width, row * self.chunk_height);
                let height = if self.is_tiled { self.chunk_height } else { self.chunk_height.min(layout.height - y) };
                let n_samples = if layout.is_planar { 1 } else { layout.n_samples };
                let place = Place { x, y, width: self.chunk_width, height, channel: plane, n_samples };
                work(place, self.data(layout, index)?)?;
            }
        }
        Ok(())
    }

    /// A chunk's bytes. Without compression its length does not count, and without a length the file's end is the end.
    fn data(&self, layout: &Layout, index: usize) -> Result<&'a [u8], TiffError> {
        let cut_off = TiffError::Damaged("a strip or tile is missing");
        let Some(start) = self.offsets.number(index).and_then(|start| usize::try_from(start).ok()) else { return Err(cut_off) };
        let Some(rest) = self.offsets.file().get(start..) else { return Err(cut_off) };
        let length = self.lengths.and_then(|lengths| lengths.number(index)).filter(|length| *length > 0);
        let length = length.filter(|_| layout.compression != NO_COMPRESSION).and_then(|length| usize::try_from(length).ok());
        Ok(&rest[..length.unwrap_or(rest.len()).min(rest.len())])
    }
}

impl Canvas {
    fn put_rows(&mut self, mut rows: Rows<'_>, place: Place, layout: &Layout) -> Result<(), TiffError> {
        for row in 0..place.height.min(layout.height - place.y) {
            self.put(rows.next_row()?, place, row, layout);
        }
        Ok(())
    }

    fn put_jpeg(&mut self, mut picture: jpeg::Chunk<'_>, place: Place, layout: &Layout) -> Result<(), TiffError> {
        let mut samples = vec![0; place.width as usize * place.n_samples];
        for row in 0..(picture.height() as u32).min(layout.height - place.y) {
            picture.read_scanlines_into(&mut samples)?;
            self.put(&samples, place, row, layout);
        }
        Ok(())
    }

    /// Writes one row of a chunk, as far as the picture reaches; samples beyond those that are looked at are left out.
    fn put(&mut self, samples: &[u8], place: Place, row: u32, layout: &Layout) {
        let start = (place.y + row) as usize * self.row_samples + place.x as usize * self.n_channels;
        let n_pixels = place.width.min(layout.width - place.x) as usize;
        let target = &mut self.samples[start..start + n_pixels * self.n_channels];
        if place.n_samples == self.n_channels {
            target.copy_from_slice(&samples[..target.len()]);
            return;
        }
        let n_copied = if layout.is_planar { 1 } else { self.n_channels };
        let pixels = target.chunks_exact_mut(self.n_channels).zip(samples.chunks_exact(place.n_samples));
        for (into, from) in pixels {
            into[place.channel..place.channel + n_copied].copy_from_slice(&from[..n_copied]);
        }
    }

    /// Blocks of brightness samples, followed by the two chroma samples that they share.
    fn put_blocks(
        &mut self,
        mut data: impl Read,
        place: Place,
        (across, down): (u32, u32),
        layout: &Layout,
    ) -> Result<(), TiffError> {
        let n_blocks = place.width.div_ceil(across) as usize;
        let n_values = (across * down) as usize + 2;
        let mut blocks = vec![0; n_blocks * n_values];
        let mut line = vec![0; n_blocks * across as usize * 3];
        for top in (0..place.height.min(layout.height - place.y)).step_by(down as usize) {
            data.read_exact(&mut blocks)?;
            for row in 0..down.min(layout.height - place.y - top).min(place.height - top) {
                let first = (row * across) as usize;
                for (pixels, block) in line.chunks_exact_mut(across as usize * 3).zip(blocks.chunks_exact(n_values)) {
                    let chroma = [block[n_values - 2], block[n_values - 1]];
                    for (pixel, brightness) in pixels.chunks_exact_mut(3).zip(&block[first..]) {
                        pixel.copy_from_slice(&[*brightness, chroma[0], chroma[1]]);
                    }
                }
                self.put(&line, place, top + row, layout);
            }
        }
        Ok(())
    }
}

const MAX_CHUNKS: u64 = 1 << 17;
const MAX_TILED: u64 = 128 << 20;

const STRIP_OFFSETS: u16 = 273;
const ROWS_PER_STRIP: u16 = 278;
const STRIP_BYTES: u16 = 279;
const TILE_WIDTH: u16 = 322;
const TILE_LENGTH: u16 = 323;
const TILE_OFFSETS: u16 = 324;
const TILE_BYTES: u16 = 325;
