"""Graphs that TensorRT builds engines of: standard operators only, with the range of every size that is not fixed.

What reads and writes texts with a cache runs on CUDA beside it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from blip2_export.graphs.builder import Graph
from blip2_export.graphs.cuda import CudaGraph
from blip2_export.graphs.plain import PlainGraph
from blip2_export.graphs.precision import Precision

_OF_TEXTS = ("encoder", "decoder")
_BEST = {"batch": 1, "question": 16, "sequence": 16}  # what engines are tuned for
_MOST_PICTURES = 16


class TensorRtGraph(PlainGraph):
    target = "tensorrt"
    precisions = CudaGraph.precisions
    natural: ClassVar[Precision] = Precision.FLOAT16

    @classmethod
    def of(cls, name: str) -> type[Graph]:
        return CudaGraph if name in _OF_TEXTS else cls

    def rows(self, table: np.ndarray, ids: str) -> str:
        return self.op("Gather", [self.stored(table), ids], axis=0)

    def n_tokens(self, ids: str, rows: str) -> str:
        return self.op("Shape", [ids], start=1, end=2)

    def activation(self, x: str, name: str) -> str:
        alpha = {"quick_gelu": 1.702, "silu": 1.0, "swish": 1.0}.get(name)
        if alpha is None:
            return super().activation(x, name)
        gate = x if alpha == 1 else self.op("Mul", [x, self.number(alpha)])
        return self.op("Mul", [x, self.op("Sigmoid", [gate])])

    def describe(self) -> dict[str, Any]:
        named = {axis for value in self.inputs for axis in value["shape"] if isinstance(axis, str)}
        most = {"batch": _MOST_PICTURES, **self.bounds}
        return {**super().describe(), "profile": {a: [1, min(_BEST[a], most[a]), most[a]] for a in sorted(named)}}
