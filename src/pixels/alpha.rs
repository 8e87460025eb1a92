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
        if let Cow::Owned(rgb) = self.opaque(how) {
            self.rgb = rgb;
        }
        self.alpha = None;
        self
    }

    /// Colours once transparency is gone.
    pub(super) fn opaque(&self, how: Alpha) -> Cow<'_, [u8]> {
        let Some(alpha) = self.alpha.as_ref().filter(|_| how == Alpha::White) else { return Cow::Borrowed(&self.rgb) };
        let over = |(pixel, alpha): (&[u8], &u8)| [0, 1, 2].map(|channel| over_white(pixel[channel], *alpha));
        Cow::Owned(self.rgb.chunks_exact(3).zip(alpha).flat_map(over).collect())
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
