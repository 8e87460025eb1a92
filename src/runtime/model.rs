//! Small ONNX models, made where they are needed: to try a provider or a processor, to copy, to move rows.
//!
//! Field numbers are those of `onnx.proto`. Tensors have no shape there, so one model serves every rank.

use crate::bundle::Dtype;

/// Name and element type of an input or output.
pub(super) type Port<'a> = (&'a str, Dtype);

/// Operator, inputs and output.
pub(super) type Node<'a> = (&'a str, &'a [&'a str], &'a str);

const IR_VERSION: u8 = 8;
const OPSET: u8 = 18;
const UINT8: u8 = 2;
const INT8: u8 = 3;
const INT32: u8 = 6;
const MICROSOFT: &[u8] = b"com.microsoft";

/// `x` → `y`, unchanged.
pub(super) fn identity(dtype: Dtype) -> Vec<u8> {
    model(&[("Identity", &["x"], "y")], &[("x", dtype)], &[("y", dtype)])
}

/// Names of what [`copies`] copies, and where to.
pub(super) const FROM: [&str; 10] = ["x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9"];
pub(super) const INTO: [&str; 10] = ["y0", "y1", "y2", "y3", "y4", "y5", "y6", "y7", "y8", "y9"];

/// As [`identity`], of several tensors; each has an axis. WebGPU has `Concat` for int64, and no `Identity`.
pub(super) fn copies(dtypes: &[Dtype]) -> Vec<u8> {
    let axis = message(5, &[message(1, b"axis"), number(3, 0), vec![20 << 3 & 127 | 128, 20 >> 4, 2]].concat());
    let ports =
        |field, names: &[&str]| names.iter().zip(dtypes).flat_map(|(name, dtype)| port(field, name, code(*dtype))).collect();
    let copy = |(from, into): (&&str, &&str)| {
        let named = [message(1, from.as_bytes()), message(2, into.as_bytes()), message(4, b"Concat")].concat();
        message(1, &[named, axis.clone()].concat())
    };
    let nodes = FROM.iter().zip(&INTO).take(dtypes.len()).flat_map(copy).collect();
    whole(&[nodes, ports(11, &FROM), ports(12, &INTO)])
}

/// A model of these nodes, in order.
pub(super) fn model(nodes: &[Node<'_>], inputs: &[Port<'_>], outputs: &[Port<'_>]) -> Vec<u8> {
    let ports = |field, ports: &[Port<'_>]| ports.iter().flat_map(|(name, dtype)| port(field, name, code(*dtype))).collect();
    whole(&[nodes.iter().flat_map(node).collect(), ports(11, inputs), ports(12, outputs)])
}

/// What a product is of: numbers of this type, unsigned bytes with signed ones, or numbers with weights of so many bits in blocks.
#[derive(Clone, Copy)]
pub(super) enum Product {
    Of(Dtype),
    OfBytes,
    OfBlocks { bits: usize, size: usize },
}

/// `x` ([rows, `depth`]) → `y` ([rows, `width`]): its product with a stored matrix of `bytes`, as the type has them.
pub(super) fn product(kind: Product, [depth, width]: [usize; 2], bytes: &[u8]) -> Vec<u8> {
    let ports = |x, y| [port(11, "x", x), port(12, "y", y)].concat();
    match kind {
        Product::Of(dtype) => {
            let weight = tensor("w", code(dtype), &[depth, width], bytes);
            whole(&[node(&("MatMul", &["x", "w"], "y")), weight, ports(code(dtype), code(dtype))])
        }
        Product::OfBytes => {
            let weight = tensor("w", INT8, &[depth, width], bytes);
            whole(&[node(&("MatMulInteger", &["x", "w"], "y")), weight, ports(UINT8, INT32)])
        }
        Product::OfBlocks { bits, size } => {
            let n_blocks = depth / size;
            let scales: Vec<u8> = std::iter::repeat_n(0.01f32.to_le_bytes(), width * n_blocks).flatten().collect();
            let stored = [
                tensor("w", UINT8, &[width, n_blocks, size * bits / 8], bytes),
                tensor("s", code(Dtype::Float32), &[width, n_blocks], &scales),
            ];
            // As the exporter asks for it: activations become 8-bit numbers.
            let attributes = [("K", depth), ("N", width), ("bits", bits), ("block_size", size), ("accuracy_level", 4)];
            let attributes = attributes.map(|(name, number)| attribute(name, number)).concat();
            let named = ["x", "w", "s"].map(|input| message(1, input.as_bytes())).concat();
            let node = [named, message(2, b"y"), message(4, b"MatMulNBits"), attributes, message(7, MICROSOFT)].concat();
            let (float, domain) = (code(Dtype::Float32), [message(1, MICROSOFT), number(2, 1)].concat());
            [whole(&[message(1, &node), stored.concat(), ports(float, float)]), message(8, &domain)].concat()
        }
    }
}

/// `x` ([1, side]) → `y`: it goes `n` times through `m` ([side, side]), so that `m` is read as often.
pub(super) fn read_again(dtype: Dtype, n: usize) -> Vec<u8> {
    let names: Vec<String> = (1..n).map(|at| format!("t{at}")).collect();
    let names: Vec<&str> = std::iter::once("x").chain(names.iter().map(String::as_str)).chain(["y"]).collect();
    let nodes = names.windows(2).flat_map(|pair| node(&("MatMul", &[pair[0], "m"], pair[1])));
    whole(&[nodes.collect(), port(11, "x", code(dtype)), port(11, "m", code(dtype)), port(12, "y", code(dtype))])
}

/// `x` (unsigned bytes, [rows, `shape[0]`]) → `y` (int32): its products with a matrix of stored bytes that are all `weight`.
pub(super) fn byte_product(weight: i8, shape: [u8; 2]) -> Vec<u8> {
    let values = vec![weight.cast_unsigned(); usize::from(shape[0]) * usize::from(shape[1])];
    let sizes = shape.map(|size| number(1, size)).concat();
    let weights = message(5, &[sizes, number(2, INT8), message(8, b"w"), message(9, &values)].concat());
    whole(&[node(&("MatMulInteger", &["x", "w"], "y")), weights, port(11, "x", UINT8), port(12, "y", INT32)])
}

fn whole(graph: &[Vec<u8>]) -> Vec<u8> {
    let graph = [graph.concat(), message(2, b"g")].concat();
    [number(1, IR_VERSION), message(7, &graph), message(8, &number(2, OPSET))].concat()
}

fn tensor(name: &str, code: u8, shape: &[usize], bytes: &[u8]) -> Vec<u8> {
    let sizes: Vec<u8> = shape.iter().flat_map(|size| large_number(1, *size)).collect();
    message(5, &[sizes, number(2, code), message(8, name.as_bytes()), message(9, bytes)].concat())
}

fn attribute(name: &str, value: usize) -> Vec<u8> {
    message(5, &[message(1, name.as_bytes()), large_number(3, value), vec![20 << 3 & 127 | 128, 20 >> 4, 2]].concat())
}

fn node((operator, inputs, output): &Node<'_>) -> Vec<u8> {
    let inputs: Vec<u8> = inputs.iter().flat_map(|input| message(1, input.as_bytes())).collect();
    message(1, &[inputs, message(2, output.as_bytes()), message(4, operator.as_bytes())].concat())
}

fn port(field: u8, name: &str, code: u8) -> Vec<u8> {
    message(field, &[message(1, name.as_bytes()), message(2, &message(1, &number(1, code)))].concat())
}

fn code(dtype: Dtype) -> u8 {
    match dtype {
        Dtype::Float32 => 1,
        Dtype::Int32 => INT32,
        Dtype::Int64 => 7,
        Dtype::Float16 => 10,
        Dtype::Bfloat16 => 16,
    }
}

fn number(field: u8, value: u8) -> Vec<u8> {
    vec![field << 3, value]
}

fn large_number(field: u8, value: usize) -> Vec<u8> {
    [vec![field << 3], varint(value)].concat()
}

fn message(field: u8, content: &[u8]) -> Vec<u8> {
    [vec![field << 3 | 2], varint(content.len()), content.to_vec()].concat()
}

fn varint(mut value: usize) -> Vec<u8> {
    let mut found = Vec::new();
    while value > 127 {
        found.push(value as u8 | 128);
        value >>= 7;
    }
    found.push(value as u8);
    found
}
