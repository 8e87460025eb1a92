//! Pictures to measure with where nobody brought any: JPEG files that all differ, and cost a decoder what photographs cost.

use std::str::FromStr;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::pixels::encode_jpeg;

/// Of photographs as cameras and web sites have them.
const QUALITY: f32 = 85.0;
const N_SHAPES: usize = 24;
/// Grain, as sensors have it: without, there would be little to decode.
const NOISE: i32 = 10;
const MOST: u32 = 16_384;

/// Width and height in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// From left to right.
    pub width: u32,
    /// From top to bottom.
    pub height: u32,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        let side = |text: &str| text.parse().ok().filter(|side| (1..=MOST).contains(side));
        let sides = typed.split_once(['x', '×']).and_then(|(width, height)| Some((side(width)?, side(height)?)));
        let (width, height) = sides.ok_or_else(|| format!("`{typed}` is no size; one is 640x480, each side from 1 to {MOST}"))?;
        Ok(Self { width, height })
    }
}

struct Shape {
    centre: [f32; 2],
    radii: [f32; 2],
    colour: [i32; 3],
    is_round: bool,
}

/// The picture of a seed, encoded.
pub fn drawn(side: Size, seed: u64) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(seed);
    let colour = |random: &mut StdRng| [0; 3].map(|_| random.random_range(20..236));
    let corners = [colour(&mut random), colour(&mut random)];
    let shapes: Vec<Shape> = (0..N_SHAPES).map(|_| shape(&mut random)).collect();
    let mut rgb = Vec::with_capacity(3 * side.width as usize * side.height as usize);
    for y in 0..side.height {
        for x in 0..side.width {
            let at = [x as f32 / side.width as f32, y as f32 / side.height as f32];
            let colour =
                shapes.iter().rev().find(|shape| shape.holds(at)).map_or_else(|| between(corners, at), |shape| shape.colour);
            rgb.extend(colour.map(|value| (value + random.random_range(-NOISE..=NOISE)).clamp(0, 255) as u8));
        }
    }
    encode_jpeg(side.width, side.height, &rgb, QUALITY)
}

fn shape(random: &mut StdRng) -> Shape {
    Shape {
        centre: [random.random(), random.random()],
        radii: [0; 2].map(|_| random.random_range(0.02..0.2)),
        colour: [0; 3].map(|_| random.random_range(0..256)),
        is_round: random.random(),
    }
}

fn between([first, last]: [[i32; 3]; 2], at: [f32; 2]) -> [i32; 3] {
    let part = (at[0] + at[1]) / 2.0;
    std::array::from_fn(|i| (first[i] as f32 * (1.0 - part) + last[i] as f32 * part) as i32)
}

impl Shape {
    fn holds(&self, at: [f32; 2]) -> bool {
        let [x, y] = std::array::from_fn(|i| (at[i] - self.centre[i]) / self.radii[i]);
        if self.is_round { x * x + y * y <= 1.0 } else { x.abs().max(y.abs()) <= 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pixels::{Limits, Picture};

    #[test]
    fn every_seed_draws_another_picture_and_one_always_the_same() {
        let side = Size { width: 90, height: 60 };
        assert_eq!(drawn(side, 1), drawn(side, 1));
        assert_ne!(drawn(side, 1), drawn(side, 2));
        let picture = Picture::decode(&drawn(side, 1), &Limits::default()).expect("a JPEG file");
        assert_eq!((picture.width, picture.height), (90, 60));
    }

    #[test]
    fn a_size_has_two_sides() {
        assert_eq!("640x480".parse(), Ok(Size { width: 640, height: 480 }));
        for typed in ["640", "0x5", "5x-1", "x", "99999x1"] {
            assert!(typed.parse::<Size>().is_err(), "{typed}");
        }
    }
}
