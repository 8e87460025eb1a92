//! What the graphs of a bundle compute in.

use serde::{Deserialize, Serialize};

use super::{Bundle, BundleError, GraphFacts};

/// What weights are stored in and multiplied as.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Precision {
    Float32,
    Float16,
    Bfloat16,
    /// Whole numbers: weights with a scale of their output channel, activations with one of their row.
    Int8,
    /// Whole numbers with a scale of every block of a row.
    Int8Blocks,
    /// The same; weights are of 4 bits, activations of 8.
    Int4Blocks,
}

/// Bits that a weight of [`Precision::Int8`] may have: 7 leave room where products are added up in 16 bits.
const WEIGHT_BITS: [u32; 2] = [7, 8];
/// Weights that a block may have; the runtime takes powers of two.
const BLOCK_SIZES: std::ops::RangeInclusive<usize> = 16..=256;

impl Precision {
    fn is_blocks(self) -> bool {
        matches!(self, Self::Int8Blocks | Self::Int4Blocks)
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Int8 => "int8",
            Self::Int8Blocks => "int8-blocks",
            Self::Int4Blocks => "int4-blocks",
        })
    }
}

impl GraphFacts {
    /// The precision in words.
    pub fn computes_in(&self) -> String {
        match (self.weight_bits, self.block_size) {
            (Some(bits), _) if bits != 8 => format!("{} (weights of {bits} bits)", self.precision),
            (_, Some(size)) => format!("{} of {size}", self.precision),
            _ => self.precision.to_string(),
        }
    }
}

impl Bundle {
    /// Whether every graph computes in float32, so that it gives what the reference gave.
    pub fn is_exact(&self) -> bool {
        self.facts.graphs.values().all(|graph| graph.precision == Precision::Float32)
    }

    pub(super) fn check_precisions(&self) -> Result<(), BundleError> {
        for (name, graph) in &self.facts.graphs {
            let GraphFacts { precision, weight_bits, block_size, .. } = *graph;
            let bits = weight_bits.map_or("nothing".into(), |bits| bits.to_string());
            let is_int8 = precision == Precision::Int8;
            self.ensure(weight_bits.is_some() == is_int8 && weight_bits.is_none_or(|bits| WEIGHT_BITS.contains(&bits)), || {
                let possible = if is_int8 { "which needs 7 or 8" } else { "which has none" };
                (format!("graphs.{name}.weight_bits is {bits}"), format!("but the precision is {precision}, {possible}"))
            })?;
            let fits = block_size.is_none_or(|size| size.is_power_of_two() && BLOCK_SIZES.contains(&size));
            self.ensure(block_size.is_some() == precision.is_blocks() && fits, || {
                let size = block_size.map_or("nothing".into(), |size| size.to_string());
                let possible = if precision.is_blocks() { "which needs a power of two from 16 to 256" } else { "which has none" };
                (format!("graphs.{name}.block_size is {size}"), format!("but the precision is {precision}, {possible}"))
            })?;
        }
        Ok(())
    }
}
