"""Products with weights of 8 or 4 bits, for processors. A row of the result depends on that row of the input alone.

By rows: weights are whole numbers times a scale of their output channel, activations whole numbers times a scale of their row;
whole numbers are multiplied exactly. Signed weights of 8 bits are what AMX and VNNI take. A processor without either adds up pairs
of products in 16 bits, where 8-bit weights overflow: ONNX Runtime then needs `session.x64quantprecision`, or weights of 7 bits.

By blocks: weights, and inside the operator activations, have a scale for every block of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import ml_dtypes
import numpy as np

from blip2_export.graphs import smoothing
from blip2_export.graphs.builder import MICROSOFT, Graph, UnsupportedError
from blip2_export.graphs.grid import on_grid
from blip2_export.graphs.statistics import Channels

_ZERO_POINT = 128  # activations are unsigned, as the kernels want them
_FLOAT32 = np.dtype(np.float32)
_STEP = 1 / 127
_SMALLEST = 1e-30  # stands in for the largest value of a row of zeros
_SHARES = {
    8: (1.0,),
    4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 1.08),
}  # of the scale of a block that keeps its largest value
_ROWS_AT_ONCE = 2048
_INT8_ACTIVATIONS = 4  # of MatMulNBits: without it weights become float32 at every run


class Smooth(NamedTuple):
    """A value whose channels were divided by `factors`, if there are any."""

    value: str
    factors: np.ndarray | None

    def matching(self, weight: np.ndarray) -> np.ndarray:
        """The weight that gives the same product with it."""
        return weight if self.factors is None else weight.astype(np.float32) * self.factors


class Products(ABC):
    """The products of one graph. What is made of a value is made once, whatever weights it meets."""

    def __init__(self, g: Graph, n_bits: int) -> None:
        self.g, self.n_bits = g, n_bits
        self._smooth: dict[str, Smooth] = {}

    def product(self, x: str, weight: np.ndarray, channels: Channels | None) -> str:
        """`x · weightᵀ`. `channels`: those of `x`, where calibration saw them."""
        if x not in self._smooth:  # by the first weight; the others see the same channels
            factors = None if channels is None else self.factors(channels, weight)
            value = x if factors is None else self.g.op("Mul", [x, self.g.raw(1 / factors)])
            self._smooth[x] = Smooth(value, factors)
        smooth = self._smooth[x]
        return self.multiply(smooth.value, smooth.matching(weight))

    @abstractmethod
    def factors(self, channels: Channels, weight: np.ndarray) -> np.ndarray | None:
        """What channels are divided by before they are rounded."""

    @abstractmethod
    def multiply(self, x: str, weight: np.ndarray) -> str:
        """`x · weightᵀ`."""


class Rows(Products):
    """By rows."""

    def __init__(self, g: Graph, n_bits: int) -> None:
        super().__init__(g, n_bits)
        self._narrow: dict[str, tuple[str, str]] = {}

    def factors(self, channels: Channels, weight: np.ndarray) -> np.ndarray | None:
        rounding = smoothing.Rounding(_most(self.n_bits), weight.shape[1])
        return smoothing.factors(channels, weight, rounding, exact=_exact(weight, self.n_bits) is not None)

    def multiply(self, x: str, weight: np.ndarray) -> str:
        g = self.g
        if x not in self._narrow:
            self._narrow[x] = self._narrowed(x)
        numbers, largest = self._narrow[x]
        weights, scales = signed(weight, self.n_bits)
        inputs = [numbers, g.raw(np.ascontiguousarray(weights.T)), g.constant(_STEP, np.float32), g.raw(scales)]
        inputs.append(g.constant(_ZERO_POINT, np.uint8))
        return str(g.op("Mul", [g.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT), largest]))

    def _narrowed(self, x: str) -> tuple[str, str]:
        """Unsigned numbers, and the largest magnitude of each row."""
        g = self.g
        largest = g.op("ReduceMax", [g.op("Abs", [x]), g.constant([-1])], keepdims=1)
        largest = g.op("Max", [largest, g.constant(_SMALLEST, np.float32)])
        shares = g.op("Div", [x, largest])
        constants = (g.constant(_STEP, np.float32), g.constant(_ZERO_POINT, np.uint8))
        return g.op("QuantizeLinear", [shares, *constants]), largest


class Blocks(Products):
    """By blocks of `size`."""

    def __init__(self, g: Graph, n_bits: int, size: int) -> None:
        super().__init__(g, n_bits)
        self.size = size

    def factors(self, channels: Channels, weight: np.ndarray) -> np.ndarray | None:
        self._check(weight)
        return smoothing.factors(channels, weight, smoothing.Rounding(_most(self.n_bits), self.size))

    def multiply(self, x: str, weight: np.ndarray) -> str:
        g, (n_out, n_in) = self.g, weight.shape
        self._check(weight)
        numbers, scales = blocks(weight, self.n_bits, self.size, g.dtype)
        attributes = {"K": n_in, "N": n_out, "bits": self.n_bits, "block_size": self.size}
        if not g.is_narrow:
            attributes["accuracy_level"] = _INT8_ACTIVATIONS
        return str(g.op("MatMulNBits", [x, g.raw(numbers), g.raw(scales)], domain=MICROSOFT, **attributes))

    def _check(self, weight: np.ndarray) -> None:
        if weight.shape[1] % self.size:
            raise UnsupportedError(
                f"{self.g.name}: rows of {weight.shape[1]} weights do not divide into blocks of {self.size}; choose int8"
            )


def signed(weight: np.ndarray, n_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 [out, in] and float32 scales [out], without loss where training has rounded the weights to 8 bits."""
    found = _exact(weight, n_bits)
    if found is not None:
        return found[0], found[1].astype(np.float32)
    rows = weight.astype(np.float32)
    scales = np.maximum(np.abs(rows).max(1) / np.float32(_most(n_bits)), np.finfo(np.float32).tiny)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


def blocks(weight: np.ndarray, n_bits: int, size: int, dtype: np.dtype = _FLOAT32) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned numbers [out, blocks, bytes], the lower half of a byte first, and scales [out, blocks] of `dtype`."""
    starts = range(0, len(weight), _ROWS_AT_ONCE)
    parts = [_blocks(weight[i : i + _ROWS_AT_ONCE], n_bits, size, dtype) for i in starts]
    numbers, scales = (np.concatenate(part) for part in zip(*parts, strict=True))
    return (numbers if n_bits == 8 else numbers[..., ::2] | numbers[..., 1::2] << 4), scales.astype(dtype)


def _blocks(weight: np.ndarray, n_bits: int, size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The largest of a block becomes the lowest number, which has no opposite, or a little more than that where the sum of
    squared errors is less."""
    middle = 2 ** (n_bits - 1)
    rows = weight.astype(np.float32).reshape(len(weight), -1, size)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(-1)[..., None], -1)
    whole = np.where(largest == 0, np.float32(1), -largest / np.float32(middle))
    least = np.full(whole.shape, np.inf, np.float32)
    numbers, scales = np.zeros(rows.shape, np.uint8), whole
    for share in _SHARES[n_bits]:
        tried = _held(whole * np.float32(share), dtype)
        rounded = np.clip(np.rint(rows / tried), -middle, middle - 1)
        error = np.square(rounded * tried - rows).sum(-1, keepdims=True)
        better = error < least
        least, scales = np.where(better, error, least), np.where(better, tried, scales)
        numbers = np.where(better, (rounded + middle).astype(np.uint8), numbers)
    return numbers, scales[..., 0]


def _held(scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The nearest that `dtype` holds with all its digits."""
    held, least = scales.astype(dtype).astype(np.float32), np.float32(ml_dtypes.finfo(dtype).tiny)
    return np.where(np.abs(held) < least, np.copysign(least, scales), held)


def _exact(weight: np.ndarray, n_bits: int) -> tuple[np.ndarray, np.ndarray] | None:
    return on_grid(weight.astype(np.float32)) if n_bits == 8 else None


def _most(n_bits: int) -> int:
    return 2 ** (n_bits - 1) - 1
