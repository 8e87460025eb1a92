//! Products of 8-bit numbers come out right, or graphs that need them are refused.
//!
//! Processors without VNNI add products of unsigned with signed bytes two at a time in 16 bits, and where that is too few the sum is wrong
//! without a word. ONNX Runtime has a setting against it, whose effect depends on its version and on what it does with the graph.

use ort::session::builder::SessionBuilder;
use ort::value::Tensor;

use super::Runtime;
use super::model::byte_product;

/// Operators that multiply bytes as they are; `MatMulNBits` has kernels of its own, which do not saturate.
pub(super) const OPERATORS: [&str; 7] =
    ["MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QLinearConv", "QAttention"];

/// Lets ONNX Runtime turn signed weights beyond ±64 into unsigned ones while it loads them, where the processor would be wrong. It does
/// so from the second level of optimisation on, and changes nothing where there is VNNI.
pub(super) fn guard(builder: SessionBuilder) -> Result<SessionBuilder, ort::Error> {
    Ok(builder.with_precise_qmm()?)
}

/// Whether sums of the largest products are what they should be.
pub(super) fn multiply(runtime: &Runtime) -> Result<bool, ort::Error> {
    const SHAPE: [u8; 2] = [64, 16];
    let mut session = runtime.small_session(&byte_product(i8::MAX, SHAPE))?;
    let x = Tensor::from_array(([1, usize::from(SHAPE[0])], vec![u8::MAX; usize::from(SHAPE[0])]))?;
    let outputs = session.run(ort::inputs!["x" => x])?;
    let (_, sums) = outputs["y"].try_extract_tensor::<i32>()?;
    let wanted = i32::from(SHAPE[0]) * i32::from(u8::MAX) * i32::from(i8::MAX);
    Ok(sums.iter().all(|sum| *sum == wanted))
}
