//! Tensors: names, types, shapes, and their elements in binary form.

use bytes::Bytes;
use serde::Serialize;

use crate::server::config::Limits;
use crate::server::error::ApiError;

/// The type of pictures and texts.
pub const BYTES: &str = "BYTES";
/// The type of numbers.
pub const FP32: &str = "FP32";

/// What stands before the elements of an input.
pub struct Head {
    /// Which input it is.
    pub name: String,
    /// The type of its elements.
    pub datatype: String,
    /// How many there are, by dimension.
    pub shape: Vec<i64>,
}

/// The elements of an input, as many as its head says.
#[derive(Debug, PartialEq)]
pub enum Elements {
    /// As JSON has them.
    Texts(Vec<String>),
    /// As they are.
    Bytes(Vec<Bytes>),
}

/// A tensor of an answer.
#[derive(Debug)]
pub struct Output {
    /// Which output it is.
    pub name: &'static str,
    /// As many elements in each dimension.
    pub shape: Vec<usize>,
    /// The elements, in row-major order.
    pub data: Data,
}

/// The elements of an output.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Data {
    /// Of type [`BYTES`].
    Texts(Vec<String>),
    /// Of type [`FP32`].
    Numbers(Vec<f32>),
}

impl Head {
    /// How many elements follow; an error unless this is an input of models, of its type and shape, and no longer than it may be.
    pub fn n_elements(&self, limits: &Limits) -> Result<usize, ApiError> {
        let most = match self.name.as_str() {
            "image" => limits.max_pictures,
            "text" => limits.max_texts,
            "task" => 1,
            name => return Err(ApiError::unsupported(name, "there is no such input; image, text and task are known")),
        };
        if self.datatype != BYTES {
            return Err(self.wrong("this input has the datatype BYTES"));
        }
        match *self.shape {
            [n] if n < 1 => Err(self.wrong("this input has the shape [n] of at least one element")),
            [n] => usize::try_from(n).ok().filter(|n| *n <= most).ok_or_else(|| self.too_many(n, most)),
            _ => Err(self.wrong("this input has the shape [n]")),
        }
    }

    /// These elements, if they are as many as were announced.
    pub fn counted<T>(&self, elements: Vec<T>, n: usize) -> Result<Vec<T>, ApiError> {
        if elements.len() == n { Ok(elements) } else { Err(self.wrong("the data has not as many elements as the shape says")) }
    }

    /// The elements that are written one behind the other, each behind its length in 4 bytes, the low byte first.
    pub fn split(&self, bytes: &Bytes, n: usize) -> Result<Elements, ApiError> {
        let mut found = Vec::with_capacity(n);
        let mut rest = bytes.clone();
        while !rest.is_empty() && found.len() < n {
            let length = rest.first_chunk().map(|length| u32::from_le_bytes(*length) as usize);
            let end = length.map(|length| length.saturating_add(4)).filter(|end| *end <= rest.len());
            let end = end.ok_or_else(|| self.wrong("the last element of the data is cut off"))?;
            found.push(rest.split_to(end).slice(4..));
        }
        if !rest.is_empty() {
            return Err(self.wrong("the data has not as many elements as the shape says"));
        }
        Ok(Elements::Bytes(self.counted(found, n)?))
    }

    /// What is wrong with this input.
    pub fn wrong(&self, why: &str) -> ApiError {
        ApiError::invalid(why).about(&*self.name)
    }

    fn too_many(&self, n: i64, most: usize) -> ApiError {
        self.wrong(&format!("{n} elements are more than the {most} that a request may have here"))
    }
}

impl Elements {
    /// Texts; None if one is not in UTF-8.
    pub fn texts(self) -> Option<Vec<String>> {
        match self {
            Self::Texts(texts) => Some(texts),
            Self::Bytes(all) => all.into_iter().map(|bytes| String::from_utf8(bytes.into()).ok()).collect(),
        }
    }
}

impl Output {
    /// The type of its elements.
    pub fn datatype(&self) -> &'static str {
        match self.data {
            Data::Texts(_) => BYTES,
            Data::Numbers(_) => FP32,
        }
    }

    /// Its elements in binary form.
    pub fn binary(&self) -> Vec<u8> {
        match &self.data {
            Data::Texts(texts) => {
                texts.iter().flat_map(|text| [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()).collect()
            }
            Data::Numbers(numbers) => numbers.iter().flat_map(|number| number.to_le_bytes()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(name: &str, datatype: &str, shape: &[i64]) -> Head {
        Head { name: name.into(), datatype: datatype.into(), shape: shape.into() }
    }

    #[test]
    fn inputs_are_lists_of_bytes_that_are_not_too_long() {
        let limits = Limits { max_pictures: 3, ..Limits::default() };
        assert_eq!(head("image", BYTES, &[3]).n_elements(&limits).unwrap(), 3);
        for (name, datatype, shape) in [
            ("picture", BYTES, &[1][..]),
            ("image", "UINT8", &[1]),
            ("image", "bytes", &[1]),
            ("image", BYTES, &[4]),
            ("image", BYTES, &[0]),
            ("image", BYTES, &[-1]),
            ("image", BYTES, &[1, 1]),
            ("image", BYTES, &[]),
            ("image", BYTES, &[i64::MAX]),
            ("task", BYTES, &[2]),
        ] {
            assert!(head(name, datatype, shape).n_elements(&limits).is_err(), "{name} {datatype} {shape:?}");
        }
    }

    #[test]
    fn what_is_written_in_binary_form_is_read_again() {
        let texts = vec!["a".to_owned(), String::new(), "größer".to_owned()];
        let output = Output { name: "text", shape: vec![3], data: Data::Texts(texts.clone()) };
        let head = head("text", BYTES, &[3]);
        let whole = Bytes::from(output.binary());
        assert_eq!(head.split(&whole, 3).unwrap().texts().unwrap(), texts);
        for (bytes, n) in [(whole.clone(), 2), (whole.clone(), 4), (whole.slice(..whole.len() - 1), 3), (whole.slice(..3), 1)] {
            assert!(head.split(&bytes, n).is_err(), "{n} in {bytes:?}");
        }
        let longest = Bytes::from_static(&[255; 4]);
        assert!(head.split(&longest, 1).is_err());
    }

    #[test]
    fn numbers_are_little_endian() {
        let output = Output { name: "embedding", shape: vec![1, 2], data: Data::Numbers(vec![1.0, -2.5]) };
        assert_eq!(output.binary(), [0, 0, 128, 63, 0, 0, 32, 192]);
    }
}
