//! Tensors that ONNX Runtime owns, on the host or on a device.

use half::{bf16, f16};
use ndarray::{Array, ArrayD, Dimension, IxDyn};
use ort::memory::AllocationDevice;
use ort::value::{DynTensor, TensorElementType};

use crate::bundle::Dtype;

/// A tensor of any element type and shape.
#[derive(Debug)]
pub struct Tensor(pub(super) DynTensor);

impl Tensor {
    /// A float32 tensor on the host.
    pub fn from_f32<D: Dimension + 'static>(values: Array<f32, D>) -> Result<Self, ort::Error> {
        Ok(Self(ort::value::Tensor::from_array(values)?.upcast()))
    }

    /// An int64 tensor on the host.
    pub fn from_i64<D: Dimension + 'static>(values: Array<i64, D>) -> Result<Self, ort::Error> {
        Ok(Self(ort::value::Tensor::from_array(values)?.upcast()))
    }

    /// Its shape.
    pub fn shape(&self) -> Vec<usize> {
        self.0.shape().iter().map(|size| usize::try_from(*size).unwrap_or(0)).collect()
    }

    /// Whether its elements are of this type.
    pub fn is(&self, dtype: Dtype) -> bool {
        *self.0.data_type() == element_type(dtype)
    }

    /// Its values as float32, copied to the host where they lie elsewhere.
    pub fn to_f32(&self) -> Result<ArrayD<f32>, ort::Error> {
        if !self.is_on_host() {
            return Self(self.0.to(AllocationDevice::CPU, 0)?).to_f32();
        }
        let values = match *self.0.data_type() {
            TensorElementType::Float16 => self.0.try_extract_tensor::<f16>()?.1.iter().map(|v| v.to_f32()).collect(),
            _ => self.0.try_extract_tensor::<f32>()?.1.to_vec(),
        };
        Ok(ArrayD::from_shape_vec(IxDyn(&self.shape()), values).expect("a tensor has as many values as its shape says"))
    }

    /// The float32 values, in place. The tensor must lie on the host.
    pub fn f32(&self) -> Result<&[f32], ort::Error> {
        Ok(self.0.try_extract_tensor::<f32>()?.1)
    }

    /// The float32 values, writable in place. The tensor must lie on the host.
    pub fn f32_mut(&mut self) -> Result<&mut [f32], ort::Error> {
        Ok(self.0.try_extract_tensor_mut::<f32>()?.1)
    }

    /// The int64 values, writable in place. The tensor must lie on the host.
    pub fn i64_mut(&mut self) -> Result<&mut [i64], ort::Error> {
        Ok(self.0.try_extract_tensor_mut::<i64>()?.1)
    }

    /// The int32 values, writable in place. The tensor must lie on the host.
    pub fn i32_mut(&mut self) -> Result<&mut [i32], ort::Error> {
        Ok(self.0.try_extract_tensor_mut::<i32>()?.1)
    }

    /// Lets `read` see the float32 values wherever the tensor lies.
    pub fn read_f32<T>(&self, read: impl FnOnce(&[f32]) -> T) -> Result<T, ort::Error> {
        if self.is_on_host() { Ok(read(self.f32()?)) } else { Ok(read(Self(self.0.to(AllocationDevice::CPU, 0)?).f32()?)) }
    }

    /// Lets `edit` work on the float32 values wherever the tensor lies; on a device they make the way to the host and back.
    pub fn edit_f32<T>(&mut self, edit: impl FnOnce(&mut [f32]) -> T) -> Result<T, ort::Error> {
        if self.is_on_host() {
            return Ok(edit(self.f32_mut()?));
        }
        let mut host = Self(self.0.to(AllocationDevice::CPU, 0)?);
        let done = edit(host.f32_mut()?);
        host.0.copy_into(&mut self.0)?;
        Ok(done)
    }

    fn is_on_host(&self) -> bool {
        self.0.memory_info().is_cpu_accessible()
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
