//! What one run of a graph costs at least: operations of its products, by the type that they are computed in, and bytes that must move.
//!
//! Sizes of the inputs go from node to node; weights are never read. An operation is a multiplication or an addition, so that a product of
//! matrices has two for each pair of numbers. Weights count once, as they are when what is made of them alone was made (the runtime does so
//! once, when it loads), of tables only the rows that are looked up; inputs and outputs count once; of keys and values what attention reads and what it adds. What lies between the nodes counts
//! as nothing, for it may stay in caches.

mod products;
mod shapes;

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use products::Found;

use crate::bundle::{Bundle, BundleError, Dimension, Element, Node, Nodes, Precision, Stored, TensorFacts};

/// Sizes and numbers that the graph's file leaves open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    axes: BTreeMap<&'static str, usize>,
    numbers: BTreeMap<&'static str, i64>,
}

/// What a run costs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Cost {
    /// Multiplications and additions of products, by what they are computed in.
    #[schemars(with = "BTreeMap<String, u64>")]
    pub operations: BTreeMap<Precision, u64>,
    /// Bytes of weights, as the runtime has them: those that are stored in fewer bits and lifted when it loads count as lifted.
    pub weight_bytes: u64,
    /// Bytes of keys and values that are read and written.
    pub cache_bytes: u64,
    /// Bytes of all other inputs and outputs.
    pub tensor_bytes: u64,
}

/// Why costs are not known.
#[derive(Debug, thiserror::Error)]
pub enum CostError {
    /// The bundle is at fault.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The exporter uses what this module does not know.
    #[error("{graph}: what the operator {operator} costs is not known")]
    Operator {
        /// The graph.
        graph: String,
        /// The operator.
        operator: String,
    },
    /// An axis has no size.
    #[error("{graph}: the axis `{axis}` of `{input}` has no size")]
    Axis {
        /// The graph.
        graph: String,
        /// The input.
        input: String,
        /// The axis.
        axis: String,
    },
    /// Sizes do not fit.
    #[error("{graph}: sizes of `{node}` ({operator}) do not fit: {why}")]
    Sizes {
        /// The graph.
        graph: String,
        /// The node's first output.
        node: String,
        /// Its operator.
        operator: String,
        /// What does not fit.
        why: String,
    },
}

/// More than any memory holds: sizes beyond are a mistake.
const MOST_ELEMENTS: usize = 1 << 44;

/// What is known of a tensor.
#[derive(Clone, Debug)]
struct Value {
    shape: Vec<usize>,
    element: Element,
    /// The numbers themselves, where shapes may be made of them.
    numbers: Option<Vec<i64>>,
    /// Whether weights have made it alone, and inputs no part in it.
    is_weight: bool,
}

/// Why a node has no sizes.
enum Problem {
    Unknown,
    Unfit(String),
}

impl From<&str> for Problem {
    fn from(why: &str) -> Self {
        Self::Unfit(why.to_owned())
    }
}

impl Sizes {
    /// These axes.
    pub fn new(axes: impl IntoIterator<Item = (&'static str, usize)>) -> Self {
        Self { axes: axes.into_iter().collect(), numbers: BTreeMap::new() }
    }

    /// The same with an input that is this single number.
    #[must_use]
    pub fn with(mut self, input: &'static str, number: usize) -> Self {
        self.numbers.insert(input, number as i64);
        self
    }
}

impl Cost {
    /// Operations of all types.
    pub fn all_operations(&self) -> u64 {
        self.operations.values().sum()
    }

    /// All bytes.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.cache_bytes + self.tensor_bytes
    }
}

/// Of a run of the bundle's graph with inputs of these sizes.
///
/// # Panics
/// As [`Bundle::graph`].
pub fn cost(bundle: &Bundle, graph: &str, sizes: &Sizes) -> Result<Cost, CostError> {
    let (facts, nodes) = (bundle.graph(graph), bundle.nodes(graph)?);
    let language = bundle.facts().language.as_ref().filter(|_| graph == "decoder");
    let past = language.into_iter().flat_map(|l| l.kv_cache.tensors().map(|(layer, side)| l.kv_cache.past(layer, side)));
    let present = language.into_iter().flat_map(|l| l.kv_cache.tensors().map(|(layer, side)| l.kv_cache.present(layer, side)));
    let cross = language.and_then(|language| language.cross_attention.as_ref());
    let cross = cross.into_iter().flat_map(|cross| cross.tensors().map(|(layer, side)| cross.name(layer, side)));
    let roles = Roles { growing: past.chain(present).collect(), kept: cross.collect() };
    let mut run = Run { graph, nodes: &nodes, roles, values: BTreeMap::new(), read: BTreeMap::new(), cost: Cost::default() };
    run.begin(&facts.inputs, sizes)?;
    nodes.nodes.iter().try_for_each(|node| run.node(node))?;
    run.end(&facts.outputs, sizes)
}

/// Names of inputs and outputs that hold keys and values.
struct Roles {
    /// Slots that attention reads a part of and adds to.
    growing: BTreeSet<String>,
    /// What is read whole and stays.
    kept: BTreeSet<String>,
}

/// A graph on its way through.
struct Run<'a> {
    graph: &'a str,
    nodes: &'a Nodes,
    roles: Roles,
    values: BTreeMap<String, Value>,
    /// Of weights, as they are once what is made of them alone was made: bytes, and how much of them is read, at most once in the end.
    read: BTreeMap<String, (u64, f64)>,
    cost: Cost,
}

impl Run<'_> {
    fn begin(&mut self, inputs: &[TensorFacts], sizes: &Sizes) -> Result<(), CostError> {
        for Stored { name, shape, element, values } in self.nodes.stored.iter().cloned() {
            self.values.insert(name, Value { shape, element, numbers: values, is_weight: true });
        }
        for input in inputs {
            let size = |axis: &Dimension| match axis {
                Dimension::Fixed(size) => Ok(*size),
                Dimension::Dynamic(axis) => sizes.axes.get(axis.as_str()).copied().ok_or_else(|| CostError::Axis {
                    graph: self.graph.into(),
                    input: input.name.clone(),
                    axis: axis.clone(),
                }),
            };
            let shape = input.shape.iter().map(size).collect::<Result<Vec<_>, _>>()?;
            let numbers = sizes.numbers.get(input.name.as_str()).map(|number| vec![*number]);
            let value = Value { shape, element: input.dtype.into(), numbers, is_weight: false };
            self.moves(&input.name, &value);
            self.values.insert(input.name.clone(), value);
        }
        Ok(())
    }

    /// Counts an input or output.
    fn moves(&mut self, name: &str, value: &Value) {
        match name {
            _ if self.roles.growing.contains(name) => {}
            _ if self.roles.kept.contains(name) => self.cost.cache_bytes += value.bytes(),
            _ => self.cost.tensor_bytes += value.bytes(),
        }
    }

    fn node(&mut self, node: &Node) -> Result<(), CostError> {
        let known = |name: &String| if name.is_empty() { None } else { self.values.get(name) };
        let inputs: Vec<Option<&Value>> = node.inputs.iter().map(known).collect();
        let missing = node.inputs.iter().zip(&inputs).find(|(name, value)| !name.is_empty() && value.is_none());
        if let Some((name, _)) = missing {
            return Err(self.problem(node, Problem::Unfit(format!("`{name}` comes from nowhere"))));
        }
        let outputs = shapes::outputs(node, &inputs).map_err(|problem| self.problem(node, problem))?;
        if outputs.is_empty() || outputs.iter().any(|value| value.n() > MOST_ELEMENTS) {
            return Err(self.problem(node, "no memory holds what comes out".into()));
        }
        let is_weight = inputs.iter().flatten().next().is_some() && inputs.iter().flatten().all(|value| value.is_weight);
        // What is made of weights alone is made once, before any run.
        if !is_weight {
            let found = products::of(node, &inputs, &outputs).map_err(|problem| self.problem(node, problem))?;
            let read: Vec<(String, u64, f64)> = reads(node, &inputs, &outputs).collect();
            self.add(found, read);
        }
        for (name, value) in node.outputs.iter().zip(outputs).filter(|(name, _)| !name.is_empty()) {
            self.values.insert(name.clone(), Value { is_weight, ..value });
        }
        Ok(())
    }

    fn add(&mut self, found: Found, read: Vec<(String, u64, f64)>) {
        for (weight, n_bytes, share) in read {
            self.read.entry(weight).or_insert((n_bytes, 0.0)).1 += share;
        }
        for (precision, n) in found.operations {
            let sum = self.cost.operations.entry(precision).or_default();
            *sum = sum.saturating_add(n);
        }
        self.cost.cache_bytes = self.cost.cache_bytes.saturating_add(found.cache_bytes);
    }

    fn end(mut self, outputs: &[TensorFacts], sizes: &Sizes) -> Result<Cost, CostError> {
        for output in outputs {
            let value = self.values.get(&output.name).cloned();
            let wanted = output.shape.iter().map(|axis| match axis {
                Dimension::Fixed(size) => Some(*size),
                Dimension::Dynamic(axis) => sizes.axes.get(axis.as_str()).copied(),
            });
            let fits = |value: &Value| {
                value.shape.len() == output.shape.len() && wanted.zip(&value.shape).all(|(w, found)| w.is_none_or(|w| w == *found))
            };
            let Some(value) = value.clone().filter(fits) else {
                let node = Node { operator: "output".into(), outputs: vec![output.name.clone()], ..Node::default() };
                let found = value.map_or("nothing".into(), |value| format!("{:?}", value.shape));
                return Err(self.problem(&node, Problem::Unfit(format!("it comes out as {found}, the bundle says {output}"))));
            };
            self.moves(&output.name, &value);
        }
        let read = self.read.values().map(|(n_bytes, share)| *n_bytes as f64 * share.min(1.0));
        self.cost.weight_bytes = read.sum::<f64>().round() as u64;
        Ok(self.cost)
    }

    fn problem(&self, node: &Node, problem: Problem) -> CostError {
        let (graph, operator) = (self.graph.to_owned(), node.operator.clone());
        match problem {
            Problem::Unknown => CostError::Operator { graph, operator },
            Problem::Unfit(why) => {
                CostError::Sizes { graph, operator, node: node.outputs.first().cloned().unwrap_or_default(), why }
            }
        }
    }
}

impl Value {
    fn n(&self) -> usize {
        times(&self.shape)
    }

    fn bytes(&self) -> u64 {
        self.n().saturating_mul(self.element.size()) as u64
    }
}

/// Their product, or the largest number where it is larger.
fn times(numbers: &[usize]) -> usize {
    numbers.iter().fold(1, |product: usize, number| product.saturating_mul(*number))
}

/// Which weights a node reads, with their bytes and how much of each: all of it, or of a table what is looked up. Numbers that sizes are made
/// of are no weights.
fn reads<'a>(node: &'a Node, inputs: &'a [Option<&Value>], outputs: &'a [Value]) -> impl Iterator<Item = (String, u64, f64)> + 'a {
    let n_rows = |table: &Value| table.shape.first().map_or(1, |n| (*n).max(1)) as f64;
    let share = move |at: usize, value: &Value| match (node.operator.as_str(), at) {
        ("Gather" | "GatherElements" | "Slice", 0) => outputs[0].n() as f64 / value.n().max(1) as f64,
        ("RotaryEmbedding", 2 | 3) => inputs[1].map_or(1.0, |positions| positions.n() as f64 / n_rows(value)),
        ("GroupQueryAttention", 7 | 8) => inputs[0].map_or(1.0, |x| times(&x.shape[..2]) as f64 / n_rows(value)),
        _ => 1.0,
    };
    let values = inputs.iter().enumerate().filter_map(|(at, value)| Some((at, (*value)?)));
    let weights = values.filter(|(_, value)| value.is_weight && value.numbers.is_none());
    weights.map(move |(at, value)| (node.inputs[at].clone(), value.bytes(), share(at, value).min(1.0)))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
    }

    fn bundle(folder: &str) -> Bundle {
        Bundle::open(&root().join(folder)).expect("a bundle")
    }

    /// `rows` rows that read `n_queries` and `n_tokens` behind `past` positions.
    fn decoder(rows: usize, n_queries: usize, n_tokens: usize, past: usize) -> Sizes {
        let sequence = n_queries + n_tokens;
        let axes = [("rows", rows), ("slots", rows), ("n_queries", n_queries), ("n_tokens", n_tokens), ("sequence", sequence)];
        let others = [("n_logits", 1), ("capacity", (past + sequence).next_multiple_of(64)), ("n_encoder", 9)];
        Sizes::new(axes.into_iter().chain(others)).with("total_sequence_length", past + sequence)
    }

    /// `BLIP2_BUNDLES` names a folder with more of them.
    #[test]
    fn every_graph_of_every_bundle_is_known() {
        let more = std::env::var_os("BLIP2_BUNDLES").map(PathBuf::from);
        let folders = ["tests/bundles", "models"].map(|folder| root().join(folder)).into_iter().chain(more);
        let bundles = folders
            .flat_map(|folder| std::fs::read_dir(folder).expect("a folder"))
            .flatten()
            .filter(|entry| entry.path().join("bundle.json").exists());
        let mut n_graphs = 0;
        for folder in bundles.map(|entry| entry.path()) {
            let bundle = Bundle::open(&folder).expect("a bundle");
            for name in bundle.facts().graphs.keys() {
                let sizes = match name.as_str() {
                    "decoder" => decoder(2, 3, 1, 5),
                    _ => Sizes::new([("batch", 2), ("question", 4), ("sequence", 7), ("n_tokens", 4), ("n_queries", 3)]),
                };
                let found = cost(&bundle, name, &sizes).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
                assert!(found.all_operations() > 0 && found.weight_bytes > 0 && found.tensor_bytes > 0, "{name}: {found:?}");
                n_graphs += 1;
            }
        }
        assert!(n_graphs > 50, "{n_graphs}");
    }

    #[test]
    fn an_image_encoder_costs_what_is_reckoned_by_hand() {
        let found = cost(&bundle("tests/bundles/vqa-opt"), "vision", &Sizes::new([("batch", 1)])).expect("costs");
        // 4 patches of 3×14×14 and a class token, width 32, two layers with 48 in between, and 5×5 pairs that attend.
        let layer = 2 * 5 * (4 * 32 * 32 + 2 * 32 * 48) + 4 * 5 * 5 * 32;
        let operations = 2 * 4 * 32 * 588 + 2 * layer;
        // Patches, positions and the class token, and of a layer norms, products and what is added behind them: most are stored in 16 bits
        // and lifted to 32.
        let layer = 2 * 64 + 4 * (32 * 32 + 32) + 2 * 32 * 48 + 48 + 32;
        let weights = 4 * (32 * 588 + 32 + 2 * layer + 64 + 4 * 32 + 32);
        let tensors = 4 * (3 * 28 * 28 + 5 * 32);
        let expected = Cost {
            operations: [(Precision::Float32, operations)].into(),
            weight_bytes: weights,
            cache_bytes: 0,
            tensor_bytes: tensors,
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn a_decode_step_reads_all_weights_and_of_tables_a_row() {
        let found = cost(&bundle("tests/bundles/vqa-opt"), "decoder", &decoder(3, 0, 1, 48)).expect("costs");
        let layer = 32 * 96 + 32 * 32 + 2 * 32 * 64;
        let operations = 3 * (2 * (2 * layer + 32 * 321) + 2 * 4 * 32 * 49);
        assert_eq!(found.operations, [(Precision::Float32, operations)].into());
        // Keys and values of two layers, 48 positions read and one written.
        assert_eq!(found.cache_bytes, 3 * 2 * 2 * 32 * 49 * 4);
        let beside = 2 * (4 * 32 + 96 + 32 + 64 + 32) + 2 * 32; // norms and what is added
        let looked_up = 3 * 32 * 4 + 3 * 32 * 2; // of 128 positions and 321 embeddings; these are lifted once they are looked up
        let small = 3 * 4; // which position has logits
        assert_eq!(found.weight_bytes, 4 * (2 * layer + 32 * 321 + beside) + looked_up + small);
    }

    /// Elements of all matrices that are multiplied: those of more than one axis but tables, by their numbers of rows.
    fn n_weights(bundle: &Bundle, graph: &str, tables: &[usize]) -> u64 {
        let (nodes, mut tables) = (bundle.nodes(graph).expect("nodes"), tables.to_vec());
        let mut is_table = |stored: &Stored| {
            let at = tables.iter().position(|rows| *rows == stored.shape[0]);
            at.map(|at| tables.remove(at)).is_some()
        };
        let matrices = nodes.stored.iter().filter(|stored| stored.shape.len() > 1 && stored.element != Element::Int64);
        matrices.filter(|stored| !is_table(stored)).map(|stored| stored.shape.iter().product::<usize>() as u64).sum()
    }

    #[test]
    fn operations_agree_with_what_parameters_and_positions_come_to() {
        let close = |found: u64, expected: u64, what: &str| {
            assert!((found as f64 / expected as f64 - 1.0).abs() < 0.02, "{what}: {found} {expected}");
        };
        let bundle = bundle("models/demo-opt");
        let facts = bundle.facts();
        let (n, width) = (facts.vision.n_positions as u64, facts.vision.hidden as u64);
        let n_layers =
            bundle.nodes("vision").expect("nodes").nodes.iter().filter(|node| node.operator == "MultiHeadAttention").count();
        // The patches are one fewer than the positions; the two tables are of one row each.
        let found = cost(&bundle, "vision", &Sizes::new([("batch", 4)])).expect("costs").all_operations();
        let expected = 4 * (2 * n_weights(&bundle, "vision", &[1, 1]) * n + 4 * n_layers as u64 * n * n * width);
        close(found, expected, "vision");
        let language = bundle.language();
        let (vocabulary, width) = (language.vocab_size, language.hidden as u64);
        let weights = n_weights(&bundle, "decoder", &[vocabulary, language.max_positions]);
        let attention = 4 * language.kv_cache.n_layers as u64 * width;
        let step = cost(&bundle, "decoder", &decoder(5, 0, 1, 99)).expect("costs").all_operations();
        close(step, 5 * (2 * weights + attention * 100), "step");
        let prefill = cost(&bundle, "decoder", &decoder(1, 32, 8, 0)).expect("costs").all_operations();
        // Logits are of the last position alone, and a position sees half of the others on average.
        let expected = 40 * 2 * (weights - vocabulary as u64 * width) + 2 * vocabulary as u64 * width + attention * 40 * 41 / 2;
        close(prefill, expected, "prefill");
    }

    /// One node over inputs of these shapes, the second of which is a weight.
    fn alone(operator: &str, attributes: &[(&str, i64)], shapes: &[&[usize]], element: Element) -> Result<Cost, CostError> {
        let stored =
            |(at, shape): (usize, &&[usize])| Stored { name: at.to_string(), shape: shape.to_vec(), element, values: None };
        let nodes = Nodes {
            nodes: vec![Node {
                operator: operator.into(),
                inputs: (0..shapes.len()).map(|at| at.to_string()).collect(),
                outputs: vec!["y".into()],
                attributes: attributes.iter().map(|(name, number)| ((*name).to_owned(), vec![*number])).collect(),
            }],
            stored: shapes.iter().enumerate().skip(1).map(stored).collect(),
        };
        let x = TensorFacts {
            name: "0".into(),
            dtype: crate::bundle::Dtype::Float32,
            shape: shapes[0].iter().map(|size| Dimension::Fixed(*size)).collect(),
        };
        let mut run = Run {
            graph: "alone",
            nodes: &nodes,
            roles: Roles { growing: BTreeSet::new(), kept: BTreeSet::new() },
            values: BTreeMap::new(),
            read: BTreeMap::new(),
            cost: Cost::default(),
        };
        run.begin(&[x], &Sizes::default())?;
        nodes.nodes.iter().try_for_each(|node| run.node(node))?;
        run.end(&[], &Sizes::default())
    }

    #[test]
    fn products_of_every_kind_are_counted() {
        use Precision::{Float32, Int4Blocks, Int8, Int8Blocks};
        let blocks = |bits| [("K", 64), ("N", 10), ("bits", bits), ("block_size", 32)];
        for (operator, attributes, shapes, element, precision, operations) in [
            ("MatMul", &[][..], &[&[2, 3, 4][..], &[4, 5]][..], Element::Float32, Float32, 2 * 2 * 3 * 4 * 5),
            ("FusedMatMul", &[("transB", 1)], &[&[2, 3, 4], &[5, 4]], Element::Float32, Float32, 2 * 2 * 3 * 4 * 5),
            ("Gemm", &[("transA", 1)], &[&[4, 3], &[4, 5]], Element::Float32, Float32, 2 * 3 * 4 * 5),
            ("MatMulInteger", &[], &[&[3, 4], &[4, 5]], Element::Int8, Int8, 2 * 3 * 4 * 5),
            ("DynamicQuantizeMatMul", &[], &[&[3, 4], &[4, 5]], Element::Int8, Int8, 2 * 3 * 4 * 5),
            ("MatMulNBits", &blocks(8), &[&[7, 64], &[10, 2, 32]], Element::Uint8, Int8Blocks, 2 * 7 * 64 * 10),
            ("MatMulNBits", &blocks(4), &[&[7, 64], &[10, 2, 16]], Element::Uint8, Int4Blocks, 2 * 7 * 64 * 10),
            ("Conv", &[("group", 1)], &[&[2, 3, 8, 8], &[6, 3, 2, 2]], Element::Float32, Float32, 2 * 2 * 6 * 49 * 12),
            // Query and key of 12 together, then shares and values; the last sees itself and those before it.
            ("MultiHeadAttention", &[], &[&[2, 5, 12], &[2, 7, 12], &[2, 7, 12]], Element::Float32, Float32, 2 * 5 * 7 * 2 * 24),
            (
                "MultiHeadAttention",
                &[],
                &[&[2, 5, 12], &[2, 3, 7, 4], &[2, 3, 7, 4]],
                Element::Float32,
                Float32,
                2 * 5 * 7 * 2 * 24,
            ),
            ("Attention", &[("is_causal", 1)], &[&[1, 5, 12], &[1, 5, 12], &[1, 5, 12]], Element::Float32, Float32, 15 * 2 * 24),
            ("Attention", &[], &[&[1, 5, 12], &[12, 36]], Element::Float32, Float32, 2 * 5 * 12 * 36 + 25 * 2 * 24),
        ] {
            let found = alone(operator, attributes, shapes, element).expect(operator);
            assert_eq!(found.operations, [(precision, operations as u64)].into(), "{operator} {shapes:?}");
            let weights = shapes[1..].iter().map(|shape| shape.iter().product::<usize>() * element.size()).sum::<usize>();
            assert_eq!(found.weight_bytes, weights as u64, "{operator}");
        }
    }

    #[test]
    fn what_is_not_known_is_named() {
        let said = |found: Result<Cost, CostError>| found.expect_err("it is not known").to_string();
        assert_eq!(said(alone("Einsum", &[], &[&[2]], Element::Float32)), "alone: what the operator Einsum costs is not known");
        let found = said(alone("MatMul", &[], &[&[2, 3], &[4, 5]], Element::Float32));
        assert_eq!(found, "alone: sizes of `y` (MatMul) do not fit: [2, 3] is not multiplied with [4, 5]");
        let found = said(alone("MatMul", &[], &[&[1 << 40, 1], &[1, 1 << 40]], Element::Float32));
        assert!(found.ends_with("no memory holds what comes out"), "{found}");
        let found = alone("Conv", &[("strides", 0), ("pads", -9)], &[&[1, 1, 4, 4], &[1, 1, 0, 2]], Element::Float32);
        assert!(said(found).contains("Conv"));
        let found = said(alone("MatMulNBits", &[("K", 3), ("N", 5), ("bits", 2)], &[&[2, 3], &[4, 5]], Element::Uint8));
        assert!(found.ends_with("weights of 2 bits are not known"), "{found}");
        let found = said(cost(&bundle("tests/bundles/t5"), "vision", &Sizes::default()));
        assert_eq!(found, "vision: the axis `batch` of `pixel_values` has no size");
    }
}
