//! [`ImageFeatures`] → [`Queries`]: learned query tokens read the image and are projected to the language model's width.

use std::sync::Arc;

use ndarray::{Array2, Array3, Ix3};

use crate::bundle::{Bundle, BundleError};
use crate::runtime::{Graph, Place, Runtime, RuntimeError};
use crate::vision::ImageFeatures;

/// `[queries, hidden]` of one picture, projected to the language model's width. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Queries(pub Arc<Array2<f32>>);

/// The Q-Former with the projection behind it.
#[derive(Debug)]
pub struct Qformer(Graph);

impl Qformer {
    /// Loads the graph.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        Graph::open(runtime, bundle, "qformer").map(Self)
    }

    /// Reads a batch; one [`Queries`] per picture.
    pub fn read(&mut self, features: &ImageFeatures) -> Result<Vec<Queries>, RuntimeError> {
        let outputs = self.0.run(&[("image_features", &features.0)], Place::Host)?;
        let queries = outputs[0].to_f32().map_err(|source| self.0.failed("copying queries", source))?;
        if queries.iter().any(|value| !value.is_finite()) {
            return Err(RuntimeError::NotANumber { graph: "qformer".into(), output: "queries".into() });
        }
        let queries: Array3<f32> = queries.into_dimensionality::<Ix3>().expect("the rank was checked when the graph was opened");
        Ok(queries.outer_iter().map(|row| Queries(Arc::new(row.to_owned()))).collect())
    }
}
