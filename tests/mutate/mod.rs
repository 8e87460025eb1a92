//! Pictures with something wrong: bytes, numbers, pieces, and the sizes in their headers.

pub mod hostile;

use std::path::Path;

/// A format and the endings of its files.
#[derive(Clone, Copy)]
pub struct Format {
    pub name: &'static str,
    pub extensions: &'static [&'static str],
}

pub const FORMATS: [Format; 7] = [
    Format { name: "JPEG", extensions: &["jpg"] },
    Format { name: "PNG", extensions: &["png"] },
    Format { name: "GIF", extensions: &["gif"] },
    Format { name: "WebP", extensions: &["webp"] },
    Format { name: "BMP", extensions: &["bmp"] },
    Format { name: "TIFF", extensions: &["tiff"] },
    Format { name: "PNM", extensions: &["pgm", "pbm", "ppm", "pam"] },
];

/// Every test picture of a format.
pub fn seeds(format: Format) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures");
    let is_seed = |path: &Path| {
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        format.extensions.contains(&ending) && path.file_name().unwrap().to_str().unwrap().matches('.').count() == 1
    };
    let mut paths: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| is_seed(path)).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).filter(|bytes| bytes.len() < 1 << 16).collect()
}

/// Makes one damaged picture after the other, the same ones for the same seed.
pub struct Mutator {
    seeds: Vec<Vec<u8>>,
    random: Lcg,
}

/// A generator that needs no crate: the constants are Knuth's MMIX.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n.max(1)
    }

    fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }
}

/// Numbers at which something overflows, ends or begins.
const ODD_NUMBERS: [u32; 18] =
    [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 9459, 32767, 32768, 65535, 65536, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF];

impl Mutator {
    pub fn new(format: Format, seed: u64) -> Self {
        let seeds = seeds(format);
        assert!(seeds.len() > 1, "{}: run tests/pictures/make.py", format.name);
        Self { seeds, random: Lcg(seed) }
    }

    pub fn next(&mut self) -> Vec<u8> {
        let mut bytes = self.seed();
        for _ in 0..=self.random.below(3) {
            match self.random.below(9) {
                0 => bytes.truncate(self.random.below(bytes.len())),
                1 => self.set_bytes(&mut bytes, usize::MAX),
                2 | 3 => self.set_bytes(&mut bytes, 200),
                4 => self.set_number(&mut bytes),
                5 => self.set_sizes(&mut bytes),
                6 => self.move_piece(&mut bytes),
                7 => self.splice(&mut bytes),
                _ => self.swap_words(&mut bytes),
            }
        }
        mend_checksums(&mut bytes);
        bytes
    }

    fn seed(&mut self) -> Vec<u8> {
        let which = self.random.below(self.seeds.len());
        self.seeds[which].clone()
    }

    /// Headers are where lengths and sizes stand.
    fn set_bytes(&mut self, bytes: &mut [u8], reach: usize) {
        for _ in 0..=self.random.below(4) {
            let at = self.random.below(bytes.len().min(reach));
            if let Some(byte) = bytes.get_mut(at) {
                *byte = self.random.below(256) as u8;
            }
        }
    }

    fn set_number(&mut self, bytes: &mut [u8]) {
        let reach = if self.random.below(2) == 0 { 128 } else { usize::MAX };
        let at = self.random.below(bytes.len().min(reach));
        self.put_number(bytes, at);
    }

    fn put_number(&mut self, bytes: &mut [u8], at: usize) {
        let number = self.random.pick(&ODD_NUMBERS);
        let (width, is_big_endian) = (self.random.pick(&[1, 2, 4]), self.random.below(2) == 0);
        let Some(place) = bytes.get_mut(at..at + width) else { return };
        if is_big_endian {
            place.copy_from_slice(&number.to_be_bytes()[4 - width..]);
        } else {
            place.copy_from_slice(&number.to_le_bytes()[..width]);
        }
    }

    /// Where the headers of the formats have their width and height, and in TIFF any entry of the directory.
    fn set_sizes(&mut self, bytes: &mut Vec<u8>) {
        const SIDES: [u32; 12] = [0, 1, 2, 5, 64, 1000, 9000, 16_383, 65_535, 65_536, 1 << 24, u32::MAX];
        let (width, height) = (self.random.pick(&SIDES), self.random.pick(&SIDES));
        let (short_width, short_height) = ((width as u16).to_le_bytes(), (height as u16).to_le_bytes());
        match bytes.first() {
            Some(0x89) => put(bytes, 16, &[width.to_be_bytes(), height.to_be_bytes()].concat()),
            Some(b'G') => {
                let frame = bytes.iter().position(|byte| *byte == b',').map_or(6, |comma| comma + 5);
                put(bytes, self.random.pick(&[6, frame]), &[short_width, short_height].concat());
            }
            Some(b'B') => put(bytes, 18, &[width.to_le_bytes(), height.to_le_bytes()].concat()),
            Some(b'R') => {
                put(bytes, 24, &[&width.to_le_bytes()[..3], &height.to_le_bytes()[..3]].concat());
                put(bytes, 26, &[short_width, short_height].concat());
            }
            Some(0xFF) => {
                if let Some(frame) = bytes.windows(2).position(|pair| pair[0] == 0xFF && matches!(pair[1], 0xC0..=0xC2)) {
                    put(bytes, frame + 5, &[(height as u16).to_be_bytes(), (width as u16).to_be_bytes()].concat());
                }
            }
            Some(b'P') => self.set_text_sizes(bytes, width, height),
            Some(b'I' | b'M') => self.set_entry(bytes),
            _ => {}
        }
    }

    fn set_text_sizes(&mut self, bytes: &mut Vec<u8>, width: u32, height: u32) {
        let most = self.random.pick(&[0, 1, 100, 255, 256, 65_535, 65_536]);
        let kind = self.random.pick(b"12345678");
        let data = bytes.split_off(bytes.len().min(12));
        *bytes = format!("P{} {width} {height} {most}\n", kind as char).into_bytes();
        bytes.extend(data);
    }

    fn set_entry(&mut self, bytes: &mut [u8]) {
        let is_big_endian = bytes.starts_with(b"MM");
        let Some(place) = bytes.get(4..8).and_then(|place| place.first_chunk::<4>()) else { return };
        let directory = if is_big_endian { u32::from_be_bytes(*place) } else { u32::from_le_bytes(*place) } as usize;
        let entry = directory.saturating_add(2 + 12 * self.random.below(16));
        if entry < bytes.len() {
            let field = self.random.pick(&[0, 2, 4, 8, 8, 8]);
            self.put_number(bytes, entry + field);
        }
    }

    /// Takes a piece away, or writes it once more somewhere else.
    fn move_piece(&mut self, bytes: &mut Vec<u8>) {
        let start = self.random.below(bytes.len());
        let length = self.random.below((bytes.len() - start).min(400));
        let piece: Vec<u8> = bytes.drain(start..start + length).collect();
        if self.random.below(2) == 0 {
            let at = self.random.below(bytes.len() + 1);
            bytes.splice(at..at, piece.iter().chain(&piece).copied());
        }
    }

    /// The beginning of one picture and the end of another.
    fn splice(&mut self, bytes: &mut Vec<u8>) {
        let other = self.seed();
        bytes.truncate(self.random.below(bytes.len()).max(self.random.below(64)));
        bytes.extend(&other[self.random.below(other.len())..]);
    }

    /// Four bytes change places with four others, as names and lengths of chunks do.
    fn swap_words(&mut self, bytes: &mut [u8]) {
        let places = (bytes.len() / 4).min(100);
        let (one, other) = (4 * self.random.below(places), 4 * self.random.below(places));
        for byte in 0..4usize.min(bytes.len()) {
            bytes.swap(one + byte, other + byte);
        }
    }
}

fn put(bytes: &mut [u8], at: usize, number: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + number.len()) {
        place.copy_from_slice(number);
    }
}

/// What is wrong with a PNG file should be more than its checksums.
fn mend_checksums(bytes: &mut [u8]) {
    if !bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        return;
    }
    let mut at = 8;
    while let Some(length) = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()) {
        let end = at + 8 + u32::from_be_bytes(*length) as usize;
        let Some(chunk) = bytes.get(at + 4..end) else { return };
        put(bytes, end, &checksum(chunk).to_be_bytes());
        at = end + 4;
    }
}

fn checksum(data: &[u8]) -> u32 {
    let mut checksum = flate2::Crc::new();
    checksum.update(data);
    checksum.sum()
}
