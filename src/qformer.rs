//! [`ImageFeatures`] → [`Queries`]: learned query tokens read the image, where they are made for it with a question in mind, and are
//! projected to the language model's width.

use std::sync::Arc;

use ndarray::{Array2, Axis};

use crate::bundle::{Bundle, BundleError};
use crate::runtime::{Cancel, Graph, GraphError, Mover, Place, Row, Runtime, RuntimeError, Tensor};
use crate::text::TokenBatch;
use crate::vision::{ImageFeatures, PictureFeatures};

/// `[queries, hidden]` of one picture, projected to the language model's width, in the batch that was read together. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Queries(pub Row);

/// Keys and values of the query tokens in every self-attention layer, for the Q-Former's own text. Cheap to clone.
#[derive(Clone, Debug)]
pub struct QueryCache {
    tensors: Arc<Vec<Tensor>>,
    row: usize,
}

/// The Q-Former with the projection behind it.
#[derive(Debug)]
pub struct Qformer {
    graph: Graph,
    mover: Mover,
    reads_questions: bool,
}

impl Qformer {
    /// Loads the graph.
    pub fn open(runtime: &Runtime, bundle: &Bundle) -> Result<Self, BundleError> {
        let reads_questions = bundle.facts().qformer.text.is_some();
        Ok(Self { graph: Graph::open(runtime, bundle, "qformer")?, mover: Mover::new(runtime), reads_questions })
    }

    /// Whether queries depend on the question.
    pub fn reads_questions(&self) -> bool {
        self.reads_questions
    }

    /// Lets `cancel` stop every later run.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.graph.set_cancel(cancel);
    }

    /// An error of this graph.
    pub fn failed(&self, doing: &'static str, source: GraphError) -> RuntimeError {
        self.graph.failed(doing, source)
    }

    /// Reads a batch; one [`Queries`] per picture. A Q-Former that reads questions needs one for each picture.
    pub fn read(&mut self, features: &ImageFeatures, questions: Option<&TokenBatch>) -> Result<Vec<Queries>, RuntimeError> {
        let mut inputs = vec![("image_features", &*features.0)];
        let question = questions.map(|questions| ids_and_mask(&self.graph, questions)).transpose()?;
        if let Some((ids, mask)) = &question {
            inputs.extend([("question_ids", ids), ("question_mask", mask)]);
        }
        let queries = self.graph.run(&inputs, Place::Device)?.finite("queries")?;
        Ok(Row::all(Arc::new(queries)).map(Queries).collect())
    }

    /// As [`read`](Self::read), of pictures that may come from several batches.
    ///
    /// # Panics
    /// If there are none.
    pub fn read_pictures(
        &mut self,
        pictures: &[&PictureFeatures],
        questions: Option<&TokenBatch>,
    ) -> Result<Vec<Queries>, RuntimeError> {
        let features = ImageFeatures::stack(&mut self.mover, pictures)?;
        self.read(&features, questions)
    }
}

/// The two tensors in which a graph takes texts.
pub(crate) fn ids_and_mask(graph: &Graph, texts: &TokenBatch) -> Result<(Tensor, Tensor), RuntimeError> {
    let tensor = |values| Tensor::from_i64(values).map_err(|source| graph.failed("copying token ids", source));
    Ok((tensor(texts.ids.clone())?, tensor(texts.mask.clone())?))
}

impl Queries {
    /// From values on the host.
    pub fn on_host(values: Array2<f32>) -> Result<Self, GraphError> {
        let tensor = Tensor::from_f32(values.insert_axis(Axis(0)))?;
        Ok(Self(Row::all(Arc::new(tensor)).next().expect("a tensor of one row has a row")))
    }

    /// Whether both are the same, not merely equal.
    pub fn is(&self, other: &Self) -> bool {
        self.0.is(&other.0)
    }

    /// Query tokens.
    pub fn n_queries(&self) -> usize {
        self.0.shape()[0]
    }
}

impl QueryCache {
    /// One cache for each row of `tensors`, `[rows, heads, queries, head_dim]`, in the order of the decoder's layers.
    pub fn rows(tensors: Vec<Tensor>) -> Vec<Self> {
        let n_rows = tensors.first().map_or(0, |tensor| tensor.shape()[0]);
        let tensors = Arc::new(tensors);
        (0..n_rows).map(|row| Self { tensors: tensors.clone(), row }).collect()
    }

    /// Bytes of the tensors it lies in.
    pub fn n_bytes(&self) -> usize {
        self.tensors.iter().map(Tensor::n_bytes).sum()
    }

    /// The tensors it lies in.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.tensors.iter()
    }

    /// Its row in them.
    pub fn row(&self) -> usize {
        self.row
    }

    /// Query tokens.
    pub fn n_positions(&self) -> usize {
        self.tensors.first().map_or(0, |tensor| tensor.shape()[2])
    }
}
