//! What stands inside the `.onnx` files, held against the facts: which files weights come from, which operators are needed, how many
//! rows the tables have that token ids and positions choose from.
//!
//! Field numbers are those of `onnx.proto`; fields that do not matter here are not named and so never read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use prost::Message;

use super::{Bundle, BundleError, MAX_GRAPH_BYTES, Side};

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
    #[prost(message, repeated, tag = "8")]
    opset_import: Vec<OperatorSetProto>,
    #[prost(message, repeated, tag = "20")]
    training_info: Vec<Unread>,
    #[prost(message, repeated, tag = "25")]
    functions: Vec<Unread>,
}

#[derive(Clone, PartialEq, Message)]
struct OperatorSetProto {
    #[prost(string, tag = "1")]
    domain: String,
    #[prost(int64, tag = "2")]
    version: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<TensorProto>,
    #[prost(message, repeated, tag = "15")]
    sparse_initializer: Vec<Unread>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    #[prost(string, tag = "4")]
    pub op_type: String,
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<AttributeProto>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct AttributeProto {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(int64, tag = "3")]
    pub i: i64,
    #[prost(int64, repeated, tag = "8")]
    pub ints: Vec<i64>,
    #[prost(message, optional, tag = "5")]
    t: Option<TensorProto>,
    #[prost(message, optional, tag = "6")]
    g: Option<Unread>,
    #[prost(message, repeated, tag = "10")]
    tensors: Vec<TensorProto>,
    #[prost(message, repeated, tag = "11")]
    graphs: Vec<Unread>,
    #[prost(message, optional, tag = "22")]
    sparse_tensor: Option<Unread>,
    #[prost(message, repeated, tag = "23")]
    sparse_tensors: Vec<Unread>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    pub dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    pub data_type: i32,
    #[prost(int32, repeated, tag = "5")]
    pub int32_data: Vec<i32>,
    #[prost(int64, repeated, tag = "7")]
    pub int64_data: Vec<i64>,
    #[prost(string, tag = "8")]
    pub name: String,
    #[prost(bytes = "vec", tag = "9")]
    pub raw_data: Vec<u8>,
    #[prost(message, repeated, tag = "13")]
    external_data: Vec<EntryProto>,
    #[prost(int32, tag = "14")]
    data_location: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct EntryProto {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// A message whose presence is all that matters.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Unread {}

/// What the weights of a graph come to once it is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GraphMemory {
    /// Bytes of all of them.
    pub weights: u64,
    /// Of that, what is computed from what is stored.
    pub folded: u64,
    /// The widest that anything between nodes becomes, vocabularies apart.
    pub widest: u64,
}

/// A weight, or what is computed from weights alone.
#[derive(Clone, Copy)]
struct Constant {
    n_values: u64,
    bytes: u64,
    widest: u64,
    is_folded: bool,
}

impl GraphMemory {
    fn of(graph: &GraphProto, n_words: u64) -> Self {
        let stored = graph.initializer.iter().map(|tensor| (tensor.name.as_str(), Constant::stored(tensor)));
        let mut constants: BTreeMap<&str, Constant> = stored.collect();
        let mut found = Self { weights: 0, folded: 0, widest: 0 };
        let mut counted = BTreeSet::new();
        for node in &graph.node {
            let taken = || node.input.iter().filter(|name| !name.is_empty());
            if FOLDED.contains(&node.op_type.as_str()) && taken().all(|name| constants.contains_key(name.as_str())) {
                let largest = taken().filter_map(|name| constants.get(name.as_str())).max_by_key(|constant| constant.n_values);
                if let (Some(largest), Some(output)) = (largest.copied(), node.output.first()) {
                    constants.insert(output, Constant { bytes: 4 * largest.n_values, is_folded: true, ..largest });
                }
                continue;
            }
            // A matrix is packed for each of its products; all else lies there once.
            let packs = node.op_type.contains("MatMul") || node.op_type == "Gemm";
            for (name, constant) in taken().filter_map(|name| Some((name, constants.get(name.as_str())?))) {
                // Rows that are looked up stay in the mapped file, which makes room when it must.
                let is_mapped = node.op_type == "Gather" && !constant.is_folded;
                if packs || (!is_mapped && counted.insert(name)) {
                    found.weights += constant.bytes;
                    found.folded += if constant.is_folded { constant.bytes } else { 0 };
                }
                if packs && constant.widest != n_words {
                    found.widest = found.widest.max(constant.widest);
                }
            }
        }
        found
    }
}

/// Operators that ONNX Runtime computes once where all they take are weights.
const FOLDED: [&str; 6] = ["Cast", "DequantizeLinear", "Mul", "Reshape", "Transpose", "Unsqueeze"];

impl Constant {
    fn stored(tensor: &TensorProto) -> Self {
        let sizes = || tensor.dims.iter().map(|size| u64::try_from(*size).unwrap_or(0));
        let n_values: u64 = sizes().product();
        let bytes = match tensor.data_type {
            10 | 16 | 4 | 5 => 2 * n_values,
            2 | 3 | 9 => n_values,
            7 | 11 | 13 => 8 * n_values,
            // Two to a byte.
            21 | 22 => n_values.div_ceil(2),
            _ => 4 * n_values,
        };
        Self { n_values, bytes, widest: sizes().max().unwrap_or(0), is_folded: false }
    }
}

/// A graph as its file has it.
struct Graph<'a> {
    bundle: &'a Bundle,
    file: &'a str,
    proto: GraphProto,
}

impl Bundle {
    /// Checks the graphs, and finds out how many words the Q-Former knows, where it reads any.
    pub(super) fn check_onnx(&self) -> Result<Option<usize>, BundleError> {
        let mut opsets: BTreeMap<String, i64> = BTreeMap::new();
        let mut n_words: Option<usize> = None;
        for (name, facts) in &self.facts.graphs {
            let model = self.read(&facts.file, MAX_GRAPH_BYTES)?;
            let not_onnx = |error: prost::DecodeError| self.refused(&facts.file, format!("is not an ONNX file: {error}"));
            let model = ModelProto::decode(model.as_slice()).map_err(not_onnx)?;
            if !model.functions.is_empty() || !model.training_info.is_empty() {
                return Err(self.refused(&facts.file, "has functions or training information, which no bundle needs".into()));
            }
            for used in model.opset_import {
                let domain = if used.domain == "ai.onnx" { String::new() } else { used.domain };
                let version = opsets.entry(domain).or_default();
                *version = used.version.max(*version);
            }
            let graph = Graph { bundle: self, file: &facts.file, proto: model.graph.unwrap_or_default() };
            graph.check_nodes()?;
            graph.check_weights()?;
            match name.as_str() {
                "decoder" => graph.check_decoder()?,
                "encoder" => graph.check_embedding()?,
                _ => n_words = [n_words, graph.check_text()?].into_iter().flatten().min(),
            }
        }
        self.check_opsets(&opsets)?;
        Ok(n_words)
    }

    /// The operators that a graph needs.
    ///
    /// # Panics
    /// As [`graph`](Self::graph).
    pub fn operators(&self, graph: &str) -> Result<BTreeSet<String>, BundleError> {
        Ok(self.proto(graph)?.node.into_iter().map(|node| node.op_type).collect())
    }

    /// What the weights of a graph come to.
    pub(super) fn graph_memory(&self, graph: &str) -> Result<GraphMemory, BundleError> {
        let n_words = self.facts.language.as_ref().map_or(0, |language| language.vocab_size as u64);
        Ok(GraphMemory::of(&self.proto(graph)?, n_words))
    }

    pub(super) fn proto(&self, graph: &str) -> Result<GraphProto, BundleError> {
        let file = &self.graph(graph).file;
        let not_onnx = |error: prost::DecodeError| self.refused(file, format!("is not an ONNX file: {error}"));
        let model = ModelProto::decode(self.read(file, MAX_GRAPH_BYTES)?.as_slice()).map_err(not_onnx)?;
        Ok(model.graph.unwrap_or_default())
    }

    fn check_opsets(&self, used: &BTreeMap<String, i64>) -> Result<(), BundleError> {
        let requires = &self.facts.requires;
        for (domain, version) in used {
            let listed = requires.domains.iter().any(|listed| listed == domain);
            self.ensure(listed, || {
                (format!("domains {:?} in `requires`", requires.domains), format!("the graphs use `{domain}` besides"))
            })?;
            self.ensure(!domain.is_empty() || *version == i64::from(requires.opset), || {
                (format!("opset {} in `requires`", requires.opset), format!("the graphs use {version}"))
            })?;
        }
        Ok(())
    }

    pub(super) fn refused(&self, file: &str, reason: String) -> BundleError {
        BundleError::Refused { folder: self.folder.clone(), file: file.into(), reason }
    }
}

impl Graph<'_> {
    /// Nodes run one after the other: nothing repeats, and nothing reads a file of its own.
    fn check_nodes(&self) -> Result<(), BundleError> {
        for node in &self.proto.node {
            let nested = |a: &AttributeProto| a.g.is_some() || !a.graphs.is_empty();
            let sparse = |a: &AttributeProto| a.sparse_tensor.is_some() || !a.sparse_tensors.is_empty();
            if node.op_type == "EPContext" || node.attribute.iter().any(|attribute| nested(attribute) || sparse(attribute)) {
                let found = "graphs of a bundle have no subgraphs, sparse tensors or foreign contexts";
                return Err(self.refused(format!("has a node {} that this engine does not run: {found}", node.op_type)));
            }
        }
        if self.proto.sparse_initializer.is_empty() { Ok(()) } else { Err(self.refused("has sparse weights".into())) }
    }

    /// Weights lie in files that the facts list, inside them.
    fn check_weights(&self) -> Result<(), BundleError> {
        let attributes = self.proto.node.iter().flat_map(|node| &node.attribute);
        let constants = attributes.flat_map(|attribute| attribute.t.iter().chain(&attribute.tensors));
        self.proto.initializer.iter().chain(constants).try_for_each(|tensor| self.check_stored(tensor))
    }

    fn check_stored(&self, tensor: &TensorProto) -> Result<(), BundleError> {
        if tensor.external_data.is_empty() && tensor.data_location == 0 {
            return Ok(());
        }
        let value = |key: &str| tensor.external_data.iter().rev().find(|entry| entry.key == key).map(|entry| entry.value.as_str());
        let location = value("location").unwrap_or_default();
        let beside = Path::new(self.file).parent().unwrap_or(Path::new("")).join(location);
        let file = beside.to_string_lossy().into_owned();
        let said = |reason: String| self.refused(format!("weights `{}` lie in `{location}`, {reason}", tensor.name));
        let Some(room) = self.bundle.facts.files.get(&file).map(|facts| facts.bytes) else {
            return Err(said(format!("which {} does not list", super::FACTS)));
        };
        let number = |key| value(key).map_or(Some(0), |value: &str| value.parse::<u64>().ok());
        let (Some(offset), Some(length)) = (number("offset"), number("length")) else {
            return Err(said("at an offset or of a length that is no number".into()));
        };
        match offset.checked_add(length) {
            Some(end) if end <= room => Ok(()),
            _ => Err(said(format!("{length} bytes from {offset} on, but that has {room} bytes"))),
        }
    }

    /// Every token of the vocabulary has an embedding.
    fn check_embedding(&self) -> Result<(), BundleError> {
        let wanted = self.bundle.facts.language.as_ref().map(|language| language.vocab_size);
        let found = self.rows("input_ids", "Gather");
        self.bundle.ensure(found.is_none_or(|found| wanted == Some(found)), || {
            let said = format!("language.vocab_size is {}", wanted.unwrap_or_default());
            (said, format!("the embedding table in {} has {} rows", self.file, found.unwrap_or_default()))
        })
    }

    /// Keys and values go on in the order in which they come, and there is a position for every token.
    fn check_decoder(&self) -> Result<(), BundleError> {
        let facts = &self.bundle.facts;
        let Some(language) = &facts.language else { return Ok(()) };
        self.check_embedding()?;
        let cache = &language.kv_cache;
        for layer in 0..cache.n_layers {
            let [key, value] = Side::ALL.map(|side| (cache.past(layer, side), cache.present(layer, side)));
            let place = |names: &[String], name: &str| names.iter().position(|found| found == name);
            let both = |node: &NodeProto| {
                let taken = place(&node.input, &key.0)? < place(&node.input, &value.0)?;
                let given = place(&node.output, &key.1)? < place(&node.output, &value.1)?;
                Some(taken == given)
            };
            // A node for each, which takes and gives nothing of the other.
            let alone = |(past, present): &(String, String), other: &(String, String)| {
                let is_alone = |node: &NodeProto| !node.input.contains(&other.0) && !node.output.contains(&other.1);
                self.proto.node.iter().any(|n| n.input.contains(past) && n.output.contains(present) && is_alone(n))
            };
            let carried =
                self.proto.node.iter().any(|node| both(node) == Some(true)) || (alone(&key, &value) && alone(&value, &key));
            self.bundle.ensure(carried, || {
                let said = format!("`{}` carries on `{}`, `{}` carries on `{}`", key.1, key.0, value.1, value.0);
                (said, format!("no node of {} does that", self.file))
            })?;
        }
        // Positions of the Q-Former's own text count behind the queries.
        let before = if facts.family == super::Family::Qformer { facts.qformer.n_queries } else { 0 };
        let tables = [self.rows("position_ids", "Gather"), self.rotations()];
        self.check_room("language.max_positions", language.max_positions, tables.into_iter().flatten().min().map(|n| n + before))
    }

    /// Every text that may be read has its positions, and what fills up short ones is a word. Gives the number of words.
    fn check_text(&self) -> Result<Option<usize>, BundleError> {
        let Some(text) = &self.bundle.facts.qformer.text else { return Ok(None) };
        let ids = ["question_ids", "input_ids"];
        let n_positions = ids.iter().find_map(|ids| self.rows(ids, "Slice"));
        self.check_room("qformer.text.max_positions", text.max_positions, n_positions)?;
        let n_words = ids.iter().find_map(|ids| self.rows(ids, "Gather"));
        self.check_room("qformer.text.pad", text.pad as usize, n_words.map(|n| n.saturating_sub(1)))?;
        Ok(n_words)
    }

    fn check_room(&self, name: &str, said: usize, room: Option<usize>) -> Result<(), BundleError> {
        self.bundle.ensure(room.is_none_or(|room| said <= room), || {
            (format!("{name} is {said}"), format!("the table in {} goes to {}", self.file, room.unwrap_or_default()))
        })
    }

    /// Rows of the table from which `operator` takes as many or those that the graph's input `chosen_by` says.
    fn rows(&self, chosen_by: &str, operator: &str) -> Option<usize> {
        let index = if operator == "Slice" { 2 } else { 1 };
        let chosen = |node: &&NodeProto| {
            node.op_type == operator
                && node.input.get(index).is_some_and(|index| self.origin(index, &["Cast", "Shape"]) == chosen_by)
        };
        let table = self.proto.node.iter().find(chosen)?.input.first()?;
        self.length(self.origin(table, &["Cast", "Mul"]))
    }

    /// Rows of the table of rotations that attention turns queries and keys by.
    fn rotations(&self) -> Option<usize> {
        let tables = self.proto.node.iter().filter(|node| node.op_type == "GroupQueryAttention");
        tables.filter_map(|node| node.input.get(7)).filter_map(|table| self.length(table)).min()
    }

    /// What a tensor is made of, through nodes of these kinds.
    fn origin<'a>(&'a self, name: &'a str, through: &[&str]) -> &'a str {
        let mut name = name;
        // Longer than any way through that ends: names of a broken graph may go round in circles.
        for _ in 0..8 {
            let made_by = |node: &&NodeProto| through.contains(&node.op_type.as_str()) && node.output.iter().any(|o| o == name);
            match self.proto.node.iter().find(made_by).and_then(|node| node.input.first()) {
                Some(before) => name = before,
                None => break,
            }
        }
        name
    }

    fn length(&self, name: &str) -> Option<usize> {
        let tensor = self.proto.initializer.iter().find(|tensor| tensor.name == name)?;
        usize::try_from(*tensor.dims.first()?).ok()
    }

    fn refused(&self, reason: String) -> BundleError {
        self.bundle.refused(self.file, reason)
    }
}
