//! [`Pixels`] → [`ImageFeatures`]: the frozen image encoder.

use ndarray::{Array2, ArrayView2, Axis, Ix3};

use crate::bundle::{Bundle, BundleError};
use crate::pixels::Pixels;
use crate::runtime::{Cancel, Graph, GraphError, Place, Runtime, RuntimeError, Tensor};

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

    /// Lets `cancel` stop every later run.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.0.set_cancel(cancel);
    }

    /// Encodes a batch.
    pub fn encode(&mut self, pixels: Pixels) -> Result<ImageFeatures, RuntimeError> {
        let pixels = Tensor::from_f32(pixels.0).map_err(|source| self.0.failed("copying pixels", source))?;
        let mut outputs = self.0.run(&[("pixel_values", &pixels)], Place::Device)?;
        Ok(ImageFeatures(outputs.take("image_features")))
    }
}

impl ImageFeatures {
    /// Puts pictures, `[positions, hidden]` each, into one batch.
    ///
    /// # Panics
    /// If their shapes differ.
    pub fn from_rows(rows: &[&Array2<f32>]) -> Result<Self, GraphError> {
        let views: Vec<ArrayView2<'_, f32>> = rows.iter().map(|row| row.view()).collect();
        let batch = ndarray::stack(Axis(0), &views).expect("features of one image encoder have one shape");
        Tensor::from_f32(batch).map(Self)
    }

    /// The pictures one by one, on the host.
    pub fn rows(&self) -> Result<Vec<Array2<f32>>, GraphError> {
        let all = self.0.to_f32()?.into_dimensionality::<Ix3>().expect("the rank was checked when the graph was opened");
        Ok(all.outer_iter().map(|row| row.to_owned()).collect())
    }
}
