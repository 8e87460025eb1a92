//! Operations of nodes that multiply matrices, and what attention reads and writes of keys and values.

use std::collections::BTreeMap;

use super::shapes::{attribute, first, input};
use super::{Problem, Value, times};
use crate::bundle::{Element, Node, Precision};

/// What a node has a part in.
#[derive(Default)]
pub(super) struct Found {
    pub operations: BTreeMap<Precision, u64>,
    pub cache_bytes: u64,
}

/// Sizes of an attention: of each query with every key that it sees there is a product, and of its share with the value another.
pub(super) struct Attention {
    /// Pairs of a query and a key that it sees, over the batch.
    pairs: usize,
    /// Width of all heads of a query together, and of what is attended to.
    query_width: usize,
    pub width: usize,
    /// Bytes of keys and values that lie in a cache.
    cache_bytes: u64,
    /// Operations of products with weights that the same node has.
    projected: usize,
}

/// The costs of a node whose sizes fit.
pub(super) fn of(node: &Node, inputs: &[Option<&Value>], outputs: &[Value]) -> Result<Found, Problem> {
    let (x, n_outputs) = (first(inputs)?, outputs[0].n());
    let multiplied =
        |depth: usize, precision| Found { operations: [(precision, times(&[2, n_outputs, depth]) as u64)].into(), cache_bytes: 0 };
    Ok(match node.operator.as_str() {
        "MatMul" | "FusedMatMul" | "Gemm" => multiplied(depth(node, x), float(x)?),
        "MatMulInteger" | "MatMulIntegerToFloat" | "DynamicQuantizeMatMul" | "QGemm" => multiplied(depth(node, x), Precision::Int8),
        "MatMulNBits" => multiplied(attribute(node, "K")?, blocks(attribute(node, "bits")?)?),
        "Conv" => multiplied(times(&input(inputs, 1)?.shape[1..]), float(x)?),
        "MultiHeadAttention" | "Attention" | "GroupQueryAttention" => {
            let Attention { pairs, query_width, width, cache_bytes, projected } = attention(node, inputs)?;
            let operations = times(&[2, pairs, query_width + width]).saturating_add(projected) as u64;
            Found { operations: [(float(x)?, operations)].into(), cache_bytes }
        }
        // Some positions of slots are written, and whoever multiplies with them reads them all.
        "ScatterElements" => Found { cache_bytes: x.bytes().saturating_add(input(inputs, 2)?.bytes()), ..Found::default() },
        _ => Found::default(),
    })
}

/// Numbers that are multiplied for each output.
fn depth(node: &Node, x: &Value) -> usize {
    let is_turned = node.attributes.get("transA").is_some_and(|numbers| numbers.first() == Some(&1));
    let rank = x.shape.len();
    x.shape[if is_turned { rank - 2 } else { rank - 1 }]
}

/// What ordinary products are computed in.
fn float(x: &Value) -> Result<Precision, Problem> {
    match x.element {
        Element::Float32 => Ok(Precision::Float32),
        Element::Float16 => Ok(Precision::Float16),
        Element::Bfloat16 => Ok(Precision::Bfloat16),
        other => Err(Problem::Unfit(format!("products of {other:?} are not known"))),
    }
}

fn blocks(bits: usize) -> Result<Precision, Problem> {
    match bits {
        8 => Ok(Precision::Int8Blocks),
        4 => Ok(Precision::Int4Blocks),
        _ => Err(Problem::Unfit(format!("weights of {bits} bits are not known"))),
    }
}

pub(super) fn attention(node: &Node, inputs: &[Option<&Value>]) -> Result<Attention, Problem> {
    match node.operator.as_str() {
        "GroupQueryAttention" => over_cache(node, inputs),
        "Attention" if input(inputs, 1)?.shape.len() == 2 => projected(node, inputs),
        _ => plain(node, inputs),
    }
}

/// Query, key and value, each `[batch, positions, width]`; keys and values may be `[batch, heads, positions, head width]`, and all three
/// may come as one.
fn plain(node: &Node, inputs: &[Option<&Value>]) -> Result<Attention, Problem> {
    let query = &first(inputs)?.shape;
    if inputs.iter().skip(if node.operator == "Attention" { 4 } else { 6 }).any(Option::is_some) {
        return Err("attention to what was kept is not known".into());
    }
    let [batch, rows, query_width] = query[..] else { return Err("a query has three axes".into()) };
    let of = |value: &Value| match value.shape[..] {
        [_, keys, width] => Ok((keys, width)),
        [_, heads, keys, width] => Ok((keys, times(&[heads, width]))),
        _ => Err(Problem::from("keys and values have three axes or four")),
    };
    let (keys, _) = of(input(inputs, 1)?)?;
    let (_, width) = of(input(inputs, 2)?)?;
    let is_causal = ["unidirectional", "is_causal"].iter().any(|name| node.attributes.get(*name).is_some_and(|n| n[0] == 1));
    let pairs = times(&[batch, if is_causal { behind(keys.saturating_sub(rows), rows) } else { times(&[rows, keys]) }]);
    Ok(Attention { pairs, query_width, width, cache_bytes: 0, projected: 0 })
}

/// With its own weights for query, key and value side by side.
fn projected(node: &Node, inputs: &[Option<&Value>]) -> Result<Attention, Problem> {
    let (x, weight) = (&first(inputs)?.shape, &input(inputs, 1)?.shape);
    let [batch, rows, depth] = x[..] else { return Err("attention takes three axes".into()) };
    let width = weight[1] / 3;
    let is_causal = node.attributes.get("unidirectional").is_some_and(|numbers| numbers[0] == 1);
    let pairs = times(&[batch, if is_causal { behind(0, rows) } else { times(&[rows, rows]) }]);
    Ok(Attention { pairs, query_width: width, width, cache_bytes: 0, projected: times(&[2, batch, rows, depth, weight[1]]) })
}

/// Over slots `[batch, heads, capacity, head width]`, to which new positions are added: each sees those before it and itself.
fn over_cache(node: &Node, inputs: &[Option<&Value>]) -> Result<Attention, Problem> {
    let (x, past) = (first(inputs)?, input(inputs, 3)?);
    let (&[batch, rows, _], &[_, kept_heads, _, head_width]) = (&x.shape[..], &past.shape[..]) else {
        return Err("attention takes three axes, and slots with four".into());
    };
    let total = input(inputs, 6)?.numbers.as_ref().and_then(|numbers| usize::try_from(*numbers.first()?).ok());
    let total = total.ok_or("how far attention looks is not known")?;
    let before = total.checked_sub(rows).ok_or("there are more new positions than positions")?;
    let width = times(&[attribute(node, "num_heads")?, head_width]);
    let cache_bytes = times(&[2, batch, kept_heads, total, head_width, past.element.size()]) as u64;
    Ok(Attention { pairs: times(&[batch, behind(before, rows)]), query_width: width, width, cache_bytes, projected: 0 })
}

/// Pairs of `rows` queries that follow each other with the keys before them and their own.
fn behind(before: usize, rows: usize) -> usize {
    times(&[rows, before]).saturating_add(times(&[rows, rows.saturating_add(1)]) / 2)
}
