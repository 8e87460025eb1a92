"""The precisions that are worth measuring beside each other, by name."""

from __future__ import annotations

from dataclasses import dataclass

from blip2_export.graphs.precision import Precision, Precisions
from blip2_export.measure import machine

_INT8 = Precision.INT8


@dataclass(frozen=True)
class Recipe:
    """`n_bytes`: what a parameter takes in memory, about."""

    precisions: Precisions
    n_bytes: float


RECIPES = {
    "exact": Recipe(Precisions(), 4),
    "fast": Recipe(Precisions(_INT8, _INT8, _INT8), 1.2),
    "fast-8-bit-blocks": Recipe(Precisions(_INT8, _INT8, Precision.INT8_BLOCKS), 1.2),
    "fast-4-bit-blocks": Recipe(Precisions(_INT8, _INT8, Precision.INT4_BLOCKS), 1),
}


def weight_bits() -> int:
    """Of int8 weights, as this processor multiplies them fastest: without VNNI two products of 8 bits overflow 16 bits."""
    has_vnni = any(name in machine.instruction_set().split() for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return 7 if machine.is_x86() and not has_vnni else 8
