//! JPEG pictures inside TIFF files: strips and tiles whose tables may stand elsewhere, and the whole picture of before TIFF 6.0's revision.

use std::io::{BufRead, Chain, Read};

use mozjpeg::decompress::DecompressStarted;
use mozjpeg::{ColorSpace, CompInfoExt, Decompress};

use super::TiffError;
use super::chunks::Place;
use super::directory::Directory;
use super::layout::{Colour, Layout};
use crate::pixels::jpeg::check_scans;

/// A strip or tile that is about to be read row by row.
pub type Chunk<'a> = DecompressStarted<Chain<&'a [u8], &'a [u8]>>;

/// One strip or tile. Chroma that is not in planes becomes RGB on the way, everything else stays as it is stored.
pub fn chunk<'a>(tables: &'a [u8], data: &'a [u8], layout: &Layout, place: Place) -> Result<Chunk<'a>, TiffError> {
    let begin = if tables.is_empty() { &[0xFF, 0xD8] } else { tables.strip_suffix(&[0xFF, 0xD9]).unwrap_or(tables) };
    let picture = Decompress::new_reader(begin.chain(data.get(2..).unwrap_or_default()))?;
    let is_last = place.y + place.height >= layout.height;
    check_size(&picture, place.width, if is_last { layout.height } else { place.height })?;
    if picture.components().len() != place.n_samples {
        return Err(TiffError::Damaged("a JPEG strip has other colours than the picture"));
    }
    let colours = if layout.colour == Colour::YCbCr && !layout.is_planar { ColorSpace::JCS_RGB } else { picture.color_space() };
    check_scans(data, place.width, picture.height() as u32)
        .map_err(|_| TiffError::Damaged("a JPEG picture inside has too many scans"))?;
    Ok(picture.to_colorspace(colours)?)
}

/// Brightness and chroma of a picture that is one JPEG file inside the TIFF file. Chroma is not smoothed.
pub fn old(directory: &Directory<'_>, layout: &Layout) -> Result<Vec<u8>, TiffError> {
    let start = directory.number(INTERCHANGE_FORMAT).and_then(|start| usize::try_from(start).ok());
    let stream = start.and_then(|start| directory.source.bytes.get(start..)).filter(|stream| stream.starts_with(&[0xFF, 0xD8]));
    let stream = stream.ok_or_else(|| TiffError::unsupported("old JPEG compression without a JPEG file in it"))?;
    let picture = Decompress::new_mem(stream)?;
    check_size(&picture, layout.width, layout.height)?;
    check_scans(stream, layout.width, layout.height).map_err(|_| TiffError::Damaged("a JPEG picture inside has too many scans"))?;
    let shape: Vec<_> = picture
        .components()
        .iter()
        .map(|part| (part.h_samp_factor as usize, part.v_samp_factor as usize, part.row_stride()))
        .collect();
    let [(across, down, stride), (1, 1, chroma_stride), (1, 1, _)] = shape[..] else {
        return Err(TiffError::unsupported("old JPEG compression of other colours than YCbCr"));
    };
    let mut planes = [Vec::new(), Vec::new(), Vec::new()];
    picture.raw()?.read_raw_data(&mut planes.each_mut());
    let [brightness, blue, red] = planes;
    let (width, height) = (layout.width as usize, layout.height as usize);
    let mut samples = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        let chroma = y / down * chroma_stride;
        for (x, value) in brightness[y * stride..][..width].iter().enumerate() {
            samples.extend([*value, blue[chroma + x / across], red[chroma + x / across]]);
        }
    }
    Ok(samples)
}

fn check_size(picture: &Decompress<impl BufRead>, width: u32, height: u32) -> Result<(), TiffError> {
    if picture.width() == width as usize && picture.height() <= height as usize {
        return Ok(());
    }
    Err(TiffError::Damaged("a JPEG picture inside has another size than the directory says"))
}

const INTERCHANGE_FORMAT: u16 = 513;
