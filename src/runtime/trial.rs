//! Small models that show what a provider's kernels do at most: products of many rows, and reading memory. What they read and write lies
//! where they run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use half::{bf16, f16};
use ort::memory::Allocator;
use ort::session::{IoBinding, Session};
use ort::value::DynTensor;

use super::model::{Product, product, read_again};
use super::provider::Work;
use super::tensor::element_type;
use super::{Cancel, Mover, Place, Runtime, Tensor, memory};
use crate::bundle::{Dtype, Precision};

/// A model that is ready to run.
#[derive(Debug)]
pub struct Trial {
    session: Session,
    binding: IoBinding,
    /// What the binding points to.
    _held: Vec<Held>,
    runtime: Runtime,
    cancel: Cancel,
    /// Operations of a run, or bytes that it reads.
    amount: f64,
}

#[derive(Debug)]
#[expect(dead_code, reason = "they are held")]
enum Held {
    Ours(Arc<Tensor>),
    Bytes(DynTensor),
}

/// Bytes that a run reads at least, so that its start counts little.
const READ_AT_LEAST: usize = 64 << 20;
/// Bytes that are drawn; more are repetitions of them.
const DRAWN: usize = 1 << 18;
/// Blocks as the exporter makes them for processors.
const BLOCKS: [(Precision, usize, usize); 2] = [(Precision::Int8Blocks, 8, 128), (Precision::Int4Blocks, 4, 32)];

impl Runtime {
    /// `rows` rows times a stored matrix of `depth` × `width`; an error where the provider has no kernel of this precision.
    pub fn product_trial(&self, precision: Precision, [rows, depth, width]: [usize; 3]) -> Result<Trial, ort::Error> {
        let (kind, bytes) = kind(precision, depth * width);
        let session = self.small_session(&product(kind, [depth, width], &bytes), Work::Plain)?;
        drop(bytes);
        let (mut binding, mut held) = (session.create_binding()?, Vec::new());
        let (x, y) = match kind {
            Product::Of(dtype) => (Some(dtype), dtype),
            Product::OfBytes => (None, Dtype::Int32),
            Product::OfBlocks { .. } => (Some(Dtype::Float32), Dtype::Float32),
        };
        match x {
            Some(dtype) => {
                let x = self.numbers(dtype, [rows, depth])?;
                binding.bind_input("x", &x.0)?;
                held.push(Held::Ours(Arc::new(x)));
            }
            None => {
                let x = ort::value::Tensor::from_array(([rows, depth], filled(rows * depth, &pseudo_random())))?.upcast();
                binding.bind_input("x", &x)?;
                held.push(Held::Bytes(x));
            }
        }
        self.tie_output(&session, (&mut binding, &mut held), y, [rows, width])?;
        Ok(self.trial(session, binding, held, 2.0 * (rows * depth * width) as f64))
    }

    /// A row goes through a square matrix of about so many bytes, again and again where these are few.
    pub fn reading_trial(&self, n_bytes: usize) -> Result<Trial, ort::Error> {
        let side = ((n_bytes / Dtype::Float32.size()) as f64).sqrt() as usize;
        let n_bytes = side * side * Dtype::Float32.size();
        let n_times = READ_AT_LEAST.div_ceil(n_bytes.max(1));
        let session = self.small_session(&read_again(Dtype::Float32, n_times), Work::Plain)?;
        let (mut binding, mut held) = (session.create_binding()?, Vec::new());
        for (name, shape) in [("x", [1, side]), ("m", [side, side])] {
            let tensor = self.numbers(Dtype::Float32, shape)?;
            binding.bind_input(name, &tensor.0)?;
            held.push(Held::Ours(Arc::new(tensor)));
        }
        self.tie_output(&session, (&mut binding, &mut held), Dtype::Float32, [1, side])?;
        Ok(self.trial(session, binding, held, (n_times * n_bytes) as f64))
    }

    /// Bytes that a trial may take.
    pub fn room_for_trials(&self) -> u64 {
        let free = memory::free().into_iter().chain(self.0.options.memory_limit).min();
        free.filter(|_| !self.has_device()).map_or(u64::MAX, |free| free / 4)
    }

    fn trial(&self, session: Session, binding: IoBinding, held: Vec<Held>, amount: f64) -> Trial {
        Trial { session, binding, _held: held, runtime: self.clone(), cancel: Cancel::new(), amount }
    }

    /// Small numbers where graphs run.
    fn numbers(&self, dtype: Dtype, shape: [usize; 2]) -> Result<Tensor, ort::Error> {
        let values = filled(shape[0] * shape[1], &small());
        let tensor = Tensor::from_f32(ndarray::Array2::from_shape_vec(shape, values).expect("as many as the shape says"))?;
        let tensor = if dtype == Dtype::Float32 { tensor } else { tensor.to_type(dtype)? };
        Mover::new(self).at_device(tensor).map_err(|error| ort::Error::new(error.to_string()))
    }

    fn tie_output(
        &self,
        session: &Session,
        (binding, held): (&mut IoBinding, &mut Vec<Held>),
        dtype: Dtype,
        shape: [usize; 2],
    ) -> Result<(), ort::Error> {
        if self.has_device() {
            let _turn = self.turn();
            let allocator = Allocator::new(session, self.memory(Place::Device))?;
            let mut y = Tensor::allocate(&allocator, dtype, &shape, session)?;
            binding.bind_output("y", &mut y.0)?;
            held.push(Held::Ours(Arc::new(y)));
        } else {
            let mut y = DynTensor::new(&Allocator::default(), element_type(dtype), shape.map(|size| size as i64))?;
            binding.bind_output("y", &mut y)?;
            held.push(Held::Bytes(y));
        }
        Ok(())
    }
}

impl Trial {
    /// Operations of a run, or bytes that it reads.
    pub fn amount(&self) -> f64 {
        self.amount
    }

    /// How long one run takes.
    pub fn run(&mut self) -> Result<Duration, ort::Error> {
        let (options, _turn) = (self.cancel.options()?, self.runtime.turn());
        let start = Instant::now();
        self.session.run_binding_with_options(&self.binding, &options)?;
        Ok(start.elapsed())
    }
}

/// What is multiplied, and a matrix of so many numbers for it.
fn kind(precision: Precision, n: usize) -> (Product, Vec<u8>) {
    if let Some((_, bits, size)) = BLOCKS.into_iter().find(|(known, ..)| *known == precision) {
        return (Product::OfBlocks { bits, size }, filled(n * bits / 8, &pseudo_random()));
    }
    let of = |dtype, bytes: Vec<u8>| (Product::Of(dtype), filled(n * dtype.size(), &bytes));
    let small = small().into_iter();
    match precision {
        Precision::Float16 => of(Dtype::Float16, small.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect()),
        Precision::Bfloat16 => of(Dtype::Bfloat16, small.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()),
        // Of 7 bits, which every processor multiplies by its fastest kernel.
        Precision::Int8 => {
            let narrow: Vec<u8> = pseudo_random().into_iter().map(|byte| (byte >> 1).wrapping_sub(64)).collect();
            (Product::OfBytes, filled(n, &narrow))
        }
        _ => of(Dtype::Float32, small.flat_map(f32::to_le_bytes).collect()),
    }
}

/// `n` of these, from the first on again and again.
fn filled<T: Copy>(n: usize, some: &[T]) -> Vec<T> {
    let mut found = Vec::with_capacity(n);
    while found.len() < n {
        found.extend_from_slice(&some[..some.len().min(n - found.len())]);
    }
    found
}

/// Numbers that stay what they are, about, when a row of some hundreds goes through a matrix of them.
fn small() -> Vec<f32> {
    pseudo_random().into_iter().map(|byte| (f32::from(byte) - 127.5) / 2048.0).collect()
}

/// Bytes without a pattern that kernels could gain from (xorshift, Marsaglia 2003).
fn pseudo_random() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(word).take(DRAWN / 8).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::{Provider, ProviderChoice, RuntimeOptions};

    #[test]
    fn every_precision_of_processors_runs_and_so_does_reading() {
        let provider = ProviderChoice::Only(Provider::Cpu);
        let runtime = Runtime::load(&RuntimeOptions { provider, ..RuntimeOptions::default() }).unwrap();
        for precision in [Precision::Float32, Precision::Int8, Precision::Int8Blocks, Precision::Int4Blocks] {
            let mut trial = runtime.product_trial(precision, [3, 256, 128]).unwrap_or_else(|error| panic!("{precision}: {error}"));
            assert_eq!(trial.amount(), 2.0 * 3.0 * 256.0 * 128.0, "{precision}");
            assert!(trial.run().unwrap() > Duration::ZERO, "{precision}");
        }
        let mut trial = runtime.reading_trial(1 << 20).unwrap();
        assert_eq!(trial.amount(), READ_AT_LEAST as f64);
        assert!(trial.run().unwrap() > Duration::ZERO);
    }
}
