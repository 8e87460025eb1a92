//! One ONNX graph in a session, checked against what the bundle says of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use ort::environment::Environment;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{IoBinding, Session, SessionInputValue};
use ort::value::{DynTensor, Outlet, ValueType};

use super::tensor::element_type;
use super::{Cancel, Provider, Runtime, RuntimeError, Tensor, provider};
use crate::bundle::{Bundle, BundleError, Dimension, Dtype, GraphFacts, TensorFacts, brief};

/// Where a tensor lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the processor's memory.
    Host,
    /// Where the graph runs.
    Device,
}

/// A graph that can run. It belongs to one thread at a time.
#[derive(Debug)]
pub struct Graph {
    name: &'static str,
    facts: GraphFacts,
    session: Session,
    device: MemoryInfo<'static>,
    cancel: Cancel,
}

/// Inputs and outputs tied to a graph for many runs.
#[derive(Debug)]
pub struct Binding {
    graph: &'static str,
    binding: IoBinding,
}

/// What a run gave, by name.
#[derive(Debug)]
pub struct Outputs {
    graph: &'static str,
    tensors: Vec<(String, Tensor)>,
}

impl Graph {
    /// Loads the graph that the bundle calls `name`.
    pub fn open(runtime: &Runtime, bundle: &Bundle, name: &'static str) -> Result<Self, BundleError> {
        let unloadable = |reason: ort::Error| BundleError::Unloadable {
            folder: bundle.folder().to_path_buf(),
            graph: name.into(),
            reason: sentence(&reason.to_string()),
        };
        let session = session(&runtime.environment, runtime, bundle, name).map_err(unloadable)?;
        check(bundle, name, "input", session.inputs(), &bundle.graph(name).inputs)?;
        check(bundle, name, "output", session.outputs(), &bundle.graph(name).outputs)?;
        let device = device(runtime).map_err(unloadable)?;
        Ok(Self { name, facts: bundle.graph(name).clone(), session, device, cancel: Cancel::new() })
    }

    /// Lets `cancel` stop every later run.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.cancel = cancel;
    }

    /// One run; the outputs lie where `outputs_on` says.
    pub fn run(&mut self, inputs: &[(&str, &Tensor)], outputs_on: Place) -> Result<Outputs, RuntimeError> {
        let tensors = self.try_run(inputs, outputs_on).map_err(|source| self.not_run(source))?;
        self.check_shapes(inputs, &tensors)?;
        Ok(Outputs { graph: self.name, tensors })
    }

    /// ONNX Runtime only warns of an output that is not of the shape its graph declares.
    fn check_shapes(&self, inputs: &[(&str, &Tensor)], outputs: &[(String, Tensor)]) -> Result<(), RuntimeError> {
        let mut axes: BTreeMap<&str, usize> = BTreeMap::new();
        for (facts, (_, tensor)) in self.facts.inputs.iter().filter_map(|f| Some((f, inputs.iter().find(|i| i.0 == f.name)?))) {
            axes.extend(facts.shape.iter().zip(tensor.shape()).filter_map(|(axis, size)| match axis {
                Dimension::Dynamic(name) => Some((name.as_str(), size)),
                Dimension::Fixed(_) => None,
            }));
        }
        let fits = |(said, found): (&Dimension, &usize)| match said {
            Dimension::Fixed(size) => size == found,
            Dimension::Dynamic(name) => axes.get(name.as_str()).is_none_or(|size| size == found),
        };
        for facts in &self.facts.outputs {
            let Some((output, tensor)) = outputs.iter().find(|(name, _)| *name == facts.name) else { continue };
            let found = tensor.shape();
            if !tensor.is(facts.dtype) || found.len() != facts.shape.len() || !facts.shape.iter().zip(&found).all(fits) {
                let expected = facts.to_string();
                return Err(RuntimeError::Shape { graph: self.name.into(), output: output.clone(), found, expected });
            }
        }
        Ok(())
    }

    fn try_run(&mut self, inputs: &[(&str, &Tensor)], outputs_on: Place) -> Result<Vec<(String, Tensor)>, ort::Error> {
        let options = self.cancel.options()?;
        if outputs_on == Place::Host {
            let inputs: Vec<(String, SessionInputValue<'_>)> =
                inputs.iter().map(|(name, tensor)| ((*name).to_owned(), (&tensor.0).into())).collect();
            let outputs = self.session.run_with_options(inputs, &options)?;
            return tensors(outputs.into_iter().map(|(name, value)| (name.to_owned(), value)));
        }
        let mut binding = self.session.create_binding()?;
        for (name, tensor) in inputs {
            binding.bind_input(*name, &tensor.0)?;
        }
        let names: Vec<String> = self.session.outputs().iter().map(|output| output.name().to_owned()).collect();
        for name in &names {
            binding.bind_output_to_device(name, &self.device)?;
        }
        let mut outputs = self.session.run_binding_with_options(&binding, &options)?;
        tensors(names.into_iter().filter_map(|name| outputs.remove(&name).map(|value| (name, value))))
    }

    /// An empty binding.
    pub fn binding(&self) -> Result<Binding, RuntimeError> {
        let binding = self.session.create_binding().map_err(|source| self.failed("binding", source))?;
        Ok(Binding { graph: self.name, binding })
    }

    /// Whether the graph has an input of this name.
    pub fn takes(&self, input: &str) -> bool {
        self.facts.inputs.iter().any(|facts| facts.name == input)
    }

    /// One run over what is bound.
    pub fn run_bound(&mut self, bound: &Binding) -> Result<(), RuntimeError> {
        let options = self.cancel.options();
        let done = options.and_then(|options| self.session.run_binding_with_options(&bound.binding, &options).map(drop));
        done.map_err(|source| self.not_run(source))
    }

    /// A tensor of zeros (on a device: of anything) that can be bound as input and output alike.
    pub fn allocate(&self, dtype: Dtype, shape: &[usize], place: Place) -> Result<Tensor, RuntimeError> {
        let shape: Vec<i64> = shape.iter().map(|size| *size as i64).collect();
        let tensor = match place {
            Place::Host => DynTensor::new(&Allocator::default(), element_type(dtype), shape),
            Place::Device => Allocator::new(&self.session, self.device.to_owned())
                .and_then(|allocator| DynTensor::new(&allocator, element_type(dtype), shape)),
        };
        tensor.map(Tensor).map_err(|source| self.failed("allocating", source))
    }

    /// An error of this graph.
    pub fn failed(&self, doing: &'static str, source: ort::Error) -> RuntimeError {
        RuntimeError::Failed { graph: self.name.into(), doing, source: source.into() }
    }

    /// Memory and devices fail on their own; all else that a graph refuses on inputs as its facts have them is its own fault.
    fn not_run(&self, source: ort::Error) -> RuntimeError {
        let graph = self.name.to_owned();
        if self.cancel.is_cancelled() {
            return RuntimeError::Cancelled { graph };
        }
        let said = source.to_string().to_lowercase();
        let machine = ["alloc", "memory", "cuda", "cudnn", "cublas", "tensorrt"].iter().any(|word| said.contains(word));
        let reason = sentence(&source.to_string());
        match machine {
            true => RuntimeError::Failed { graph, doing: "running", source: Arc::new(ort::Error::new(reason)) },
            false => RuntimeError::Refused { graph, reason },
        }
    }
}

impl Outputs {
    /// The output `name`.
    ///
    /// # Panics
    /// If there is none or it was taken before: names and graphs were compared when the bundle was opened.
    pub fn take(&mut self, name: &str) -> Tensor {
        let at = self.tensors.iter().position(|(found, _)| found == name).expect("the graph has the outputs that its facts name");
        self.tensors.swap_remove(at).1
    }

    /// The output `name` as float32 on the host; NaN and infinity are errors.
    ///
    /// # Panics
    /// As [`take`](Self::take), and if its rank is not that of `D`.
    pub fn array<D: ndarray::Dimension>(&mut self, name: &str) -> Result<ndarray::Array<f32, D>, RuntimeError> {
        let values = self.take(name).to_f32().map_err(|source| RuntimeError::Failed {
            graph: self.graph.into(),
            doing: "copying outputs",
            source: source.into(),
        })?;
        if values.iter().any(|value| !value.is_finite()) {
            return Err(RuntimeError::NotANumber { graph: self.graph.into(), output: name.into() });
        }
        Ok(values.into_dimensionality().expect("the rank was checked when the graph was opened"))
    }
}

impl Binding {
    /// Ties a tensor to an input. Tensors on the host are copied to a device now, so a changed one is bound again before each run.
    pub fn input(&mut self, name: &str, tensor: &Tensor) -> Result<(), RuntimeError> {
        let bound = self.binding.bind_input(name, &tensor.0);
        bound.map_err(|source| self.failed(source))
    }

    /// Ties a tensor made by [`Graph::allocate`] to an output.
    pub fn output(&mut self, name: &str, tensor: &mut Tensor) -> Result<(), RuntimeError> {
        let bound = self.binding.bind_output(name, &mut tensor.0);
        bound.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: ort::Error) -> RuntimeError {
        RuntimeError::Failed { graph: self.graph.into(), doing: "binding", source: source.into() }
    }
}

fn session(environment: &Environment, runtime: &Runtime, bundle: &Bundle, name: &str) -> Result<Session, ort::Error> {
    let mut builder = Session::builder(environment)?.with_optimization_level(GraphOptimizationLevel::All)?;
    builder = runtime.options.pool().apply(runtime.threads, builder)?;
    let cache = runtime.cache(bundle.folder());
    builder = provider::register(builder, runtime.provider, runtime.options.device, Some(&cache))?;
    builder.commit_from_file(bundle.path(&bundle.graph(name).file))
}

fn device(runtime: &Runtime) -> Result<MemoryInfo<'static>, ort::Error> {
    let (device, id) = match runtime.provider {
        Provider::Cpu => (AllocationDevice::CPU, 0),
        Provider::Cuda | Provider::TensorRt => (AllocationDevice::CUDA, i32::try_from(runtime.options.device).unwrap_or(i32::MAX)),
    };
    MemoryInfo::new(device, id, AllocatorType::Device, MemoryType::Default)
}

fn tensors(values: impl Iterator<Item = (String, ort::value::DynValue)>) -> Result<Vec<(String, Tensor)>, ort::Error> {
    let tensor = |value: ort::value::DynValue| value.downcast().map_err(|error| ort::Error::new(error.to_string()));
    values.map(|(name, value)| Ok((name, Tensor(tensor(value)?)))).collect()
}

/// What ONNX Runtime says, in one line and without the places in its own sources.
fn sentence(said: &str) -> String {
    let mut text = said.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned();
    while let Some((from, to)) = place(&text) {
        text.replace_range(from..to, "");
    }
    brief(&text)
}

/// Where `path.cc:12` stands, with the function's signature behind it.
fn place(text: &str) -> Option<(usize, usize)> {
    let at = text.find(".cc:")?;
    let from = text[..at].rfind(char::is_whitespace).map_or(0, |space| space + 1);
    let behind = at + text[at..].find(char::is_whitespace).unwrap_or(text.len() - at);
    let Some(open) = text[behind..].find('(').filter(|open| text[behind..behind + open].contains("::")) else {
        return Some((from, behind));
    };
    let mut depth = 0;
    let closing = text[behind + open..].char_indices().find(|(_, char)| {
        depth += match char {
            '(' => 1,
            ')' => -1,
            _ => 0,
        };
        depth == 0
    });
    Some((from, closing.map_or(behind, |(end, _)| behind + open + end + 1)))
}

/// Every tensor of the graph must be what the facts say, and the facts must name no other.
fn check(bundle: &Bundle, graph: &str, way: &str, found: &[Outlet], said: &[TensorFacts]) -> Result<(), BundleError> {
    let mismatch = |name: &str, found: String, expected: String| BundleError::Graph {
        folder: bundle.folder().to_path_buf(),
        graph: graph.into(),
        what: format!("{way} `{name}`"),
        found,
        expected,
    };
    for outlet in found {
        let facts = said.iter().find(|facts| facts.name == outlet.name());
        match facts {
            Some(facts) if fits(outlet.dtype(), facts) => {}
            Some(facts) => return Err(mismatch(outlet.name(), describe(outlet.dtype()), facts.to_string())),
            None => return Err(mismatch(outlet.name(), describe(outlet.dtype()), "nothing".into())),
        }
    }
    match said.iter().find(|facts| !found.iter().any(|outlet| outlet.name() == facts.name)) {
        Some(facts) => Err(mismatch(&facts.name, "missing".into(), facts.to_string())),
        None => Ok(()),
    }
}

fn fits(found: &ValueType, said: &TensorFacts) -> bool {
    let ValueType::Tensor { ty, shape, dimension_symbols } = found else { return false };
    let fits = |((found, symbol), said): ((&i64, &String), &Dimension)| match said {
        Dimension::Fixed(size) => usize::try_from(*found) == Ok(*size),
        Dimension::Dynamic(name) => *found < 0 && symbol == name,
    };
    let sizes = shape.iter().zip(dimension_symbols.iter());
    *ty == element_type(said.dtype) && shape.len() == said.shape.len() && sizes.zip(&said.shape).all(fits)
}

fn describe(found: &ValueType) -> String {
    let ValueType::Tensor { ty, shape, dimension_symbols } = found else { return "not a tensor".into() };
    let sizes: Vec<String> = shape
        .iter()
        .zip(dimension_symbols.iter())
        .map(|(size, symbol)| {
            if *size >= 0 {
                size.to_string()
            } else if symbol.is_empty() {
                "?".into()
            } else {
                symbol.clone()
            }
        })
        .collect();
    format!("{} [{}]", format!("{ty:?}").to_lowercase(), sizes.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_foreign_sources_are_left_out() {
        let cases = [
            (
                "Status Message: /src/core/arena.cc:360 void* onnxruntime::Arena::Get(size_t, std::function<bool(int)>) Failed (all)\n#0 x",
                "Status Message: Failed (all)",
            ),
            ("FAIL : utils.cc:633 GetInfo TensorProto: w (2) is long", "FAIL : GetInfo TensorProto: w (2) is long"),
            ("\nan end.cc:1", "an"),
            ("x.cc:1 a::b(", "a::b("),
            ("", ""),
        ];
        for (said, wanted) in cases {
            assert_eq!(sentence(said), wanted);
        }
    }
}
