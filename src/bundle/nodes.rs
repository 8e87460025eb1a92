//! The nodes of a graph, for whoever reckons with them: operators, and of weights only their shapes. No weight is read.

use std::collections::BTreeMap;

use super::onnx::{AttributeProto, NodeProto, TensorProto};
use super::{Bundle, BundleError, Dtype};

/// Whole numbers that are kept of a stored tensor: those of shapes are few.
const MOST_VALUES: u64 = 64;

/// A graph in the order in which it runs.
#[derive(Clone, Debug, Default)]
pub struct Nodes {
    /// The nodes.
    pub nodes: Vec<Node>,
    /// What is stored with them.
    pub stored: Vec<Stored>,
}

/// One node.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// What it does.
    pub operator: String,
    /// What it takes; an empty name where something optional is absent.
    pub inputs: Vec<String>,
    /// What it gives.
    pub outputs: Vec<String>,
    /// Its whole numbers, one or several each.
    pub attributes: BTreeMap<String, Vec<i64>>,
}

/// A weight or another constant.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its name.
    pub name: String,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// What its elements are.
    pub element: Element,
    /// Its values, where they are few whole numbers that stand in the graph's own file.
    pub values: Option<Vec<i64>>,
}

/// Types of elements, weights among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Element {
    Float32,
    Float16,
    Bfloat16,
    Int64,
    Int32,
    Int8,
    Uint8,
    Bool,
}

impl Element {
    /// As `onnx.proto` numbers them; none of other types.
    pub fn of(code: i64) -> Option<Self> {
        Some(match code {
            1 => Self::Float32,
            2 => Self::Uint8,
            3 => Self::Int8,
            6 => Self::Int32,
            7 => Self::Int64,
            9 => Self::Bool,
            10 => Self::Float16,
            16 => Self::Bfloat16,
            _ => return None,
        })
    }

    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            Self::Int64 => 8,
            Self::Float32 | Self::Int32 => 4,
            Self::Float16 | Self::Bfloat16 => 2,
            Self::Int8 | Self::Uint8 | Self::Bool => 1,
        }
    }
}

impl From<Dtype> for Element {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Float32 => Self::Float32,
            Dtype::Float16 => Self::Float16,
            Dtype::Bfloat16 => Self::Bfloat16,
            Dtype::Int64 => Self::Int64,
            Dtype::Int32 => Self::Int32,
        }
    }
}

impl Bundle {
    /// The nodes of a graph.
    ///
    /// # Panics
    /// As [`graph`](Self::graph).
    pub fn nodes(&self, graph: &str) -> Result<Nodes, BundleError> {
        let proto = self.proto(graph)?;
        let odd = |tensor: &TensorProto| {
            let reason = format!("stores `{}` as a type or in a shape that no bundle needs", tensor.name);
            self.refused(&self.graph(graph).file, reason)
        };
        let stored = |tensor: &TensorProto| Stored::of(tensor).ok_or_else(|| odd(tensor));
        let stored = proto.initializer.iter().map(stored).collect::<Result<_, _>>()?;
        Ok(Nodes { nodes: proto.node.into_iter().map(Node::from).collect(), stored })
    }
}

impl Stored {
    fn of(tensor: &TensorProto) -> Option<Self> {
        let shape: Vec<usize> = tensor.dims.iter().map(|size| usize::try_from(*size).ok()).collect::<Option<_>>()?;
        let n_values = shape.iter().try_fold(1u64, |n, size| n.checked_mul(*size as u64))?;
        let element = Element::of(tensor.data_type.into())?;
        let values = (n_values <= MOST_VALUES).then(|| values(tensor, element)).flatten();
        Some(Self { name: tensor.name.clone(), shape, element, values: values.filter(|values| values.len() as u64 == n_values) })
    }
}

fn values(tensor: &TensorProto, element: Element) -> Option<Vec<i64>> {
    let raw = tensor.raw_data.as_slice();
    match element {
        Element::Int64 if raw.is_empty() => Some(tensor.int64_data.clone()),
        Element::Int64 => Some(raw.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect()),
        Element::Int32 if raw.is_empty() => Some(tensor.int32_data.iter().map(|value| i64::from(*value)).collect()),
        Element::Int32 => Some(raw.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes).into()).collect()),
        _ => None,
    }
}

impl From<NodeProto> for Node {
    fn from(proto: NodeProto) -> Self {
        let numbers = |attribute: AttributeProto| {
            let numbers = if attribute.ints.is_empty() { vec![attribute.i] } else { attribute.ints };
            (attribute.name, numbers)
        };
        let NodeProto { input, output, op_type, attribute } = proto;
        Self { operator: op_type, inputs: input, outputs: output, attributes: attribute.into_iter().map(numbers).collect() }
    }
}
