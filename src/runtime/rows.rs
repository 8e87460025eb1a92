//! Rows of tensors: handed around without a copy, moved and put together where they lie.
//!
//! A tensor's first axis counts rows, the last but one positions. On the processor a move is a copy in place; on a device it is a graph of
//! two nodes there, whose output is the tensor that it changes.

use std::sync::Arc;

use half::{bf16, f16};
use ndarray::{ArrayD, Axis};
use ort::memory::Allocator;
use ort::session::{IoBinding, Session};

use super::model::{FROM, INTO, Node, Port, copies, identity, model};
use super::provider::Work;
use super::{Cancel, Place, Runtime, RuntimeError, Tensor};
use crate::bundle::Dtype;

/// One row of a tensor. Cheap to clone; the whole tensor lives as long as any of its rows.
#[derive(Clone, Debug)]
pub struct Row {
    tensor: Arc<Tensor>,
    index: usize,
}

/// Positions of a row on their way to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Row it comes from.
    pub from: usize,
    /// Row it goes to.
    pub to: usize,
    /// First position, in both.
    pub start: usize,
    /// Behind the last.
    pub end: usize,
}

/// Moves rows of tensors of any element type, `[rows, positions, width]` or `[rows, heads, positions, width]`.
#[derive(Debug)]
pub struct Mover {
    runtime: Runtime,
    /// Never used to stop anything: moves are short, and half a move is worse than none.
    cancel: Cancel,
    graphs: Vec<MoveGraph>,
    identities: Vec<(Dtype, Session)>,
    /// Each copies tensors of these types in one run.
    carriers: Vec<(Vec<Dtype>, Session)>,
}

/// The graph on a device, for some tensors that move alike, as those of all layers do. The last moves stay bound.
#[derive(Debug)]
struct MoveGraph {
    dtype: Dtype,
    ports: Vec<Ports>,
    session: Session,
    binding: IoBinding,
    bound: Option<(Vec<Move>, Vec<usize>)>,
}

/// What the graph calls the parts of one tensor's move.
#[derive(Debug)]
struct Ports {
    from: String,
    into: String,
    moved: String,
    out: String,
}

/// Sizes of `[rows, heads, positions, width]`.
#[derive(Clone, Copy, Debug)]
struct Layout {
    heads: usize,
    positions: usize,
    width: usize,
}

impl Row {
    /// Every row of a tensor.
    pub fn all(tensor: Arc<Tensor>) -> impl ExactSizeIterator<Item = Self> {
        (0..tensor.shape()[0]).map(move |index| Self { tensor: tensor.clone(), index })
    }

    /// The tensor it is a row of.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Which row.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Whether both are the same row of one tensor.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.tensor, &other.tensor) && self.index == other.index
    }

    /// Its own sizes.
    pub fn shape(&self) -> Vec<usize> {
        self.tensor.shape().split_off(1)
    }

    /// Its float32 values, in place. The tensor must lie on the host.
    pub fn f32(&self) -> Result<&[f32], ort::Error> {
        let size = self.shape().iter().product::<usize>();
        Ok(&self.tensor.f32()?[self.index * size..][..size])
    }
}

impl Mover {
    /// Loads nothing yet: the processor needs no graph.
    pub fn new(runtime: &Runtime) -> Self {
        Self { runtime: runtime.clone(), cancel: Cancel::new(), graphs: Vec::new(), identities: Vec::new(), carriers: Vec::new() }
    }

    /// Copies positions of `from` to the same positions of `into`.
    ///
    /// # Panics
    /// If the tensors differ in element type, heads or width, or a move lies outside of them.
    pub fn copy(&mut self, from: &Tensor, into: &mut Tensor, moves: &[Move]) -> Result<(), RuntimeError> {
        self.copy_all(&[from], &mut [into], moves)
    }

    /// Copies positions of every tensor of `from` to the same positions of that of `into`; on a device in one run. Those of each side have
    /// one shape.
    ///
    /// # Panics
    /// As [`copy`](Self::copy).
    pub fn copy_all(&mut self, from: &[&Tensor], into: &mut [&mut Tensor], moves: &[Move]) -> Result<(), RuntimeError> {
        self.run(Some(from), into, moves).map_err(failed)
    }

    /// Copies positions within tensors of one shape, on a device in one run. No row is both read and written.
    ///
    /// # Panics
    /// As [`copy`](Self::copy).
    pub fn copy_within(&mut self, tensors: &mut [&mut Tensor], moves: &[Move]) -> Result<(), RuntimeError> {
        self.run(None, tensors, moves).map_err(failed)
    }

    /// Puts rows of one shape and type into one tensor; those that make up a tensor already are not copied.
    ///
    /// # Panics
    /// If there are none, or as [`copy`](Self::copy).
    pub fn stack(&mut self, rows: &[&Row]) -> Result<Arc<Tensor>, RuntimeError> {
        let first = rows.first().expect("a batch has a row");
        let in_order = |(at, row): (usize, &&Row)| Arc::ptr_eq(&row.tensor, &first.tensor) && row.index == at;
        if rows.len() == first.tensor.shape()[0] && rows.iter().enumerate().all(in_order) {
            return Ok(first.tensor.clone());
        }
        let place = if rows.iter().all(|row| row.tensor.is_on_host()) { Place::Host } else { Place::Device };
        let shape = [vec![rows.len()], first.shape()].concat();
        let n_positions = shape[shape.len() - 2];
        let mut batch = self.allocate(first.tensor.dtype(), &shape, place).map_err(failed)?;
        let mut left: Vec<(usize, &&Row)> = rows.iter().enumerate().collect();
        while let Some((_, next)) = left.first() {
            let tensor = next.tensor.clone();
            let (here, others) = left.into_iter().partition(|(_, row)| Arc::ptr_eq(&row.tensor, &tensor));
            let whole = |(to, row): &(usize, &&Row)| Move { from: row.index, to: *to, start: 0, end: n_positions };
            let here: Vec<(usize, &&Row)> = here;
            self.copy(&tensor, &mut batch, &here.iter().map(whole).collect::<Vec<_>>())?;
            left = others;
        }
        Ok(Arc::new(batch))
    }

    /// A row's values as float32.
    pub fn read(&mut self, row: &Row) -> Result<ArrayD<f32>, RuntimeError> {
        let mut alone = self.stack(&[row])?;
        if !alone.is_on_host() {
            alone = Arc::new(self.to_host(&alone)?);
        }
        Ok(alone.to_f32().map_err(failed)?.index_axis_move(Axis(0), 0))
    }

    /// Copies whole tensors into others of their type and shape, wherever these lie, in one run. None is a single number.
    ///
    /// # Panics
    /// If there are more than 10.
    pub fn carry(&mut self, from: &[&Tensor], into: &mut [&mut Tensor]) -> Result<(), RuntimeError> {
        self.carried(from, Some(into)).map(drop).map_err(failed)
    }

    /// Copies where graphs run, made in one run. None of the tensors is a single number.
    ///
    /// # Panics
    /// If there are more than 10.
    pub fn all_to_device(&mut self, tensors: &[&Tensor]) -> Result<Vec<Tensor>, RuntimeError> {
        self.carried(tensors, None).map_err(failed)
    }

    /// A copy on the host.
    pub fn to_host(&mut self, tensor: &Tensor) -> Result<Tensor, RuntimeError> {
        self.bring(tensor, Place::Host).map_err(failed)
    }

    /// A copy where graphs run.
    pub fn to_device(&mut self, tensor: &Tensor) -> Result<Tensor, RuntimeError> {
        self.bring(tensor, Place::Device).map_err(failed)
    }

    /// The tensor itself on the processor, a copy on a device.
    pub fn at_device(&mut self, tensor: Tensor) -> Result<Tensor, RuntimeError> {
        if self.runtime.has_device() { self.to_device(&tensor) } else { Ok(tensor) }
    }

    fn run(&mut self, from: Option<&[&Tensor]>, into: &mut [&mut Tensor], moves: &[Move]) -> Result<(), ort::Error> {
        let Some(first) = into.first().map(|first| &**first) else { return Ok(()) };
        let other = from.and_then(|from| from.first().copied()).unwrap_or(first);
        let (there, here) = (Layout::of(other), Layout::of(first));
        assert!(other.dtype() == first.dtype() && there.heads == here.heads && there.width == here.width, "rows of one kind");
        let fits = |step: &Move| {
            let inside = step.from < other.shape()[0] && step.to < first.shape()[0] && step.start <= step.end;
            inside && step.end <= there.positions.min(here.positions)
        };
        assert!(moves.iter().all(fits), "moves within the tensors");
        let moves: Vec<Move> = moves.iter().copied().filter(|step| step.start < step.end).collect();
        if moves.is_empty() {
            return Ok(());
        }
        if !(other.is_on_host() && first.is_on_host()) {
            return self.on_device(from, into, &moves);
        }
        into.iter_mut().enumerate().try_for_each(|(at, into)| on_host(from.map(|from| from[at]), into, &moves))
    }

    fn on_device(&mut self, from: Option<&[&Tensor]>, into: &mut [&mut Tensor], moves: &[Move]) -> Result<(), ort::Error> {
        let runtime = self.runtime.clone();
        let (counters, options, _turn) = (runtime.counters(), self.cancel.options()?, runtime.turn());
        let graph = self.graph(into[0].dtype(), into.len())?;
        let shape = into[0].shape();
        if graph.bound.as_ref().is_none_or(|(bound, of)| bound != moves || of[1..] != shape[1..]) {
            for (name, row) in [("read", (|step| step.from) as fn(&Move) -> usize), ("write", |step| step.to)] {
                let places = Tensor::from_i64(places(moves, row, &shape))?;
                counters.up(places.n_bytes());
                graph.binding.bind_input(name, &places.0)?;
            }
            graph.bound = Some((moves.to_vec(), shape));
        }
        for (at, (ports, into)) in graph.ports.iter().zip(into).enumerate() {
            let from = from.map_or(&**into, |from| from[at]);
            for tensor in [from, &**into].into_iter().filter(|tensor| tensor.is_on_host()) {
                counters.up(tensor.n_bytes());
            }
            graph.binding.bind_input(&ports.from, &from.0)?;
            graph.binding.bind_input(&ports.into, &into.0)?;
            graph.binding.bind_output(&ports.out, &mut into.0)?;
        }
        graph.session.run_binding_with_options(&graph.binding, &options).map(drop)
    }

    fn graph(&mut self, dtype: Dtype, n: usize) -> Result<&mut MoveGraph, ort::Error> {
        if let Some(at) = self.graphs.iter().position(|graph| graph.dtype == dtype && graph.ports.len() == n) {
            return Ok(&mut self.graphs[at]);
        }
        let ports: Vec<Ports> = (0..n).map(Ports::of).collect();
        let session = self.runtime.small_session(&moving(dtype, &ports), Work::Plain)?;
        let binding = session.create_binding()?;
        self.graphs.push(MoveGraph { dtype, ports, session, binding, bound: None });
        Ok(self.graphs.last_mut().expect("it was just put there"))
    }

    fn allocate(&mut self, dtype: Dtype, shape: &[usize], place: Place) -> Result<Tensor, ort::Error> {
        let _turn = self.runtime.turn();
        if place == Place::Host {
            return Tensor::zeros(dtype, shape);
        }
        let memory = self.runtime.memory(place);
        let session = &self.graph(dtype, 1)?.session;
        Tensor::allocate(&Allocator::new(session, memory)?, dtype, shape, session)
    }

    /// Gives the copies that have no place yet.
    fn carried(&mut self, from: &[&Tensor], into: Option<&mut [&mut Tensor]>) -> Result<Vec<Tensor>, ort::Error> {
        let dtypes: Vec<Dtype> = from.iter().map(|tensor| tensor.dtype()).collect();
        let (options, _turn) = (self.cancel.options()?, self.runtime.turn());
        if self.carriers.iter().all(|(of, _)| *of != dtypes) {
            // WebGPU has int64 where it records.
            let session = self.runtime.small_session(&copies(&dtypes), Work::Recorded)?;
            self.carriers.push((dtypes.clone(), session));
        }
        let (_, session) = self.carriers.iter_mut().find(|(of, _)| *of == dtypes).expect("it was just put there");
        let (mut binding, owner) = (session.create_binding()?, session.inner());
        let to_host = into.as_ref().is_some_and(|into| into.iter().all(|tensor| tensor.is_on_host()));
        for (from, x) in from.iter().zip(FROM) {
            self.runtime.count(from, if to_host { Place::Host } else { Place::Device });
            binding.bind_input(x, &from.0)?;
        }
        let names = INTO.into_iter().take(from.len());
        let Some(into) = into else {
            names.clone().try_for_each(|y| binding.bind_output_to_device(y, &self.runtime.memory(Place::Device)))?;
            let mut outputs = session.run_binding_with_options(&binding, &options)?;
            return names.filter_map(|y| outputs.remove(y)).map(|copy| Tensor::from_value(copy, owner.clone())).collect();
        };
        into.iter_mut().zip(names).try_for_each(|(into, y)| binding.bind_output(y, &mut into.0))?;
        session.run_binding_with_options(&binding, &options)?;
        Ok(Vec::new())
    }

    fn bring(&mut self, tensor: &Tensor, place: Place) -> Result<Tensor, ort::Error> {
        let (dtype, options, _turn) = (tensor.dtype(), self.cancel.options()?, self.runtime.turn());
        if self.identities.iter().all(|(of, _)| *of != dtype) {
            let session = self.runtime.small_session(&identity(dtype), Work::Plain)?;
            self.identities.push((dtype, session));
        }
        let (_, session) = self.identities.iter_mut().find(|(of, _)| *of == dtype).expect("it was just put there");
        let (mut binding, owner) = (session.create_binding()?, session.inner());
        self.runtime.count(tensor, place);
        binding.bind_input("x", &tensor.0)?;
        binding.bind_output_to_device("y", &self.runtime.memory(place))?;
        let output = session.run_binding_with_options(&binding, &options)?.remove("y").expect("the model has one output");
        Tensor::from_value(output, owner)
    }
}

impl Ports {
    fn of(index: usize) -> Self {
        let name = |part: &str| format!("{part}{index}");
        Self { from: name("from"), into: name("into"), moved: name("moved"), out: name("out") }
    }
}

/// A model that gathers positions of each tensor and scatters them into another.
fn moving(dtype: Dtype, ports: &[Ports]) -> Vec<u8> {
    let inputs = ports.iter().flat_map(|ports| [(ports.from.as_str(), dtype), (ports.into.as_str(), dtype)]);
    let inputs: Vec<Port<'_>> = inputs.chain([("read", Dtype::Int64), ("write", Dtype::Int64)]).collect();
    let operands: Vec<([&str; 2], [&str; 3])> =
        ports.iter().map(|p| ([p.from.as_str(), "read"], [p.into.as_str(), "write", p.moved.as_str()])).collect();
    let nodes = ports.iter().zip(&operands).flat_map(|(ports, (gathered, scattered))| {
        [("GatherND", &gathered[..], ports.moved.as_str()), ("ScatterND", &scattered[..], ports.out.as_str())]
    });
    let outputs: Vec<Port<'_>> = ports.iter().map(|ports| (ports.out.as_str(), dtype)).collect();
    model(&nodes.collect::<Vec<Node<'_>>>(), &inputs, &outputs)
}

impl Layout {
    fn of(tensor: &Tensor) -> Self {
        let shape = tensor.shape();
        let [_, heads @ .., positions, width] = shape.as_slice() else { panic!("rows have positions: {shape:?}") };
        Self { heads: heads.iter().product(), positions: *positions, width: *width }
    }

    /// Where a row's positions of a head lie.
    fn range(self, row: usize, head: usize, step: &Move) -> std::ops::Range<usize> {
        let start = (row * self.heads + head) * self.positions;
        (start + step.start) * self.width..(start + step.end) * self.width
    }
}

/// One line a position and head that move: where it stands on all axes but the last.
fn places(moves: &[Move], row: fn(&Move) -> usize, shape: &[usize]) -> ndarray::Array2<i64> {
    let heads = if shape.len() > 3 { shape[1] } else { 1 };
    let mut found = Vec::new();
    for step in moves {
        for head in 0..heads {
            for position in step.start..step.end {
                found.push(row(step) as i64);
                found.extend((shape.len() > 3).then_some(head as i64));
                found.push(position as i64);
            }
        }
    }
    let depth = shape.len() - 1;
    ndarray::Array2::from_shape_vec((found.len() / depth, depth), found).expect("lines of one length")
}

fn on_host(from: Option<&Tensor>, into: &mut Tensor, moves: &[Move]) -> Result<(), ort::Error> {
    match into.dtype() {
        Dtype::Float32 => values::<f32>(from, into, moves),
        Dtype::Float16 => values::<f16>(from, into, moves),
        Dtype::Bfloat16 => values::<bf16>(from, into, moves),
        Dtype::Int64 => values::<i64>(from, into, moves),
        Dtype::Int32 => values::<i32>(from, into, moves),
    }
}

fn values<T: ort::value::PrimitiveTensorElementType + Copy + std::fmt::Debug>(
    from: Option<&Tensor>,
    into: &mut Tensor,
    moves: &[Move],
) -> Result<(), ort::Error> {
    let to = Layout::of(into);
    let there = from.map_or(to, Layout::of);
    let read = from.map(|from| from.0.try_extract_tensor::<T>()).transpose()?;
    let (_, write) = into.0.try_extract_tensor_mut::<T>()?;
    for step in moves {
        for head in 0..to.heads {
            let (source, target) = (there.range(step.from, head, step), to.range(step.to, head, step));
            match read {
                Some((_, values)) => write[target].copy_from_slice(&values[source]),
                None => write.copy_within(source, target.start),
            }
        }
    }
    Ok(())
}

fn failed(source: ort::Error) -> RuntimeError {
    RuntimeError::Failed { graph: "rows".into(), doing: "moving rows", source: Arc::new(source) }
}
