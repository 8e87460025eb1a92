"""Products with weights of 8 or 4 bits, for processors. A row of the result depends on that row of the input alone.

By rows: weights are whole numbers times a scale of their output channel, activations whole numbers times a scale of their row;
whole numbers are multiplied exactly. Signed weights of 8 bits are what AMX and VNNI take. A processor without either adds up pairs
of products in 16 bits, where 8-bit weights overflow: ONNX Runtime then needs `session.x64quantprecision`, or weights of 7 bits.

By blocks: weights, and inside the operator activations, have a scale for every block of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from blip2_export.graphs import smoothing
from blip2_export.graphs.builder import MICROSOFT, Graph, UnsupportedError
from blip2_export.graphs.grid import on_grid
from blip2_export.graphs.statistics import Channels

_ZERO_POINT = 128  # activations are unsigned, as the kernels want them
_STEP = 1 / 127
_SMALLEST = 1e-30  # stands in for the largest value of a row of zeros
_INT8_ACTIVATIONS = 4  # of MatMulNBits: without it weights become float32 at every run


class Narrow(NamedTuple):
    """A value in 8 bits: unsigned numbers, the largest magnitude of each row, and what its channels were divided by before."""

    numbers: str
    largest: str
    factors: np.ndarray | None


class Rows:
    """The products by rows of one graph. What several of them read is rounded once."""

    def __init__(self, g: Graph, n_bits: int) -> None:
        self._g, self.n_bits = g, n_bits
        self._narrowed: dict[str, Narrow] = {}

    def product(self, x: str, weight: np.ndarray, channels: Channels | None) -> str:
        """`x · weightᵀ`. `channels`: those of `x`, where calibration saw them."""
        g = self._g
        if x not in self._narrowed:
            self._narrowed[x] = self._narrow(x, self._factors(weight, channels))
        numbers, largest, factors = self._narrowed[x]
        weights, scales = signed(weight if factors is None else weight.astype(np.float32) * factors, self.n_bits)
        inputs = [numbers, g.raw(np.ascontiguousarray(weights.T)), g.constant(_STEP, np.float32), g.raw(scales)]
        inputs.append(g.constant(_ZERO_POINT, np.uint8))
        return str(g.op("Mul", [g.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT), largest]))

    def _factors(self, weight: np.ndarray, channels: Channels | None) -> np.ndarray | None:
        """By the first weight that a value meets; the others see the same channels."""
        if channels is None:
            return None
        return smoothing.factors(channels, weight, _most(self.n_bits), exact=_exact(weight, self.n_bits) is not None)

    def _narrow(self, x: str, factors: np.ndarray | None) -> Narrow:
        g = self._g
        if factors is not None:
            x = g.op("Mul", [x, g.raw(1 / factors)])
        largest = g.op("ReduceMax", [g.op("Abs", [x]), g.constant([-1])], keepdims=1)
        largest = g.op("Max", [largest, g.constant(_SMALLEST, np.float32)])
        shares = g.op("Div", [x, largest])
        constants = (g.constant(_STEP, np.float32), g.constant(_ZERO_POINT, np.uint8))
        return Narrow(g.op("QuantizeLinear", [shares, *constants]), largest, factors)


def by_blocks(g: Graph, x: str, weight: np.ndarray, n_bits: int, size: int) -> str:
    """`x · weightᵀ`."""
    n_out, n_in = weight.shape
    if n_in % size:
        raise UnsupportedError(f"rows of {n_in} weights do not divide into blocks of {size}")
    numbers, scales = blocks(weight, n_bits, size, g.dtype)
    attributes = {"K": n_in, "N": n_out, "bits": n_bits, "block_size": size}
    if not g.is_narrow:
        attributes["accuracy_level"] = _INT8_ACTIVATIONS
    return str(g.op("MatMulNBits", [x, g.raw(numbers), g.raw(scales)], domain=MICROSOFT, **attributes))


def signed(weight: np.ndarray, n_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 [out, in] and float32 scales [out], without loss where training has rounded the weights to 8 bits."""
    found = _exact(weight, n_bits)
    if found is not None:
        return found[0], found[1].astype(np.float32)
    rows = weight.astype(np.float32)
    scales = np.maximum(np.abs(rows).max(1) / np.float32(_most(n_bits)), np.finfo(np.float32).tiny)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


def blocks(weight: np.ndarray, n_bits: int, size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned numbers [out, blocks, bytes], the lower half of a byte first, and scales [out, blocks] of `dtype`."""
    most = 2 ** (n_bits - 1) - 1
    rows = weight.astype(np.float32).reshape(len(weight), -1, size)
    scales = np.maximum(np.abs(rows).max(-1) / np.float32(most), ml_dtypes.finfo(dtype).tiny).astype(dtype)
    numbers = np.rint(rows / scales[..., None].astype(np.float32)).clip(-most, most)
    numbers = (numbers + most + 1).astype(np.uint8)
    return (numbers if n_bits == 8 else numbers[..., ::2] | numbers[..., 1::2] << 4), scales


def _exact(weight: np.ndarray, n_bits: int) -> tuple[np.ndarray, np.ndarray] | None:
    return on_grid(weight.astype(np.float32)) if n_bits == 8 else None


def _most(n_bits: int) -> int:
    return 2 ** (n_bits - 1) - 1
