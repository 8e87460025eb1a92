"""A small builder of ONNX graphs whose weights stream into an external data file as they are added; graphs may share one."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from blip2_export.graphs.grid import on_grid
from blip2_export.graphs.heads import Heads, padded
from blip2_export.graphs.precision import FLOATS, Precision
from blip2_export.graphs.statistics import Channels, Statistics

OPSET = 21
MICROSOFT = "com.microsoft"
MASKED = -1e30  # T5 does not scale its scores; the operators' own -10000 may not be far enough below them
CAPACITY_STEP = 64  # a cache may hold as many more positions than the model, so that its size is a multiple
_PAGE = 4096  # large weights start on a page, so that the runtime can map them straight from the file
_LINE = 64
_LARGE_BYTES = 1 << 20
_INLINE_BYTES = 1024
_LEAST_OUTPUTS = 32  # products with fewer stay in float32: they cost nothing
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
}
_FLOAT32 = np.dtype(np.float32)
Dim = int | str
Attend = Callable[[str, list[str], list[str]], str]  # packed projections, past and present keys and values → rows


@dataclass(frozen=True)
class Mask:
    """What attention may see, as the operators of a target take it."""

    padding: str = ""
    bias: str = ""


@dataclass(frozen=True)
class New:
    """What a decoder computes: embeddings and int64 positions of rows, which count from the `offset`-th place of the cache."""

    embeds: str
    positions: str
    offset: int = 0


class Data:
    """An external data file. Equal bytes are written once, whichever graph they belong to."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = f"{name}.onnx.data"
        self._path = folder / self.name
        self._path.write_bytes(b"")
        self._offsets: dict[bytes, int] = {}

    def append(self, array: np.ndarray) -> int:
        """Writes the bytes unless they are there; gives their offset."""
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        key = hashlib.sha256(content).digest()
        if key not in self._offsets:
            with self._path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % (_PAGE if array.nbytes >= _LARGE_BYTES else _LINE)))
                self._offsets[key] = file.tell()
                file.write(content)
        return self._offsets[key]


class Graph(ABC):
    """Nodes, weights and the declared inputs and outputs of one `.onnx` file, of the operators that a target computes.

    In float32, weights keep their dtype, or are stored in 8 bits where nothing is lost; nodes behind them give float32, which the
    runtime folds when it loads the graph. A graph that computes in 16 bits has its weights in that type. Graphs hand each other
    float32 all the same, so that parts of any precision fit together; only caches are of the graph's own type.
    """

    target: ClassVar[str]
    precisions: ClassVar[tuple[Precision, ...]] = (Precision.FLOAT32,)
    natural: ClassVar[Precision] = Precision.FLOAT32  # where nobody chose
    calibrated: ClassVar[tuple[Precision, ...]] = ()  # made with what calibration saw

    def __init__(self, out: Output, name: str, data: Data | None = None, n_positions: int = 0) -> None:
        """`n_positions`: the most that a text of the model may have, where the graph counts them."""
        self.name, self.folder, self.precision = name, out.folder, out.precision
        self.dtype = self.activations(out)
        self._n_positions = padded(n_positions, CAPACITY_STEP)
        self.data = data or out.data(name)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes: list[onnx.ValueInfoProto] = []
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []
        self.bounds: dict[Dim, int] = {}  # of axes that are not fixed, where one is known
        self.linear_inputs: list[str] = []  # distinct values that weights are multiplied with, in order of first use
        self._statistics = None if out.statistics is None else out.statistics[name]
        self._constants: dict[tuple[Any, ...], str] = {}
        self._count = 0

    @classmethod
    def of(cls, name: str) -> type[Graph]:
        """The class of the target's graph of this name."""
        return cls

    @classmethod
    def activations(cls, out: Output) -> np.dtype:
        """What is computed in, of graphs of a precision."""
        return np.dtype(
            {Precision.FLOAT16: np.float16, Precision.BFLOAT16: ml_dtypes.bfloat16}.get(out.precision, np.float32)
        )

    @property
    def file_name(self) -> str:
        return f"{self.name}.onnx"

    @property
    def masked(self) -> float:
        """What is added to the score of a key that is not seen."""
        return max(MASKED, float(ml_dtypes.finfo(self.dtype).min))

    @property
    def is_narrow(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.dtype != np.float32

    def input(self, name: str, dtype: str, shape: Sequence[Dim]) -> str:
        self.inputs.append({"name": name, "dtype": dtype, "shape": list(shape)})
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[Dim]) -> None:
        """Declares `value` as output `name`."""
        if value != name:
            self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append({"name": name, "dtype": dtype, "shape": list(shape)})

    def bound(self, name: str, axis: int, most: int) -> None:
        """Notes how large an axis of an input may be."""
        self.bounds[self.axes(name)[axis]] = most

    def axes(self, name: str) -> list[Dim]:
        """The shape of an input."""
        return next(value["shape"] for value in self.inputs if value["name"] == name)

    def take(self, name: str, shape: Sequence[Dim]) -> str:
        """What another graph gave, or pixels: a float32 input, as value of this graph."""
        return self._cast(self.input(name, "float32", shape), self.dtype, _FLOAT32)

    def give(self, value: str, name: str, shape: Sequence[Dim], first: bool = False) -> None:
        """Declares a value as float32 output `name`, `first` of them if so."""
        kind, to = ("Cast", {"to": TensorProto.FLOAT}) if self.is_narrow else ("Identity", {})
        self.op(kind, [value], [name], **to)
        self.outputs.insert(0 if first else len(self.outputs), {"name": name, "dtype": "float32", "shape": list(shape)})

    def op(
        self, kind: str, inputs: Sequence[str], outputs: int | Sequence[str] = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Adds a node; gives the name of its output, or the list of names when there are several."""
        names = [self.fresh(kind) for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self.nodes.append(
            helper.make_node(kind, list(inputs), names, domain=domain, name=self.fresh("n"), **attributes)
        )
        return names[0] if len(names) == 1 else names

    def shaped(self, value: str, shape: Sequence[Dim], dtype: np.dtype | None = None) -> str:
        """Says the shape of a value, of the graph's own type if none is given, where the runtime cannot tell it.

        Values of unknown sizes share no memory, and ONNX Runtime compares each with all others when it loads the graph.
        """
        self.shapes.append(helper.make_tensor_value_info(value, _TYPES[dtype or self.dtype], shape))
        return value

    def number(self, value: Any) -> str:
        """A constant of the graph's own type."""
        return self.constant(value, self.dtype.type)

    def constant(self, value: Any, dtype: type = np.int64) -> str:
        """A constant; equal ones are shared."""
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.shape, array.dtype.name)
        if key not in self._constants:
            self._constants[key] = self.raw(array)
        return self._constants[key]

    def weight(self, array: np.ndarray) -> str:
        """A weight as value, stored as the class says; in float32, where it is on the grid, as 8-bit numbers and scales."""
        array = self.fitted(array)
        found = on_grid(array) if array.nbytes > _INLINE_BYTES else None
        if found is None:
            return self.lifted(self.raw(array), array)
        numbers, scales = found
        parts = (numbers, scales.reshape(-1, *[1] * (array.ndim - 1)))
        return str(self.op("Mul", [self.lifted(self.raw(part), part) for part in parts]))

    def raw(self, array: np.ndarray) -> str:
        """An initialiser in its own dtype."""
        if array.nbytes > _INLINE_BYTES:
            return self._external(array, self.data.append(array))
        tensor = TensorProto(name=self.fresh("w"), data_type=_TYPES[array.dtype], dims=array.shape)
        tensor.raw_data = np.ascontiguousarray(array).tobytes()
        self.weights.append(tensor)
        return tensor.name

    def stored(self, array: np.ndarray) -> str:
        """A weight in its own dtype as value; bytes that the data file has already are not written again."""
        array = self.fitted(array)
        return self.lifted(self.raw(array), array)

    def fitted(self, array: np.ndarray) -> np.ndarray:
        """A weight in the type that a graph of 16 bits computes in."""
        if not self.is_narrow or array.dtype == self.dtype:
            return array
        with np.errstate(over="ignore"):
            found = array.astype(np.float32).astype(self.dtype)
        if not np.isfinite(found).all():
            raise UnsupportedError(f"{self.name} has weights beyond {self.dtype}; bfloat16 or float32 holds them")
        return found

    def lifted(self, name: str, array: np.ndarray) -> str:
        """A value of the array's dtype as one of the graph's."""
        return name if array.dtype == self.dtype else self.op("Cast", [name], to=_TYPES[self.dtype])

    def float32(self, value: str) -> str:
        """A value of the graph as float32: 16 bits do not hold sums of squares and the like."""
        return self._cast(value, _FLOAT32, self.dtype)

    def _cast(self, value: str, to: np.dtype, of: np.dtype) -> str:
        return value if to == of else self.op("Cast", [value], to=_TYPES[to])

    def _external(self, array: np.ndarray, offset: int) -> str:
        tensor = TensorProto(name=self.fresh("w"), data_type=_TYPES[array.dtype], dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.data.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        return tensor.name

    def save(self) -> None:
        """Writes the `.onnx` file beside its data."""
        inputs, outputs = ([_value(v) for v in side] for side in (self.inputs, self.outputs))
        graph = helper.make_graph(self.nodes, self.name, inputs, outputs, self.weights, value_info=self.shapes)
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="blip2_export")
        (self.folder / self.file_name).write_bytes(model.SerializeToString())

    def describe(self) -> dict[str, Any]:
        """The graph's entry in `bundle.json`."""
        how = {"precision": self.precision, **self.narrowing()}
        return {"file": self.file_name, **how, "inputs": self.inputs, "outputs": self.outputs}

    def narrowing(self) -> dict[str, int]:
        """What `bundle.json` says of weights of 8 or 4 bits besides: `weight_bits` by rows, `block_size` by blocks."""
        return {}

    def fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    # What each target computes in its own way. Projections are [batch, positions, heads × width]

    @abstractmethod
    def product(self, x: str, weight: str) -> str:
        """`x · weightᵀ`, both float32 values."""

    def narrow_product(self, x: str, weight: np.ndarray, channels: Channels | None) -> str:
        """`x · weightᵀ` with weights of 8 or 4 bits, for targets that have such precisions. `channels`: those of `x`."""
        raise UnsupportedError(f"graphs for {self.target} cannot be {self.precision}")

    @abstractmethod
    def rows(self, table: np.ndarray, ids: str) -> str:
        """The rows `ids` of a table as values."""

    @abstractmethod
    def n_tokens(self, ids: str, rows: str) -> str:
        """int64 [1]: how many `ids` each text has, of which `rows` were picked."""

    @abstractmethod
    def mask(self, real: str) -> Mask:
        """Of keys that are real where int32 [batch, keys] has a 1."""

    @abstractmethod
    def mask_behind(self, lengths: str, like: str, axis: int, bias: str = "") -> Mask:
        """Of the keys along `axis` of `like`, the first `lengths` [batch]. `bias`: [batch or 1, heads, queries, keys]."""

    @abstractmethod
    def attention(
        self, qkv: list[str], heads: Heads, mask: Mask | None = None, scale: float | None = None, by_heads: bool = False
    ) -> str:
        """Of queries to keys and values, which are projections or, `by_heads`, [batch, heads, positions, width]."""

    @abstractmethod
    def cache_positions(self) -> str:
        """float32 in every graph: those of the cache that attention looks at, from 0."""

    @abstractmethod
    def over_cache(
        self, new: New, heads: Heads, scale: float, bias: str = "", rotary: tuple[np.ndarray, ...] = ()
    ) -> Attend:
        """Causal attention of rows over the cache and the new positions, which it writes to the cache in place.

        `bias`: of rows, for the positions of the cache. `rotary`: cosines and sines of every position.
        """

    # Layers shared by all networks

    def patches(self, pixels: str, weights: list[np.ndarray], n: int) -> str:
        """[batch, n², width]: `n` × `n` squares of the pixels, projected by a kernel [width, 3, side, side] and perhaps a bias."""
        width, _, *side = weights[0].shape
        x = self.op("Conv", [pixels, *map(self.weight, weights)], kernel_shape=side, strides=side)
        return self.op("Transpose", [self.op("Reshape", [x, self.constant([0, width, n * n])])], perm=[0, 2, 1])

    def seen(self, x: str) -> Channels | None:
        """Notes that a weight is multiplied with `x`; gives what calibration saw there."""
        if x not in self.linear_inputs:
            self.linear_inputs.append(x)
        return None if self._statistics is None else self._statistics[self.linear_inputs.index(x)]

    def linear(self, x: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        """`x · weightᵀ + bias`, the weight in PyTorch's [out, in] layout."""
        y = self.times(x, weight)
        return y if bias is None else self.op("Add", [y, self.weight(bias)])

    def times(self, x: str, weight: np.ndarray, shared: bool = False) -> str:
        """`x · weightᵀ` in the graph's precision. `shared`: the data file may hold the weight's own bytes already."""
        channels = self.seen(x)
        if len(weight) < _LEAST_OUTPUTS or self.precision in FLOATS:
            return self.product(x, self.stored(weight) if shared else self.weight(weight))
        return self.narrow_product(x, weight, channels)

    def layer_norm(self, x: str, weight: np.ndarray | None, bias: np.ndarray | None, epsilon: float, width: int) -> str:
        scale = self.number(np.ones(width)) if weight is None else self.weight(weight)
        inputs = [x, scale] if bias is None else [x, scale, self.weight(bias)]
        return self.op("LayerNormalization", inputs, axis=-1, epsilon=float(epsilon))

    def rms_norm(self, x: str, weight: np.ndarray, epsilon: float) -> str:
        return self.op("SimplifiedLayerNormalization", [x, self.weight(weight)], axis=-1, epsilon=float(epsilon))

    def to_slots(self, x: str) -> str:
        """Of every slot what belongs to its row; slots without a row get any."""
        return self.op("Gather", [x, "slot_rows"], axis=0)

    def to_rows(self, x: str) -> str:
        """Of every row what its slot holds."""
        return self.op("Gather", [x, "row_slots"], axis=0)

    def count(self, end: str) -> str:
        """float32 0, 1, … below `end`, int64 [1] and at most the positions of the graph."""
        numbers = self.constant(np.arange(self._n_positions), np.float32)
        return self.op("Slice", [numbers, self.constant([0]), end])

    def int32(self, ids: str, below: int | None = None) -> str:
        """int64 ids from 0 as int32: positions of the graph, or numbers `below` another. A Gather runs on every device."""
        return self.op("Gather", [self.constant(np.arange(below or self._n_positions), np.int32), ids], axis=0)

    def activation(self, x: str, name: str) -> str:
        """The activation that `transformers` calls `name`."""
        if name == "gelu":
            return self.op("Gelu", [x])
        if name in ("gelu_new", "gelu_pytorch_tanh"):
            return self.op("Gelu", [x], approximate="tanh")
        if name == "quick_gelu":
            return self.op("QuickGelu", [x], domain=MICROSOFT, alpha=1.702)
        if name in ("silu", "swish"):
            return self.op("QuickGelu", [x], domain=MICROSOFT, alpha=1.0)
        if name == "relu":
            return self.op("Relu", [x])
        raise UnsupportedError(f"activation `{name}` is not supported; gelu, gelu_new, quick_gelu, silu and relu are")

    def repeat(self, value: str, like: str) -> str:
        """A value of batch size 1 repeated to that of `like`, which is `batch`."""
        first = self.op("Expand", [self.constant([0], np.int32), self.op("Shape", [like], start=0, end=1)])
        return self.op("Gather", [value, self.shaped(first, ["batch"], np.dtype(np.int32))], axis=0)


@dataclass(frozen=True)
class Output:
    """Where graphs are written, of which target and in which precision they are, and what calibration saw."""

    folder: Path
    kind: type[Graph]
    precision: Precision = Precision.FLOAT32
    narrow: np.dtype = np.dtype(np.float16)  # what multiplies weights in blocks, where a target does that in 16 bits
    weight_bits: int = 8  # of int8
    statistics: Statistics | None = None  # of the same graphs in float32, where calibration ran

    def at(self, precision: Precision | None) -> Output:
        """The same in another precision, which the target must have; in its natural one if None."""
        precision = precision or self.kind.natural
        if precision not in self.kind.precisions:
            known = ", ".join(self.kind.precisions)
            raise UnsupportedError(f"graphs for {self.kind.target} cannot be {precision}; {known} are possible")
        return replace(self, precision=precision)

    def graph(self, name: str, data: Data | None = None, n_positions: int = 0) -> Graph:
        return self.kind.of(name)(self, name, data, n_positions)

    def data(self, name: str) -> Data:
        """A data file for several graphs."""
        return Data(self.folder, name)


class UnsupportedError(ValueError):
    """The checkpoint asks for something that no graph here computes."""


def _value(described: dict[str, Any]) -> onnx.ValueInfoProto:
    types = {dtype.name: code for dtype, code in _TYPES.items()}
    return helper.make_tensor_value_info(described["name"], types[described["dtype"]], described["shape"])


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
