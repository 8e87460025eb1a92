//! Tensors that ONNX Runtime owns, on the host or on a device.

use std::sync::Arc;

use half::{bf16, f16};
use ndarray::{Array, ArrayD, Dimension, IxDyn};
use ort::memory::Allocator;
use ort::session::{Session, SharedSessionInner};
use ort::value::{DynTensor, DynValue, TensorElementType};

use crate::bundle::Dtype;

/// A tensor of any element type and shape.
#[derive(Debug)]
pub struct Tensor(pub(super) DynTensor, #[expect(dead_code, reason = "it is held")] Owner);

/// The session that holds the memory: a plugin's goes with it, so it must go last.
type Owner = Option<Arc<SharedSessionInner>>;

impl Tensor {
    /// A float32 tensor on the host.
    pub fn from_f32<D: Dimension + 'static>(values: Array<f32, D>) -> Result<Self, ort::Error> {
        Ok(Self(ort::value::Tensor::from_array(values)?.upcast(), None))
    }

    /// An int64 tensor on the host.
    pub fn from_i64<D: Dimension + 'static>(values: Array<i64, D>) -> Result<Self, ort::Error> {
        Ok(Self(ort::value::Tensor::from_array(values)?.upcast(), None))
    }

    /// What a session gave.
    pub(super) fn from_value(value: DynValue, session: Arc<SharedSessionInner>) -> Result<Self, ort::Error> {
        let tensor = value.downcast().map_err(|error| ort::Error::new(error.to_string()))?;
        Ok(Self(tensor, Some(session)))
    }

    /// Zeros on the host.
    pub(super) fn zeros(dtype: Dtype, shape: &[usize]) -> Result<Self, ort::Error> {
        let shape: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
        Ok(Self(DynTensor::new(&Allocator::default(), element_type(dtype), shape)?, None))
    }

    /// Where the allocator puts it: zeros on the host; on a device whatever lay there.
    pub(super) fn allocate(allocator: &Allocator, dtype: Dtype, shape: &[usize], session: &Session) -> Result<Self, ort::Error> {
        let shape: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
        Ok(Self(DynTensor::new(allocator, element_type(dtype), shape)?, Some(session.inner())))
    }

    /// Its shape.
    pub fn shape(&self) -> Vec<usize> {
        self.0.shape().iter().map(|size| usize::try_from(*size).unwrap_or(0)).collect()
    }

    /// The type of its elements.
    ///
    /// # Panics
    /// If it is none that a bundle may name: graphs were compared with their bundle when they were opened.
    pub fn dtype(&self) -> Dtype {
        let found = *self.0.data_type();
        Dtype::ALL.into_iter().find(|dtype| element_type(*dtype) == found).expect("a type that bundles name")
    }

    /// Whether its elements are of this type.
    pub fn is(&self, dtype: Dtype) -> bool {
        *self.0.data_type() == element_type(dtype)
    }

    /// Bytes that its elements take.
    pub fn n_bytes(&self) -> usize {
        self.shape().iter().product::<usize>() * self.dtype().size()
    }

    /// Whether the processor can read it; else it lies on a device, and [`Mover::to_host`](super::Mover::to_host) brings it here.
    pub fn is_on_host(&self) -> bool {
        self.0.memory_info().is_cpu_accessible()
    }

    /// Its floating-point values as float32. The tensor must lie on the host.
    pub fn to_f32(&self) -> Result<ArrayD<f32>, ort::Error> {
        let values = match self.dtype() {
            Dtype::Float16 => self.0.try_extract_tensor::<f16>()?.1.iter().map(|value| value.to_f32()).collect(),
            Dtype::Bfloat16 => self.0.try_extract_tensor::<bf16>()?.1.iter().map(|value| value.to_f32()).collect(),
            _ => self.f32()?.to_vec(),
        };
        Ok(ArrayD::from_shape_vec(IxDyn(&self.shape()), values).expect("a tensor has as many values as its shape says"))
    }

    /// The same floating-point values in another type, rounded to the nearest. The tensor must lie on the host.
    pub fn to_type(&self, dtype: Dtype) -> Result<Self, ort::Error> {
        let values = self.to_f32()?;
        let tensor = match dtype {
            Dtype::Float16 => ort::value::Tensor::from_array(values.mapv(f16::from_f32))?.upcast(),
            Dtype::Bfloat16 => ort::value::Tensor::from_array(values.mapv(bf16::from_f32))?.upcast(),
            _ => return Self::from_f32(values),
        };
        Ok(Self(tensor, None))
    }

    /// The float32 values, in place. The tensor must lie on the host.
    pub fn f32(&self) -> Result<&[f32], ort::Error> {
        Ok(self.0.try_extract_tensor::<f32>()?.1)
    }

    /// The int64 values, writable in place. The tensor must lie on the host.
    pub fn i64_mut(&mut self) -> Result<&mut [i64], ort::Error> {
        Ok(self.0.try_extract_tensor_mut::<i64>()?.1)
    }

    /// The int32 values, writable in place. The tensor must lie on the host.
    pub fn i32_mut(&mut self) -> Result<&mut [i32], ort::Error> {
        Ok(self.0.try_extract_tensor_mut::<i32>()?.1)
    }
}

/// Little-endian bytes of floating-point numbers → float32.
///
/// # Panics
/// If `dtype` is an integer type.
pub fn f32_from(bytes: &[u8], dtype: Dtype, into: &mut [f32]) {
    fn lift<const N: usize>(bytes: &[u8], into: &mut [f32], value: impl Fn([u8; N]) -> f32) {
        for (into, bytes) in into.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *into = value(*bytes);
        }
    }
    match dtype {
        Dtype::Float32 => lift(bytes, into, f32::from_le_bytes),
        Dtype::Float16 => lift(bytes, into, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::Bfloat16 => lift(bytes, into, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::Int32 | Dtype::Int64 => panic!("an embedding table holds floating-point numbers"),
    }
}

pub(super) fn element_type(dtype: Dtype) -> TensorElementType {
    match dtype {
        Dtype::Float32 => TensorElementType::Float32,
        Dtype::Float16 => TensorElementType::Float16,
        Dtype::Bfloat16 => TensorElementType::Bfloat16,
        Dtype::Int64 => TensorElementType::Int64,
        Dtype::Int32 => TensorElementType::Int32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixteen_bit_numbers_are_lifted_exactly() {
        let mut found = [0.0; 3];
        let halves: Vec<u8> = [1.5f32, -0.25, 65504.0].iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        f32_from(&halves, Dtype::Float16, &mut found);
        assert_eq!(found, [1.5, -0.25, 65504.0]);
        let brains: Vec<u8> = [1.5f32, -0.25, 2.0f32.powi(100)].iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        f32_from(&brains, Dtype::Bfloat16, &mut found);
        assert_eq!(found, [1.5, -0.25, 2.0f32.powi(100)]);
    }
}
