"""What is worth measuring beside each other, by name: precisions of graphs for the processor, and who runs them there."""

from __future__ import annotations

from dataclasses import dataclass

from blip2_export import processors
from blip2_export.graphs.precision import EXACT, Precision, Precisions

_INT8 = Precision.INT8
_ON_PROCESSOR = ("--provider", "cpu")
_IN_OPENVINO = ("--provider", "openvino", "--precision", "bfloat16", "--allow-fallback=operators")


@dataclass(frozen=True)
class Recipe:
    """`n_bytes`: what a parameter takes in memory, about. `flags`: those of the engine."""

    precisions: Precisions
    n_bytes: float
    flags: tuple[str, ...] = _ON_PROCESSOR


# OpenVINO has bfloat16 of float32 graphs beside what it reads, and no kernel for attention over a cache: that is left to ONNX
# Runtime. (Plain operators instead, which OpenVINO runs whole, took half as long again.)
RECIPES = {
    "exact": Recipe(EXACT, 4),
    "faithful": Recipe(EXACT, 6, flags=_IN_OPENVINO),
    "fast": Recipe(Precisions(_INT8, _INT8, _INT8), 1.2),
    "fast-8-bit-blocks": Recipe(Precisions(_INT8, _INT8, Precision.INT8_BLOCKS), 1.2),
    "fast-4-bit-blocks": Recipe(Precisions(_INT8, _INT8, Precision.INT4_BLOCKS), 1),
}


def bundle_of(name: str) -> str:
    """The first recipe that has the same bundle."""
    return next(other for other, recipe in RECIPES.items() if recipe.precisions == RECIPES[name].precisions)


def weight_bits() -> int:
    """Of int8 weights, as this processor multiplies them fastest: without VNNI two products of 8 bits overflow 16 bits."""
    return 7 if processors.saturates() else 8
