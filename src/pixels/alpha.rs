//! What becomes of transparency.

use std::borrow::Cow;
use std::str::FromStr;

use serde::Deserialize;

use super::Picture;

/// What becomes of transparency.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Alpha {
    /// The picture lies over white, as `transformers` 5 has it.
    White,
    /// Colours count as they are stored, as LAVIS and `transformers` 4 have it.
    Drop,
}

impl Picture {
    /// The same picture without transparency; it looks alike to every bundle.
    pub fn without_alpha(mut self, how: Alpha) -> Self {
        if let Some(alpha) = self.alpha.take().filter(|_| how == Alpha::White) {
            lay_over_white(&mut self.rgb, &alpha);
        }
        self
    }

    /// Colours once transparency is gone.
    pub(super) fn opaque(&self, how: Alpha) -> Cow<'_, [u8]> {
        let Some(alpha) = self.alpha.as_ref().filter(|_| how == Alpha::White) else { return Cow::Borrowed(&self.rgb) };
        let mut rgb = self.rgb.clone();
        lay_over_white(&mut rgb, alpha);
        Cow::Owned(rgb)
    }
}

fn lay_over_white(rgb: &mut [u8], alpha: &[u8]) {
    for (pixel, alpha) in rgb.as_chunks_mut::<3>().0.iter_mut().zip(alpha) {
        *pixel = pixel.map(|value| over_white(value, *alpha));
    }
}

/// Pillow's `alpha_composite` over opaque white, which rounds once, at seven bits behind the point.
fn over_white(value: u8, alpha: u8) -> u8 {
    let (value, alpha) = (u32::from(value), u32::from(alpha));
    let sum = ((value * alpha + 255 * (255 - alpha)) << 7) + (0x80 << 7);
    (((sum >> 8) + sum) >> 8 >> 7) as u8
}

impl FromStr for Alpha {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = [Self::White, Self::Drop].into_iter().find(|alpha| alpha.to_string() == name);
        known.ok_or_else(|| "white and drop are known".into())
    }
}

impl std::fmt::Display for Alpha {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::White => "white",
            Self::Drop => "drop",
        })
    }
}
