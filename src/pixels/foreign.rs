//! Formats that are known by their first bytes and not read.

/// What the bytes are, with its article: a format that cannot be decoded here, whatever the file is called.
pub fn name(bytes: &[u8]) -> Option<&'static str> {
    let begins = |mark: &[u8]| bytes.starts_with(mark);
    if bytes.get(4..8) == Some(b"ftyp") {
        return container(bytes);
    }
    if begins(b"\xFF\x0A") || begins(b"\0\0\0\x0CJXL \r\n\x87\n") {
        return Some("a JPEG XL picture");
    }
    if begins(b"\0\0\0\x0CjP  \r\n\x87\n") || begins(b"\xFF\x4F\xFF\x51") {
        return Some("a JPEG 2000 picture");
    }
    if begins(b"II\xBC") {
        return Some("a JPEG XR picture");
    }
    if begins(b"\xFF\xD8\xFF\xF7") {
        return Some("a JPEG-LS picture");
    }
    MARKS.iter().find(|(mark, _)| begins(mark)).map(|(_, name)| *name).or_else(|| markup(bytes))
}

/// The brands of an ISO base media file, the major one first, then those that it is compatible with.
fn container(bytes: &[u8]) -> Option<&'static str> {
    let length = bytes.first_chunk::<4>().map_or(0, |length| u32::from_be_bytes(*length) as usize);
    let box_end = bytes.len().min(length.clamp(12, 256));
    let (major, compatible) = (bytes.get(8..12)?, bytes.get(16..box_end).unwrap_or_default());
    std::iter::once(major).chain(compatible.chunks_exact(4)).find_map(|brand| match brand {
        b"avif" | b"avis" => Some("an AVIF picture"),
        b"heic" | b"heix" | b"hevc" | b"hevx" | b"heim" | b"heis" | b"mif1" | b"msf1" | b"mif2"
            if !compatible.windows(4).any(is_av1) =>
        {
            Some("a HEIC picture")
        }
        b"jxl " => Some("a JPEG XL picture"),
        b"jp2 " | b"jpx " => Some("a JPEG 2000 picture"),
        b"crx " => Some("a camera's raw picture"),
        b"isom" | b"iso2" | b"mp41" | b"mp42" | b"avc1" | b"qt  " | b"M4V " | b"3gp4" | b"3gp5" => Some("a video"),
        _ => None,
    })
}

fn is_av1(brand: &[u8]) -> bool {
    brand == b"avif"
}

fn markup(bytes: &[u8]) -> Option<&'static str> {
    let head = String::from_utf8_lossy(&bytes[..bytes.len().min(1024)]).to_lowercase();
    let text = head.trim_start_matches('\u{FEFF}').trim_start();
    let has_svg = text.contains("<svg");
    match text {
        _ if text.starts_with("<svg") || has_svg && (text.starts_with("<?xml") || text.starts_with("<!")) => Some("an SVG picture"),
        _ if text.starts_with("<!doctype html") || text.starts_with("<html") => Some("a web page"),
        _ => None,
    }
}

const MARKS: [(&[u8], &str); 19] = [
    (b"8BPS", "a Photoshop (PSD) picture"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "an EPS picture"),
    (b"\xC5\xD0\xD3\xC6", "an EPS picture"),
    (b"\0\0\x01\0", "an ICO picture"),
    (b"\0\0\x02\0", "a CUR picture"),
    (b"icns", "an ICNS picture"),
    (b"DDS ", "a DDS picture"),
    (b"#?RADIANCE", "a Radiance HDR picture"),
    (b"#?RGBE", "a Radiance HDR picture"),
    (b"\x76\x2F\x31\x01", "an OpenEXR picture"),
    (b"qoif", "a QOI picture"),
    (b"farbfeld", "a farbfeld picture"),
    (b"gimp xcf", "a GIMP (XCF) picture"),
    (b"AT&TFORM", "a DjVu document"),
    (b"\xD7\xCD\xC6\x9A", "a WMF picture"),
    (b"\x8AMNG", "an MNG animation"),
    (b"SIMPLE  =", "a FITS picture"),
    (b"BPG\xFB", "a BPG picture"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_that_are_not_read_have_names() {
        let heic = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic";
        let avif = b"\0\0\0\x1Cftypmif1\0\0\0\0mif1miafavif";
        let cases: [(&[u8], &str); 9] = [
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture"),
            (heic, "a HEIC picture"),
            (b"\0\0\0\x1Cftypavif\0\0\0\0mif1avif", "an AVIF picture"),
            (avif, "an AVIF picture"),
            (b"\xFF\x0A\xFA", "a JPEG XL picture"),
            (b"8BPS\0\x01", "a Photoshop (PSD) picture"),
            (b"<?xml version='1.0'?>\n<svg width='3'/>", "an SVG picture"),
            (b"  <!DOCTYPE html>", "a web page"),
            (b"%PDF-1.7", "a PDF document"),
        ];
        for (bytes, wanted) in cases {
            assert_eq!(name(bytes), Some(wanted));
        }
        assert_eq!(name(b"\0\0\0\x18ftyp"), None);
        assert_eq!(name(b"\xFF\xD8\xFF\xE0"), None);
        assert_eq!(name(b"a text"), None);
    }
}
