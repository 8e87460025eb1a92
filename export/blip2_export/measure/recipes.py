"""What is worth measuring beside each other, by name: precisions of graphs, their target, and where the engine runs them."""

from __future__ import annotations

from dataclasses import dataclass

from blip2_export import processors
from blip2_export.graphs.cpu import CpuGraph
from blip2_export.graphs.precision import EXACT, Precision, Precisions
from blip2_export.graphs.webgpu import WebGpuGraph

_INT8 = Precision.INT8
_ON_PROCESSOR = ("--provider", "cpu")
_FAITHFUL = ("--provider", "openvino", "--precision", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """`n_bytes`: what a parameter takes in memory, about. `flags`: those of the engine."""

    precisions: Precisions
    n_bytes: float
    target: str = CpuGraph.target
    flags: tuple[str, ...] = _ON_PROCESSOR

    @property
    def is_on_processor(self) -> bool:
        """Whether ONNX Runtime's own kernels run all of it."""
        return self.flags == _ON_PROCESSOR


# OpenVINO has bfloat16 of float32 graphs beside what it reads, and no kernel for attention over a cache: that is left to ONNX
# Runtime, or is made of plain operators.
RECIPES = {
    "exact": Recipe(EXACT, 4),
    "faithful": Recipe(EXACT, 6, flags=(*_FAITHFUL, "--allow-fallback=operators")),
    "faithful-plain": Recipe(EXACT, 6, WebGpuGraph.target, _FAITHFUL),
    "fast": Recipe(Precisions(_INT8, _INT8, _INT8), 1.2),
    "fast-8-bit-blocks": Recipe(Precisions(_INT8, _INT8, Precision.INT8_BLOCKS), 1.2),
    "fast-4-bit-blocks": Recipe(Precisions(_INT8, _INT8, Precision.INT4_BLOCKS), 1),
}


def bundle_of(name: str) -> str:
    """The first recipe that has the same bundle."""
    wanted = RECIPES[name]
    same = (other for other, recipe in RECIPES.items() if recipe.precisions == wanted.precisions)
    return next(other for other in same if RECIPES[other].target == wanted.target)


def weight_bits() -> int:
    """Of int8 weights, as this processor multiplies them fastest: without VNNI two products of 8 bits overflow 16 bits."""
    return 7 if processors.saturates() else 8
