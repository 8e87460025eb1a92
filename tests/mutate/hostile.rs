//! Small files that declare much work, in the kinds that chance does not make.

use std::io::Write;

use flate2::write::ZlibEncoder;
use flate2::{Compression, Crc};

use super::{FORMATS, Format, seeds};

/// A name, its format, and a way to make the file: some take long to make.
pub type Hostile = (&'static str, Format, fn() -> Vec<u8>);

const SIDE: u32 = 9459;

pub fn all() -> [Hostile; 7] {
    let [jpeg, png, gif, webp, bmp, tiff, pnm] = FORMATS;
    [
        ("progressive JPEG of a thousand scans", jpeg, many_scans),
        ("PNG of 16-bit RGBA, every row filtered", png, deep_png),
        ("interlaced GIF", gif, interlaced_gif),
        ("lossless WebP", webp, lossless_webp),
        ("BMP of skipped rows", bmp, skipping_bmp),
        ("TIFF of tiles of one pixel", tiff, tiny_tiles),
        ("PPM in letters", pnm, lettered_ppm),
    ]
}

/// The last scan over and over.
pub fn many_scans() -> Vec<u8> {
    let is_progressive = |bytes: &Vec<u8>| bytes.windows(2).any(|pair| pair == [0xFF, 0xC2]);
    let mut file = seeds(FORMATS[0]).into_iter().find(is_progressive).unwrap();
    let frame = file.windows(2).position(|pair| pair == [0xFF, 0xC2]).unwrap();
    file[frame + 5..frame + 9].copy_from_slice(&[SIDE.to_be_bytes()[2..].to_vec(), SIDE.to_be_bytes()[2..].to_vec()].concat());
    let last = file.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).unwrap();
    let (end, scan) = (file.split_off(file.len() - 2), file.split_off(last));
    file.extend(scan.repeat(1000));
    file.extend(end);
    file
}

fn deep_png() -> Vec<u8> {
    let mut data = ZlibEncoder::new(Vec::new(), Compression::fast());
    let mut row = vec![1; 1 + SIDE as usize * 8];
    row[0] = 4;
    (0..SIDE).for_each(|_| data.write_all(&row).unwrap());
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let header = [&SIDE.to_be_bytes()[..], &SIDE.to_be_bytes(), &[16, 6, 0, 0, 0]].concat();
    for (kind, data) in [(b"IHDR", header), (b"IDAT", data.finish().unwrap()), (b"IEND", Vec::new())] {
        let mut sum = Crc::new();
        sum.update(kind);
        sum.update(&data);
        file.extend([&(data.len() as u32).to_be_bytes()[..], kind, &data, &sum.sum().to_be_bytes()].concat());
    }
    file
}

fn interlaced_gif() -> Vec<u8> {
    let side = (SIDE as u16).to_le_bytes();
    let mut file =
        [b"GIF89a", &side[..], &side, &[0, 0, 0], b"!\xF9\x04\x01\0\0\x07\0", b",\0\0\0\0", &side, &side, &[0x40, 8]].concat();
    let pixels = vec![3; SIDE as usize * SIDE as usize];
    let data = weezl::encode::Encoder::new(weezl::BitOrder::Lsb, 8).encode(&pixels).unwrap();
    data.chunks(255).for_each(|block| file.extend([&[block.len() as u8], block].concat()));
    file.extend([0, b';']);
    file
}

fn lossless_webp() -> Vec<u8> {
    let mut file = Vec::new();
    let pixels = [9, 200, 77, 100].repeat(SIDE as usize * SIDE as usize);
    let encoder = image::codecs::webp::WebPEncoder::new_lossless(&mut file);
    encoder.encode(&pixels, SIDE, SIDE, image::ExtendedColorType::Rgba8).unwrap();
    file
}

fn skipping_bmp() -> Vec<u8> {
    let mut file = b"BM\0\0\0\0\0\0\0\0\x36\x04\0\0\x28\0\0\0".to_vec();
    file.extend([SIDE.to_le_bytes(), SIDE.to_le_bytes(), [1, 0, 8, 0], [1, 0, 0, 0]].concat());
    file.extend([0; 20]);
    file.extend((0..1024).map(|at| (at * 7) as u8));
    file.extend([1, 5, 0, 0].repeat(SIDE as usize));
    file
}

pub fn tiny_tiles() -> Vec<u8> {
    let entries: [(u16, u32); 9] = [(256, SIDE), (257, 1500), (258, 8), (259, 8), (262, 1), (277, 1), (322, 1), (323, 1), (324, 8)];
    let n_tiles = SIDE * 1500;
    let mut file = [b"II*\0", &(8 + n_tiles * 4).to_le_bytes()[..]].concat();
    file.extend(8u32.to_le_bytes().repeat(n_tiles as usize));
    file.extend((entries.len() as u16).to_le_bytes());
    for (tag, value) in entries {
        let count = if tag == 324 { n_tiles } else { 1 };
        file.extend([&tag.to_le_bytes()[..], &[4, 0], &count.to_le_bytes(), &value.to_le_bytes()].concat());
    }
    file
}

fn lettered_ppm() -> Vec<u8> {
    let n_values = (60usize << 20) / 2;
    let mut file = format!("P3 {} 1000 9\n", n_values / 3000).into_bytes();
    file.extend(b"7 ".repeat(n_values));
    file
}
