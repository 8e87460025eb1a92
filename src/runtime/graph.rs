//! One ONNX graph in a session, checked against what the bundle says of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use ort::memory::Allocator;
use ort::session::builder::SessionBuilder;
use ort::session::{IoBinding, Session};
use ort::value::{Outlet, ValueType};

use super::engines::Engine;
use super::placement::Placement;
use super::provider::Work;
use super::recording::{Number, Recording};
use super::tensor::element_type;
use super::{Cancel, Fallback, Mover, Processor, Provider, Runtime, RuntimeError, Tensor, bytes};
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
    facts: Box<GraphFacts>,
    session: Session,
    runtime: Runtime,
    cancel: Cancel,
    recordings: Recordings,
}

/// Which runs of a graph are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recordings {
    /// None can be.
    Never,
    /// So many have been so far.
    Made(Number),
}

/// Inputs and outputs tied to a graph for many runs.
#[derive(Debug)]
pub struct Binding {
    graph: &'static str,
    binding: IoBinding,
    runtime: Runtime,
    /// Bytes of each output that every run brings to the host.
    brought: BTreeMap<String, usize>,
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
        refuse_attention(runtime, bundle, name)?;
        refuse_wrong_sums(runtime, bundle, name)?;
        let engine = engine(runtime, bundle, name)?;
        Self::at_work(runtime, bundle, name, engine.as_ref().map_or(Work::Plain, Work::Built))
    }

    /// As [`open`](Self::open), for runs over the same tensors: they are recorded where the provider can.
    pub fn open_for_steps(runtime: &Runtime, bundle: &Bundle, name: &'static str) -> Result<Self, BundleError> {
        let plain = || Self::open(runtime, bundle, name);
        if !runtime.provider().records() || !bundle.graph(name).profile.is_empty() || runtime.0.options.no_graph_capture {
            return plain();
        }
        refuse_attention(runtime, bundle, name)?;
        refuse_wrong_sums(runtime, bundle, name)?;
        let recorded = Self::at_work(runtime, bundle, name, Work::Recorded);
        let why = match recorded {
            Ok(graph) => return Ok(Self { recordings: Recordings::Made(0), ..graph }),
            Err(why) => why,
        };
        let graph = plain()?;
        runtime.notice(format!(
            "every kernel of a decode step is started on its own, for {} cannot record it: {why}",
            runtime.provider()
        ));
        Ok(graph)
    }

    /// Builds the graph's engine in a folder; nothing where it needs none. It takes minutes.
    pub fn build(runtime: &Runtime, bundle: &Bundle, name: &'static str, folder: &Path) -> Result<(), BundleError> {
        let facts = bundle.graph(name);
        Self::at_work(runtime, bundle, name, Work::Built(&Engine::new(folder.to_path_buf(), name, facts))).map(drop)
    }

    fn at_work(runtime: &Runtime, bundle: &Bundle, name: &'static str, work: Work<'_>) -> Result<Self, BundleError> {
        let (placement, _turn) = (Placement::default(), runtime.turn());
        let unloadable = |error: ort::Error| unloadable(bundle, name, &error);
        let mut session = session(runtime, bundle, name, work, &placement).map_err(unloadable)?;
        let (strangers, provider) = (placement.strangers(), runtime.provider());
        match runtime.fallback() {
            _ if strangers.is_empty() => {}
            Some(Fallback::Nothing) => return Err(unfit(runtime, bundle, name, format!("it does not run {strangers}"))),
            Some(Fallback::Graphs) => {
                session = on_processor(runtime, bundle, name).map_err(unloadable)?;
                runtime.notice(format!("{name} runs on the processor, for {provider} does not run {strangers}"));
            }
            _ => runtime.notice(format!("{name} leaves to the processor what {provider} does not run: {strangers}")),
        }
        check(bundle, name, "input", session.inputs(), &bundle.graph(name).inputs)?;
        check(bundle, name, "output", session.outputs(), &bundle.graph(name).outputs)?;
        let mut facts = Box::new(bundle.graph(name).clone());
        if !matches!(work, Work::Built(_)) {
            facts.profile.clear();
        }
        let (cancel, recordings) = (Cancel::new(), Recordings::Never);
        Ok(Self { name, facts, session, runtime: runtime.clone(), cancel, recordings })
    }

    /// Lets `cancel` stop every later run.
    pub fn set_cancel(&mut self, cancel: Cancel) {
        self.cancel = cancel;
    }

    /// One run; the outputs lie where `outputs_on` says. Inputs on the host may be of another floating-point type than the graph's.
    pub fn run(&mut self, inputs: &[(&str, &Tensor)], outputs_on: Place) -> Result<Outputs, RuntimeError> {
        self.run_to(inputs, |_| outputs_on)
    }

    /// One run; `place` says of each output where it shall lie.
    pub fn run_to(&mut self, inputs: &[(&str, &Tensor)], place: impl Fn(&str) -> Place) -> Result<Outputs, RuntimeError> {
        self.check_sizes(inputs)?;
        let tensors = self.try_run(inputs, place).map_err(|source| self.not_run(source))?;
        self.check_shapes(inputs, &tensors)?;
        Ok(Outputs { graph: self.name, tensors })
    }

    /// Sizes that the graph's engine was not built for would cost minutes.
    fn check_sizes(&self, inputs: &[(&str, &Tensor)]) -> Result<(), RuntimeError> {
        for (name, tensor) in inputs {
            let shape = self.facts.inputs.iter().find(|facts| facts.name == *name).map_or(&[][..], |facts| &facts.shape);
            for (axis, found) in shape.iter().zip(tensor.shape()) {
                let Some((axis, [least, _, most])) = axis.axis().and_then(|axis| self.facts.profile.get_key_value(axis)) else {
                    continue;
                };
                if !(*least..=*most).contains(&found) {
                    let (graph, axis) = (self.name.to_owned(), axis.clone());
                    return Err(RuntimeError::Beyond { graph, axis, found, least: *least, most: *most });
                }
            }
        }
        Ok(())
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

    fn try_run(&mut self, inputs: &[(&str, &Tensor)], place: impl Fn(&str) -> Place) -> Result<Vec<(String, Tensor)>, ort::Error> {
        let _turn = self.runtime.turn();
        let mut binding = self.session.create_binding()?;
        for (name, tensor) in inputs {
            let fitted = self.fitted(name, tensor)?;
            let tensor = fitted.as_ref().unwrap_or(tensor);
            self.runtime.count(tensor, Place::Device);
            binding.bind_input(*name, &tensor.0)?;
        }
        let places = self.session.outputs().iter().map(|output| (output.name().to_owned(), place(output.name())));
        let places: Vec<(String, Place)> = places.collect();
        for (name, place) in &places {
            binding.bind_output_to_device(name, &self.runtime.memory(*place))?;
        }
        let (options, session) = (self.cancel.options()?, self.session.inner());
        let mut outputs = self.session.run_binding_with_options(&binding, &options)?;
        let mut tensors = Vec::with_capacity(places.len());
        for (name, place) in places {
            let Some(value) = outputs.remove(&name) else { continue };
            let tensor = Tensor::from_value(value, session.clone())?;
            if place == Place::Host && self.runtime.has_device() {
                self.runtime.counters().down(tensor.n_bytes());
            }
            tensors.push((name, tensor));
        }
        Ok(tensors)
    }

    /// The tensor in the type that the graph takes, where it is of another and the processor can convert it.
    fn fitted(&self, name: &str, tensor: &Tensor) -> Result<Option<Tensor>, ort::Error> {
        let facts = self.facts.inputs.iter().find(|facts| facts.name == name);
        let other = facts.filter(|facts| facts.dtype.is_float() && !tensor.is(facts.dtype) && tensor.is_on_host());
        other.map(|facts| tensor.to_type(facts.dtype)).transpose()
    }

    /// An empty binding.
    pub fn binding(&self) -> Result<Binding, RuntimeError> {
        let binding = self.session.create_binding().map_err(|source| self.failed("binding", source))?;
        Ok(Binding { graph: self.name, binding, runtime: self.runtime.clone(), brought: BTreeMap::new() })
    }

    /// Whether the graph has an input of this name.
    pub fn takes(&self, input: &str) -> bool {
        self.facts.inputs.iter().any(|facts| facts.name == input)
    }

    /// As [`Precision::least_rows`](crate::bundle::Precision::least_rows).
    pub fn least_rows(&self) -> usize {
        self.facts.precision.least_rows()
    }

    /// Whether ONNX Runtime's own kernels for processors run it.
    pub fn is_on_processor(&self) -> bool {
        self.runtime.provider() == Provider::Cpu
    }

    /// Whether it works on memory of a device.
    pub fn has_device(&self) -> bool {
        self.runtime.has_device()
    }

    /// Whether a tensor in the processor's memory is copied when it is bound, and its later content not seen.
    pub fn copies_when_bound(&self) -> bool {
        matches!(self.runtime.provider(), Provider::Plugin(_)) && !self.runtime.has_device()
    }

    /// One run over what is bound.
    pub fn run_bound(&mut self, bound: &Binding) -> Result<(), RuntimeError> {
        let _turn = self.runtime.turn();
        self.run_as(bound, None)
    }

    /// A turn must be held.
    fn run_as(&mut self, bound: &Binding, recording: Option<Number>) -> Result<(), RuntimeError> {
        let options = self.cancel.options_of(recording);
        let done = options.and_then(|options| self.session.run_binding_with_options(&bound.binding, &options).map(drop));
        done.map_err(|source| self.not_run(source))?;
        bound.brought.values().for_each(|bytes| self.runtime.counters().down(*bytes));
        Ok(())
    }

    /// Whether runs over the same tensors are recorded.
    pub fn records(&self) -> bool {
        self.recordings != Recordings::Never
    }

    /// A number for a run that shall be recorded; none where there are too many already.
    pub fn new_recording(&mut self) -> Option<Recording> {
        let Recordings::Made(n) = self.recordings else { return None };
        let recording = Recording::new(n)?;
        self.recordings = Recordings::Made(n + 1);
        Some(recording)
    }

    /// One run over what is bound, all of it on the device: the first of a recording is recorded, those behind it are repetitions. What a
    /// tensor in the processor's memory held in the first is what it holds in all.
    pub fn run_recorded(&mut self, bound: &Binding, recording: &mut Recording) -> Result<(), RuntimeError> {
        let _turn = if recording.is_made() { self.runtime.turn() } else { self.runtime.provider().turn_to_record() };
        self.run_as(bound, Some(recording.number))?;
        recording.made();
        Ok(())
    }

    /// A tensor of zeros (on a device: of whatever lay there) that can be bound as input and output alike.
    pub fn allocate(&self, dtype: Dtype, shape: &[usize], place: Place) -> Result<Tensor, RuntimeError> {
        let _turn = self.runtime.turn();
        let tensor = match place {
            Place::Host => Tensor::zeros(dtype, shape),
            Place::Device => Allocator::new(&self.session, self.runtime.memory(place))
                .and_then(|allocator| Tensor::allocate(&allocator, dtype, shape, &self.session)),
        };
        tensor.map_err(|source| self.failed("allocating", source))
    }

    /// Moves rows of this graph's tensors.
    pub fn mover(&self) -> Mover {
        Mover::new(&self.runtime)
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

    /// The output `name`; NaN and infinity are errors where it lies on the host, as what they come to is on a device.
    ///
    /// # Panics
    /// As [`take`](Self::take).
    pub fn finite(&mut self, name: &str) -> Result<Tensor, RuntimeError> {
        let tensor = self.take(name);
        if tensor.is_on_host() {
            let values = tensor.to_f32().map_err(|source| self.failed(source))?;
            self.check_finite(name, &values)?;
        }
        Ok(tensor)
    }

    /// The output `name` as float32 on the host; NaN and infinity are errors.
    ///
    /// # Panics
    /// As [`take`](Self::take), and if its rank is not that of `D`.
    pub fn array<D: ndarray::Dimension>(&mut self, name: &str) -> Result<ndarray::Array<f32, D>, RuntimeError> {
        let values = self.take(name).to_f32().map_err(|source| self.failed(source))?;
        self.check_finite(name, &values)?;
        Ok(values.into_dimensionality().expect("the rank was checked when the graph was opened"))
    }

    fn check_finite(&self, name: &str, values: &ndarray::ArrayD<f32>) -> Result<(), RuntimeError> {
        match values.iter().all(|value| value.is_finite()) {
            true => Ok(()),
            false => Err(RuntimeError::NotANumber { graph: self.graph.into(), output: name.into() }),
        }
    }

    fn failed(&self, source: ort::Error) -> RuntimeError {
        RuntimeError::Failed { graph: self.graph.into(), doing: "copying outputs", source: source.into() }
    }
}

impl Binding {
    /// Ties a tensor to an input. Tensors on the host are copied to a device now, so a changed one is bound again before each run.
    pub fn input(&mut self, name: &str, tensor: &Tensor) -> Result<(), RuntimeError> {
        let _turn = self.runtime.turn();
        self.runtime.count(tensor, Place::Device);
        let bound = self.binding.bind_input(name, &tensor.0);
        bound.map_err(|source| self.failed(source))
    }

    /// Ties a tensor made by [`Graph::allocate`] to an output.
    pub fn output(&mut self, name: &str, tensor: &mut Tensor) -> Result<(), RuntimeError> {
        if tensor.is_on_host() && self.runtime.has_device() {
            self.brought.insert(name.to_owned(), tensor.n_bytes());
        }
        let _turn = self.runtime.turn();
        let bound = self.binding.bind_output(name, &mut tensor.0);
        bound.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: ort::Error) -> RuntimeError {
        RuntimeError::Failed { graph: self.graph.into(), doing: "binding", source: source.into() }
    }
}

fn session(runtime: &Runtime, bundle: &Bundle, name: &str, work: Work<'_>, placement: &Placement) -> Result<Session, ort::Error> {
    let mut builder = guarded(runtime.builder(runtime.provider(), work)?, bundle, name)?;
    if runtime.fallback().is_some() {
        builder = placement.listen(builder)?;
    }
    builder.commit_from_file(bundle.path(&bundle.graph(name).file))
}

fn on_processor(runtime: &Runtime, bundle: &Bundle, name: &str) -> Result<Session, ort::Error> {
    guarded(runtime.builder(Provider::Cpu, Work::Plain)?, bundle, name)?.commit_from_file(bundle.path(&bundle.graph(name).file))
}

/// Weights of 7 bits need no guard, which makes the graph of a ViT-L take 4 seconds to load.
fn guarded(builder: SessionBuilder, bundle: &Bundle, name: &str) -> Result<SessionBuilder, ort::Error> {
    if bundle.graph(name).weight_bits == Some(7) { Ok(builder) } else { bytes::guard(builder) }
}

fn unloadable(bundle: &Bundle, graph: &str, error: &ort::Error) -> BundleError {
    BundleError::Unloadable { folder: bundle.folder().to_path_buf(), graph: graph.into(), reason: sentence(&error.to_string()) }
}

/// The engine that was built of a graph; none where it runs without.
fn engine(runtime: &Runtime, bundle: &Bundle, name: &str) -> Result<Option<Engine>, BundleError> {
    let facts = bundle.graph(name);
    if runtime.provider() == Provider::TensorRt && runtime.fallback() == Some(Fallback::Nothing) && !bundle.has_engines() {
        return Err(unfit(runtime, bundle, name, "none of its graphs is made for an engine".into()));
    }
    if runtime.provider() != Provider::TensorRt || facts.profile.is_empty() {
        return Ok(None);
    }
    let not_built = |reason| BundleError::NotBuilt { folder: bundle.folder().to_path_buf(), reason };
    let root = runtime.engines().ok_or_else(|| not_built("no cache folder is known (--cache)".into()))?;
    let folder = runtime.purpose(bundle).find(&root).map_err(not_built)?;
    Ok(Some(Engine::new(folder, name, facts)))
}

const ATTENTION: &str = "GroupQueryAttention";

fn refuse_attention(runtime: &Runtime, bundle: &Bundle, name: &str) -> Result<(), BundleError> {
    let is_strict = runtime.fallback() == Some(Fallback::Nothing);
    if !is_strict || !lacks_attention(runtime.provider(), bundle.graph(name), &bundle.operators(name)?) {
        return Ok(());
    }
    Err(unfit(runtime, bundle, name, format!("it runs {ATTENTION} in float16 and bfloat16 only, and this graph is float32")))
}

/// CUDA has this operator for 16-bit numbers only.
fn lacks_attention(provider: Provider, facts: &GraphFacts, operators: &BTreeSet<String>) -> bool {
    let on_cuda = matches!(provider, Provider::Cuda | Provider::TensorRt);
    let wide = facts.inputs.iter().all(|input| !matches!(input.dtype, Dtype::Float16 | Dtype::Bfloat16));
    on_cuda && wide && operators.contains(ATTENTION)
}

/// What runs on the processor, or may be left to it, multiplies 8-bit numbers right or not at all.
fn refuse_wrong_sums(runtime: &Runtime, bundle: &Bundle, name: &str) -> Result<(), BundleError> {
    let is_plain = bundle.operators(name)?.iter().all(|operator| !bytes::OPERATORS.contains(&operator.as_str()));
    if runtime.fallback() == Some(Fallback::Nothing)
        || is_plain
        || runtime.multiplies_bytes().map_err(|e| unloadable(bundle, name, &e))?
    {
        return Ok(());
    }
    let (folder, processor) = (bundle.folder().to_path_buf(), Processor::detect().to_string());
    Err(BundleError::Inexact { folder, graph: name.into(), version: runtime.library().version.clone(), processor })
}

fn unfit(runtime: &Runtime, bundle: &Bundle, graph: &str, reason: String) -> BundleError {
    let provider = runtime.provider().to_string();
    BundleError::Unfit { folder: bundle.folder().to_path_buf(), graph: graph.into(), provider, reason }
}

/// What ONNX Runtime or a plugin says, in one line and without the places in its own sources.
pub(super) fn sentence(said: &str) -> String {
    let says = |line: &&str| !line.trim().is_empty() && !line.starts_with("Exception from ");
    let mut text = said.lines().find(says).unwrap_or_default().to_owned();
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
    use crate::runtime::{ProviderChoice, RuntimeOptions};

    #[test]
    fn attention_in_float32_is_refused_on_cuda_only() {
        let bundle = Bundle::open(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo-opt")).unwrap();
        let refused = |provider, graph| lacks_attention(provider, bundle.graph(graph), &bundle.operators(graph).unwrap());
        assert!(refused(Provider::Cuda, "decoder") && refused(Provider::TensorRt, "decoder"));
        assert!(!refused(Provider::Cpu, "decoder") && !refused(Provider::Cuda, "vision"));
        let mut narrow = bundle.graph("decoder").clone();
        narrow.inputs.iter_mut().filter(|input| input.dtype.is_float()).for_each(|input| input.dtype = Dtype::Float16);
        assert!(!lacks_attention(Provider::Cuda, &narrow, &bundle.operators("decoder").unwrap()));
    }

    #[test]
    fn graphs_of_bytes_are_refused_where_their_sums_come_out_wrong() {
        let provider = ProviderChoice::Only(Provider::Cpu);
        let runtime = Runtime::load(&RuntimeOptions { provider, ..RuntimeOptions::default() }).unwrap();
        runtime.0.multiplies_bytes.set(false).unwrap();
        let bundles = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundles");
        let open = |name: &str| Graph::open(&runtime, &Bundle::open(&bundles.join(name)).unwrap(), "vision");
        let said = open("int8-stage1").unwrap_err().to_string();
        assert!(said.contains("vision multiplies 8-bit numbers, and ONNX Runtime 1."), "{said}");
        assert!(open("stage1").is_ok());
    }

    #[test]
    fn sizes_that_an_engine_was_not_built_for_are_refused_before_it_is_built_again() {
        let bundle = Bundle::open(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo-opt")).unwrap();
        let cpu = crate::runtime::ProviderChoice::Only(Provider::Cpu);
        let runtime = Runtime::load(&crate::runtime::RuntimeOptions { provider: cpu, ..Default::default() }).unwrap();
        let mut graph = Graph::at_work(&runtime, &bundle, "vision", Work::Built(&Engine::default())).unwrap();
        graph.facts.profile.insert("batch".into(), [1, 1, 2]);
        let side = bundle.facts().image.size as usize;
        let mut run = |n: usize| {
            let pixels = Tensor::from_f32(ndarray::Array4::zeros((n, 3, side, side))).unwrap();
            graph.run(&[("pixel_values", &pixels)], Place::Host).map(drop)
        };
        assert!(run(2).is_ok());
        let said = run(3).unwrap_err().to_string();
        assert_eq!(said, "vision: batch is 3, its TensorRT engine was built for 1 to 2; ask for fewer at a time");
    }

    #[test]
    fn places_in_foreign_sources_are_left_out() {
        let cases = [
            (
                "Status Message: /src/core/arena.cc:360 void* onnxruntime::Arena::Get(size_t, std::function<bool(int)>) Failed (all)\n#0 x",
                "Status Message: Failed (all)",
            ),
            ("FAIL : utils.cc:633 GetInfo TensorProto: w (2) is long", "FAIL : GetInfo TensorProto: w (2) is long"),
            ("\nan end.cc:1", "an"),
            ("Exception from src/core.cpp:117:\nException from src/dev/plugin.cpp:54:\nNotFound: X\n\n", "NotFound: X"),
            ("x.cc:1 a::b(", "a::b("),
            ("", ""),
        ];
        for (said, wanted) in cases {
            assert_eq!(sentence(said), wanted);
        }
    }
}
