//! The messages of gRPC, made from `open_inference.proto` when this is built, and how large one may become.

use bytes::Bytes;

use crate::server::config::Limits;

mod made {
    #![allow(missing_docs, clippy::all)]
    include!(concat!(env!("OUT_DIR"), "/inference.rs"));
}

pub use made::*;

/// A message stands behind a byte that says whether it is compressed, and four of its length.
const FRAME_BYTES: usize = 5;
/// Fields that a request needs beside those of its pictures and texts.
const FEW: usize = 256;
/// `inputs` of a request, and `contents` of an input.
const NESTED: [u64; 2] = [5, 5];

/// Whether a body is one message, with no more fields than a request may need: an empty one takes two bytes to send and hundreds to keep.
pub fn is_plausible(body: &Bytes, limits: &Limits) -> bool {
    let length = body.get(1..FRAME_BYTES).and_then(|length| length.first_chunk());
    let Some(length) = length.map(|length| u32::from_be_bytes(*length) as usize) else { return false };
    let most = limits.max_pictures.saturating_add(limits.max_texts).saturating_add(FEW);
    body.len() - FRAME_BYTES == length && n_fields(&body[FRAME_BYTES..], &NESTED) <= most
}

/// The fields of a message, with those of the messages in it along a path of numbers. What cannot be read ends it, as it ends a decoder.
fn n_fields(mut message: &[u8], path: &[u64]) -> usize {
    let mut n = 0;
    while let Some((number, inside)) = field(&mut message) {
        n += 1;
        if let Some((_, rest)) = path.split_first().filter(|(first, _)| **first == number) {
            n += n_fields(inside, rest);
        }
    }
    n
}

/// Takes a field from the front: its number, and its bytes if it has a length.
fn field<'a>(message: &mut &'a [u8]) -> Option<(u64, &'a [u8])> {
    let key = varint(message)?;
    let (is_counted, n) = match key & 7 {
        0 => varint(message).map(|_| (false, 0))?,
        1 => (false, 8),
        2 => (true, usize::try_from(varint(message)?).ok()?),
        5 => (false, 4),
        _ => return None,
    };
    let (inside, rest) = message.split_at_checked(n)?;
    *message = rest;
    Some((key >> 3, if is_counted { inside } else { &[] }))
}

/// Seven bits a byte, the low ones first; the last byte has no eighth.
fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(first & 127) << shift;
        if first & 128 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(message: &[u8]) -> Bytes {
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[0], &length[..], message].concat().into()
    }

    #[test]
    fn many_small_fields_are_no_request() {
        let limits = Limits { max_pictures: 10, max_texts: 10, ..Limits::default() };
        let input = [0x2a, 0]; // an empty `inputs`
        assert!(is_plausible(&framed(&input.repeat(276)), &limits));
        assert!(!is_plausible(&framed(&input.repeat(277)), &limits));
        // One input, whose contents are 300 empty elements.
        let elements = [0x42, 0].repeat(300);
        let contents = [&[0x2a, 0xd8, 4], &elements[..]].concat();
        let input = [&[0x2a, 0xdb, 4], &contents[..]].concat();
        assert!(!is_plausible(&framed(&input), &limits));
        assert!(is_plausible(&framed(&input), &Limits::default()));
    }

    #[test]
    fn only_one_whole_message_is_a_body() {
        let limits = Limits::default();
        let one = framed(&[0x0a, 1, b'x', 0x10, 0x80, 1, 0x19, 0, 0, 0, 0, 0, 0, 0, 0, 0x25, 0, 0, 0, 0]);
        assert!(is_plausible(&one, &limits) && is_plausible(&framed(&[]), &limits));
        assert_eq!(n_fields(&one[FRAME_BYTES..], &[]), 4);
        for bytes in [one.slice(..one.len() - 1), [&one[..], &framed(&[])[..]].concat().into(), Bytes::new(), one.slice(..4)] {
            assert!(!is_plausible(&bytes, &limits), "{bytes:?}");
        }
        assert_eq!(n_fields(&[0x0a, 5, 1], &[]), 0);
        assert_eq!(n_fields(&[0x80; 20], &[]), 0);
    }
}
