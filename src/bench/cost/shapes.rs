//! What each operator makes of the sizes of its inputs. Those are known that graphs of bundles have, and the other forms of their products.

use super::products::attention;
use super::{Problem, Value, times};
use crate::bundle::{Element, Node};

/// No tensor has as many, so more numbers are no shape.
const MOST_AXES: usize = 64;

type Inputs<'a> = &'a [Option<&'a Value>];

/// What a node gives.
pub(super) fn outputs(node: &Node, inputs: Inputs<'_>) -> Result<Vec<Value>, Problem> {
    let one = |value: Value| Ok(vec![value]);
    match node.operator.as_str() {
        "Abs"
        | "Clip"
        | "Gelu"
        | "Identity"
        | "LayerNormalization"
        | "QuickGelu"
        | "Relu"
        | "RotaryEmbedding"
        | "ScatterElements"
        | "Sigmoid"
        | "SimplifiedLayerNormalization"
        | "Softmax" => one(plain(first(inputs)?)),
        "QuantizeLinear" => one(Value { element: input(inputs, 2)?.element, ..plain(first(inputs)?) }),
        "Cast" => cast(node, first(inputs)?).and_then(one),
        "Add" | "Sub" | "Mul" | "Div" | "Max" => one(Value { element: first(inputs)?.element, ..broadcast(inputs)? }),
        "Equal" | "Less" | "LessOrEqual" => one(Value { element: Element::Bool, ..broadcast(inputs)? }),
        "Where" => one(Value { element: input(inputs, 1)?.element, ..broadcast(inputs)? }),
        "Concat" => concat(node, inputs).and_then(one),
        "Expand" => expand(first(inputs)?, numbers(inputs, 1)?).and_then(one),
        "Gather" => gather(node, first(inputs)?, input(inputs, 1)?).and_then(one),
        "GatherElements" => one(Value { shape: input(inputs, 1)?.shape.clone(), ..plain(first(inputs)?) }),
        "Pad" => pad(first(inputs)?, numbers(inputs, 1)?).and_then(one),
        "ReduceL2" | "ReduceMax" | "ReduceMean" => reduce(node, inputs).and_then(one),
        "Reshape" => reshape(first(inputs)?, numbers(inputs, 1)?).and_then(one),
        "Shape" => one(shape(node, first(inputs)?)),
        "Slice" => slice(inputs).and_then(one),
        "Split" => split(node, inputs),
        "Transpose" => transpose(node, first(inputs)?).and_then(one),
        "Unsqueeze" => unsqueeze(first(inputs)?, numbers(inputs, 1)?).and_then(one),
        _ => product(node, inputs),
    }
}

fn product(node: &Node, inputs: Inputs<'_>) -> Result<Vec<Value>, Problem> {
    let x = first(inputs)?;
    let of = |shape: Vec<usize>, element| Ok(vec![Value { shape, element, numbers: None, is_weight: false }]);
    match node.operator.as_str() {
        "MatMul" | "FusedMatMul" => of(matrices(node, x, input(inputs, 1)?)?, x.element),
        "MatMulInteger" => of(matrices(node, x, input(inputs, 1)?)?, Element::Int32),
        "MatMulIntegerToFloat" => of(matrices(node, x, input(inputs, 1)?)?, input(inputs, 2)?.element),
        "DynamicQuantizeMatMul" => of(matrices(node, x, input(inputs, 1)?)?, x.element),
        "Gemm" | "QGemm" => {
            let weight = input(inputs, if node.operator == "Gemm" { 1 } else { 3 })?;
            of(matrices(node, x, weight)?, x.element)
        }
        "MatMulNBits" => of([&x.shape[..x.shape.len().saturating_sub(1)], &[attribute(node, "N")?]].concat(), x.element),
        "Conv" => of(convolution(node, x, input(inputs, 1)?)?, x.element),
        "MultiHeadAttention" | "Attention" | "GroupQueryAttention" => {
            let width = attention(node, inputs)?.width;
            let rows = x.shape.get(..2).ok_or("attention takes three axes")?;
            let attended = Value { shape: [rows, &[width]].concat(), element: x.element, numbers: None, is_weight: false };
            let carried = [3, 4].into_iter().filter_map(|at| inputs.get(at).copied().flatten()).map(plain);
            let carries = node.operator == "GroupQueryAttention";
            Ok(std::iter::once(attended).chain(carried.filter(|_| carries)).collect())
        }
        _ => Err(Problem::Unknown),
    }
}

pub(super) fn first<'a>(inputs: &[Option<&'a Value>]) -> Result<&'a Value, Problem> {
    input(inputs, 0)
}

pub(super) fn input<'a>(inputs: &[Option<&'a Value>], at: usize) -> Result<&'a Value, Problem> {
    inputs.get(at).copied().flatten().ok_or_else(|| Problem::Unfit(format!("input {at} is missing")))
}

/// A whole number of a node that must be there.
pub(super) fn attribute(node: &Node, name: &str) -> Result<usize, Problem> {
    let found = node.attributes.get(name).and_then(|numbers| numbers.first());
    found.and_then(|number| usize::try_from(*number).ok()).ok_or_else(|| Problem::Unfit(format!("`{name}` is missing")))
}

fn flag(node: &Node, name: &str) -> bool {
    node.attributes.get(name).is_some_and(|numbers| numbers.first() == Some(&1))
}

fn plain(value: &Value) -> Value {
    Value { numbers: None, is_weight: false, ..value.clone() }
}

fn numbers<'a>(inputs: &[Option<&'a Value>], at: usize) -> Result<&'a [i64], Problem> {
    let numbers = input(inputs, at)?.numbers.as_deref();
    numbers.ok_or_else(|| Problem::Unfit(format!("the numbers of input {at} are not known")))
}

/// An axis that may count from the end.
fn axis(number: i64, rank: usize) -> Result<usize, Problem> {
    let found = if number < 0 { number + rank as i64 } else { number };
    usize::try_from(found).ok().filter(|axis| *axis < rank).ok_or_else(|| Problem::Unfit(format!("there is no axis {number}")))
}

fn axis_of(node: &Node, default: i64, rank: usize) -> Result<usize, Problem> {
    axis(node.attributes.get("axis").and_then(|numbers| numbers.first()).copied().unwrap_or(default), rank)
}

fn cast(node: &Node, x: &Value) -> Result<Value, Problem> {
    let code = attribute(node, "to")? as i64;
    let element = Element::of(code).ok_or_else(|| Problem::Unfit(format!("there are no numbers of type {code}")))?;
    Ok(Value { element, numbers: x.numbers.clone(), ..plain(x) })
}

fn broadcast(inputs: Inputs<'_>) -> Result<Value, Problem> {
    let shapes: Vec<&[usize]> = inputs.iter().flatten().map(|value| value.shape.as_slice()).collect();
    Ok(Value { shape: together(&shapes)?, ..plain(first(inputs)?) })
}

fn together(shapes: &[&[usize]]) -> Result<Vec<usize>, Problem> {
    let rank = shapes.iter().map(|shape| shape.len()).max().unwrap_or(0);
    let size = |axis: usize| {
        let sizes = shapes.iter().filter_map(|shape| shape.get((axis + shape.len()).checked_sub(rank)?));
        let (mut found, mut fits) = (1, true);
        for size in sizes.filter(|size| **size != 1) {
            fits &= found == 1 || found == *size;
            found = *size;
        }
        if fits { Ok(found) } else { Err(Problem::Unfit(format!("{shapes:?} are not alike"))) }
    };
    (0..rank).map(size).collect()
}

fn concat(node: &Node, inputs: Inputs<'_>) -> Result<Value, Problem> {
    let x = first(inputs)?;
    let at = axis_of(node, 0, x.shape.len())?;
    let mut shape = x.shape.clone();
    shape[at] = 0;
    for value in inputs.iter().flatten() {
        let alike = value.shape.len() == shape.len() && (0..shape.len()).all(|axis| axis == at || value.shape[axis] == shape[axis]);
        if !alike {
            return Err(Problem::Unfit(format!("{:?} and {:?} cannot be put together", x.shape, value.shape)));
        }
        shape[at] = shape[at].saturating_add(value.shape[at]);
    }
    let numbers: Option<Vec<Vec<i64>>> = inputs.iter().flatten().map(|value| value.numbers.clone()).collect();
    let numbers = numbers.map(|numbers| numbers.concat()).filter(|numbers| numbers.len() <= MOST_AXES);
    Ok(Value { shape, numbers, ..plain(x) })
}

fn expand(x: &Value, to: &[i64]) -> Result<Value, Problem> {
    let to: Vec<usize> = to.iter().map(|size| usize::try_from(*size).unwrap_or(0)).collect();
    Ok(Value { shape: together(&[&x.shape, &to])?, ..plain(x) })
}

fn gather(node: &Node, table: &Value, places: &Value) -> Result<Value, Problem> {
    let at = axis_of(node, 0, table.shape.len())?;
    let shape = [&table.shape[..at], &places.shape, &table.shape[at + 1..]].concat();
    let found = |(table, places): (&Vec<i64>, &Vec<i64>)| {
        let number = |place: &i64| Some(*table.get(axis(*place, table.len()).ok()?)?);
        places.iter().map(number).collect::<Option<Vec<i64>>>()
    };
    Ok(Value { shape, numbers: table.numbers.as_ref().zip(places.numbers.as_ref()).and_then(found), ..plain(table) })
}

fn pad(x: &Value, by: &[i64]) -> Result<Value, Problem> {
    let rank = x.shape.len();
    if by.len() != 2 * rank {
        return Err(Problem::Unfit(format!("{} numbers do not pad {rank} axes", by.len())));
    }
    let size = |axis: usize| x.shape[axis].checked_add_signed(by[axis].saturating_add(by[axis + rank]) as isize);
    let shape = (0..rank).map(size).collect::<Option<Vec<usize>>>();
    Ok(Value { shape: shape.ok_or("more is cut off than there is")?, ..plain(x) })
}

fn reduce(node: &Node, inputs: Inputs<'_>) -> Result<Value, Problem> {
    let (x, keeps) = (first(inputs)?, node.attributes.get("keepdims").is_none_or(|numbers| numbers[0] == 1));
    let rank = x.shape.len();
    let gone = match inputs.get(1).copied().flatten() {
        Some(_) => numbers(inputs, 1)?.iter().map(|number| axis(*number, rank)).collect::<Result<Vec<_>, _>>()?,
        None => (0..rank).collect(),
    };
    let size = |(axis, size): (usize, &usize)| match (gone.contains(&axis), keeps) {
        (false, _) => Some(*size),
        (true, true) => Some(1),
        (true, false) => None,
    };
    Ok(Value { shape: x.shape.iter().enumerate().filter_map(size).collect(), ..plain(x) })
}

/// Of the sizes asked for, 0 keeps one and -1 takes what is left.
fn reshape(x: &Value, to: &[i64]) -> Result<Value, Problem> {
    let mut shape = Vec::with_capacity(to.len());
    for (at, size) in to.iter().enumerate() {
        shape.push(match size {
            0 => *x.shape.get(at).ok_or("there is no such axis to keep")?,
            -1 => 1,
            size => usize::try_from(*size).map_err(|_| "a size is below -1")?,
        });
    }
    if let Some(open) = to.iter().position(|size| *size == -1) {
        shape[open] = x.n() / times(&shape).max(1);
    }
    if times(&shape) != x.n() {
        return Err(Problem::Unfit(format!("{:?} does not become {to:?}", x.shape)));
    }
    Ok(Value { shape, numbers: x.numbers.clone(), ..plain(x) })
}

fn shape(node: &Node, x: &Value) -> Value {
    let rank = x.shape.len() as i64;
    let limit = |name: &str, default| {
        let number = node.attributes.get(name).map_or(default, |numbers| numbers[0]);
        (if number < 0 { number + rank } else { number }).clamp(0, rank) as usize
    };
    let (start, end) = (limit("start", 0), limit("end", rank));
    let sizes: Vec<i64> = x.shape[start.min(end)..end].iter().map(|size| *size as i64).collect();
    Value { shape: vec![sizes.len()], element: Element::Int64, numbers: Some(sizes), is_weight: false }
}

fn slice(inputs: Inputs<'_>) -> Result<Value, Problem> {
    let x = first(inputs)?;
    let (starts, ends) = (numbers(inputs, 1)?, numbers(inputs, 2)?);
    let all: Vec<i64> = (0..starts.len() as i64).collect();
    let axes = if inputs.get(3).copied().flatten().is_some() { numbers(inputs, 3)? } else { &all };
    if inputs.get(4).copied().flatten().is_some_and(|steps| steps.numbers.as_ref().is_none_or(|n| n.iter().any(|n| *n != 1))) {
        return Err("steps other than 1 are not known".into());
    }
    let (mut shape, mut kept) = (x.shape.clone(), x.numbers.clone());
    for ((start, end), at) in starts.iter().zip(ends).zip(axes) {
        let at = axis(*at, shape.len())?;
        let size = shape[at] as i64;
        let [start, end] = [start, end].map(|edge| (if *edge < 0 { edge + size } else { *edge }).clamp(0, size) as usize);
        shape[at] = end.saturating_sub(start);
        kept = kept.and_then(|numbers| numbers.get(start..end.max(start)).map(<[i64]>::to_vec));
    }
    Ok(Value { numbers: kept.filter(|_| x.shape.len() == 1), shape, ..plain(x) })
}

fn split(node: &Node, inputs: Inputs<'_>) -> Result<Vec<Value>, Problem> {
    let (x, sizes) = (first(inputs)?, numbers(inputs, 1)?);
    let at = axis_of(node, 0, x.shape.len())?;
    if sizes.iter().any(|size| *size < 0) || sizes.iter().fold(0, |sum: i64, size| sum.saturating_add(*size)) != x.shape[at] as i64
    {
        return Err(Problem::Unfit(format!("{} is not split into {sizes:?}", x.shape[at])));
    }
    let part = |size: &i64| {
        let mut part = plain(x);
        part.shape[at] = *size as usize;
        part
    };
    Ok(sizes.iter().map(part).collect())
}

fn transpose(node: &Node, x: &Value) -> Result<Value, Problem> {
    let reversed: Vec<i64> = (0..x.shape.len() as i64).rev().collect();
    let order = node.attributes.get("perm").unwrap_or(&reversed);
    if order.len() != x.shape.len() {
        return Err(Problem::Unfit(format!("{order:?} does not order {:?}", x.shape)));
    }
    let shape = order.iter().map(|at| Ok(x.shape[axis(*at, x.shape.len())?])).collect::<Result<_, Problem>>()?;
    Ok(Value { shape, ..plain(x) })
}

fn unsqueeze(x: &Value, at: &[i64]) -> Result<Value, Problem> {
    let rank = x.shape.len() + at.len();
    let mut new = at.iter().map(|at| axis(*at, rank)).collect::<Result<Vec<_>, _>>()?;
    new.sort_unstable();
    let mut shape = x.shape.clone();
    new.into_iter().for_each(|at| shape.insert(at, 1));
    Ok(Value { shape, numbers: x.numbers.clone(), ..plain(x) })
}

/// The sizes of a product of matrices, whose last two axes are multiplied.
fn matrices(node: &Node, a: &Value, b: &Value) -> Result<Vec<usize>, Problem> {
    let turned = |value: &Value, name: &str| {
        let mut shape = value.shape.clone();
        let rank = shape.len();
        if rank >= 2 && flag(node, name) {
            shape.swap(rank - 2, rank - 1);
        }
        shape
    };
    let (a, b) = (turned(a, "transA"), turned(b, "transB"));
    let ([a_many @ .., rows, depth], [b_many @ .., other, columns]) = (&a[..], &b[..]) else {
        return Err("a product is of matrices".into());
    };
    if depth != other {
        return Err(Problem::Unfit(format!("{a:?} is not multiplied with {b:?}")));
    }
    Ok([together(&[a_many, b_many])?, vec![*rows, *columns]].concat())
}

/// `[batch, channels, …]` with patches that `kernel_shape`, `strides`, `pads` and `dilations` describe.
fn convolution(node: &Node, x: &Value, weight: &Value) -> Result<Vec<usize>, Problem> {
    let (Some(places), Some(kernel)) = (x.shape.get(2..), weight.shape.get(2..).filter(|kernel| kernel.len() + 2 == x.shape.len()))
    else {
        return Err(Problem::Unfit(format!("{:?} does not go over {:?}", weight.shape, x.shape)));
    };
    let number = |name: &str, at: usize, default: usize| {
        let number = node.attributes.get(name).and_then(|numbers| numbers.get(at));
        number.map_or(default, |number| usize::try_from(*number).unwrap_or(0))
    };
    let size = |at: usize| {
        let padded = places[at].saturating_add(number("pads", at, 0)).saturating_add(number("pads", at + places.len(), 0));
        let reach = kernel[at].checked_sub(1)?.saturating_mul(number("dilations", at, 1)).saturating_add(1);
        Some(padded.checked_sub(reach)?.checked_div(number("strides", at, 1))?.saturating_add(1))
    };
    let sizes = (0..places.len()).map(size).collect::<Option<Vec<usize>>>().ok_or("the kernel does not go over it")?;
    Ok([&[x.shape[0], weight.shape[0]], &sizes[..]].concat())
}
