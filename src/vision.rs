//! [`Pixels`] → [`ImageFeatures`]: the frozen image encoder.

use crate::bundle::{Bundle, BundleError};
use crate::pixels::Pixels;
use crate::runtime::{Graph, Place, Runtime, RuntimeError, Tensor};

/// `[batch, positions, hidden]`: class token and patches after the last layer norm. They stay where the graph runs.
#[derive(Debug)]
pub struct ImageFeatures(pub Tensor);

/// The image encoder.
#[derive(Debug)]
pub struct Vision(Graph);

impl Vision {
    /// Loads the graph.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        Graph::open(runtime, bundle, "vision").map(Self)
    }

    /// Encodes a batch.
    pub fn encode(&mut self, pixels: Pixels) -> Result<ImageFeatures, RuntimeError> {
        let pixels = Tensor::from_f32(pixels.0).map_err(|source| self.0.failed("copying pixels", source))?;
        let mut outputs = self.0.run(&[("pixel_values", &pixels)], Place::Device)?;
        Ok(ImageFeatures(outputs.remove(0)))
    }
}
