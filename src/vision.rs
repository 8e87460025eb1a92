//! [`Pixels`] → [`ImageFeatures`]: the frozen image encoder.

use std::sync::Arc;

use ndarray::Array3;

use crate::bundle::{Bundle, BundleError, SEEN_AT_ONCE};
use crate::pixels::Pixels;
use crate::runtime::{Cancel, Graph, GraphError, Mover, Place, Row, Runtime, RuntimeError, Tensor};

/// `[batch, positions, hidden]`: class token and patches after the last layer norm. They stay where the graph runs.
#[derive(Clone, Debug)]
pub struct ImageFeatures(pub Arc<Tensor>);

/// `[positions, hidden]` of one picture, in the batch that it was encoded in. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PictureFeatures(pub Row);

/// The image encoder.
#[derive(Debug)]
pub struct Vision(Graph);

impl Vision {
    /// Loads the graph.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        Graph::open(runtime, bundle, "vision").map(Self)
    }

    /// Lets `cancel` stop every later run.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.0.set_cancel(cancel);
    }

    /// Pictures that are encoded fastest in one run.
    pub fn at_once(&self) -> usize {
        if self.0.is_on_processor() { SEEN_AT_ONCE } else { usize::MAX }
    }

    /// Encodes a batch.
    pub fn encode(&mut self, pixels: Pixels) -> Result<ImageFeatures, RuntimeError> {
        let pixels = Tensor::from_f32(pixels.0).map_err(|source| self.0.failed("copying pixels", source))?;
        let mut outputs = self.0.run(&[("pixel_values", &pixels)], Place::Device)?;
        Ok(ImageFeatures(Arc::new(outputs.take("image_features"))))
    }
}

impl ImageFeatures {
    /// From values on the host.
    pub fn on_host(values: Array3<f32>) -> Result<Self, GraphError> {
        Tensor::from_f32(values).map(Arc::new).map(Self)
    }

    /// Puts pictures into one batch, where they lie.
    ///
    /// # Panics
    /// If there are none, or their shapes differ.
    pub fn stack(mover: &mut Mover, pictures: &[&PictureFeatures]) -> Result<Self, RuntimeError> {
        let rows: Vec<&Row> = pictures.iter().map(|picture| &picture.0).collect();
        mover.stack(&rows).map(Self)
    }

    /// The pictures one by one.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = PictureFeatures> {
        Row::all(self.0.clone()).map(PictureFeatures)
    }
}
