//! Products of 8-bit numbers come out right, or graphs that need them are refused.
//!
//! Processors without VNNI add products of unsigned with signed bytes two at a time in 16 bits, and where that is too few the sum is wrong
//! without a word. ONNX Runtime has a setting against it, whose effect depends on its version and on what it does with the graph.

use ort::session::Session;
use ort::session::builder::SessionBuilder;
use ort::value::Tensor;

use super::library::Loaded;
use super::model::byte_product;
use super::provider::{Work, register};
use super::settings::Settings;
use super::{Processor, Provider};

/// Operators that multiply bytes as they are; `MatMulNBits` has kernels of its own, which do not saturate.
pub(super) const OPERATORS: [&str; 7] =
    ["MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QLinearConv", "QAttention"];

/// Lets ONNX Runtime turn signed weights beyond ±64 into unsigned ones while it loads them, where the processor would be wrong. It does
/// so from the second level of optimisation on, and elsewhere too: with AMX, whose kernels take signed weights only, a ViT then takes 700
/// milliseconds instead of 190.
pub(super) fn guard(builder: SessionBuilder) -> Result<SessionBuilder, ort::Error> {
    Ok(if Processor::detect().saturates() { builder.with_precise_qmm()? } else { builder })
}

/// Whether the processor's sums of the largest products are what they should be.
pub(super) fn multiply(loaded: &Loaded) -> Result<bool, ort::Error> {
    let builder =
        register(guard(Session::builder(&loaded.environment)?)?, loaded, Provider::Cpu, &Settings::default(), Work::Plain)?;
    sums_are_right({ builder }.commit_from_memory(&byte_product(i8::MAX, SHAPE))?)
}

const SHAPE: [u8; 2] = [64, 16];

fn sums_are_right(mut session: Session) -> Result<bool, ort::Error> {
    let [depth, _] = SHAPE.map(usize::from);
    let x = Tensor::from_array(([1, depth], vec![u8::MAX; depth]))?;
    let outputs = session.run(ort::inputs!["x" => x])?;
    let (_, sums) = outputs["y"].try_extract_tensor::<i32>()?;
    let wanted = i32::from(SHAPE[0]) * i32::from(u8::MAX) * i32::from(i8::MAX);
    Ok(sums.iter().all(|sum| *sum == wanted))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{ProviderChoice, Runtime, RuntimeOptions};

    #[test]
    fn sums_are_right_with_the_guard_and_without_it_where_the_processor_has_vnni() {
        let provider = ProviderChoice::Only(Provider::Cpu);
        let runtime = Runtime::load(&RuntimeOptions { provider, ..RuntimeOptions::default() }).unwrap();
        let model = byte_product(i8::MAX, SHAPE);
        let bare = Session::builder(&runtime.0.loaded.environment).unwrap().commit_from_memory(&model).unwrap();
        assert_eq!(sums_are_right(bare).unwrap(), !Processor::detect().saturates());
        assert!(runtime.multiplies_bytes().unwrap());
    }
}
