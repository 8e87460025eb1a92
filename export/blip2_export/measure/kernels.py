"""What a machine can do at most, by ONNX Runtime's own kernels: products in float32 and of 8-bit numbers, and reading memory.

And what each precision makes of it: the exporter's products of one weight with few and with many rows.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from blip2_export import processors
from blip2_export.graphs.builder import Output
from blip2_export.graphs.cpu import CpuGraph
from blip2_export.graphs.precision import Precision

ROWS = (1, 8, 33, 257, 2056)  # a decode step alone and in company, a prefill, ViT-L on one picture and on eight
_N_IN, _N_OUT = 1024, 4096
_READ_SIDE = 8192  # of a matrix of 256 MB, which no cache holds
_SECONDS = 1.0  # of runs for one figure; the fastest counts


@dataclass(frozen=True)
class Limits:
    """Of the machine with some number of threads."""

    float32: float  # operations a second, two to a multiplication
    int8: float
    bytes_read: float  # a second

    def seconds(self, n_operations: float, n_bytes: float, is_int8: bool) -> float:
        """The least that this much takes."""
        return max(n_operations / (self.int8 if is_int8 else self.float32), n_bytes / self.bytes_read)


def limits(n_threads: int) -> Limits:
    many = ROWS[-1]
    runs = {
        "float32": _Run(_product(_drawn((_N_IN, _N_OUT))), _drawn((many, _N_IN)), n_threads),
        "int8": _Run(_product(_bytes((_N_IN, _N_OUT))), _bytes((many, _N_IN)).view(np.uint8), n_threads),
        "memory": _Run(_product(_drawn((_READ_SIDE,) * 2)), _drawn((1, _READ_SIDE)), n_threads),
    }
    seconds, n_operations = _fastest(runs), 2.0 * many * _N_IN * _N_OUT
    return Limits(
        n_operations / seconds["float32"], n_operations / seconds["int8"], 4.0 * _READ_SIDE**2 / seconds["memory"]
    )


def by_precision(n_threads: int) -> dict[str, list[float]]:
    """Seconds of a product with each of `ROWS` rows in every precision that graphs for processors have."""
    found: dict[str, list[float]] = {}
    for rows in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            runs = {name: _Run(str(model), _drawn((rows, _N_IN)), n_threads) for name, model in _products(Path(folder))}
        for name, seconds in _fastest(runs).items():
            found.setdefault(name, []).append(seconds)
    return found


def _products(folder: Path) -> Iterator[tuple[str, Path]]:
    weight = _drawn((_N_OUT, _N_IN))
    for precision in CpuGraph.precisions:
        for n_bits in (7, 8) if precision is Precision.INT8 else (8,):
            name = f"{precision}, {n_bits} bits" if precision is Precision.INT8 else str(precision)
            graph = Output(folder, CpuGraph, precision, n_bits).graph(name)
            y = graph.times(graph.input("x", "float32", ["rows", _N_IN]), weight)
            graph.output(y, "y", "float32", ["rows", _N_OUT])
            graph.save()
            yield name, folder / graph.file_name


def session(model: str | bytes, n_threads: int, profile: str = "") -> ort.InferenceSession:
    """As the engine opens it. With a profile, whose name begins so, weights are not prepacked: it does not tell of such."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    if processors.saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class _Run:
    """A model of one input and one output, ready to run."""

    def __init__(self, model: str | bytes, x: np.ndarray, n_threads: int) -> None:
        self._session = session(model, n_threads)
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input("x", x)
        self._binding.bind_output("y")
        self()

    def __call__(self) -> float:
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - start


def _fastest(runs: dict[str, _Run]) -> dict[str, float]:
    """Of each in turn, so that all meet the same machine; the second run of a turn counts, which finds its weights in the cache."""
    found = dict.fromkeys(runs, math.inf)
    end = time.perf_counter() + _SECONDS * len(runs)
    while time.perf_counter() < end or math.inf in found.values():
        for name, run in runs.items():
            run()
            found[name] = min(found[name], run())
    return found


def _product(weight: np.ndarray) -> bytes:
    """`x · weight`, of float32 or of bytes."""
    narrow = weight.dtype == np.int8
    kind, x, y = (
        ("MatMulInteger", TensorProto.UINT8, TensorProto.INT32)
        if narrow
        else ("MatMul", TensorProto.FLOAT, TensorProto.FLOAT)
    )
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", x, ["rows", len(weight)])],
        [helper.make_tensor_value_info("y", y, ["rows", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def _drawn(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _bytes(shape: tuple[int, ...]) -> np.ndarray:
    """Of 7 bits, which every processor multiplies by its fastest kernel."""
    return np.random.default_rng(0).integers(-63, 64, shape, np.int8)
