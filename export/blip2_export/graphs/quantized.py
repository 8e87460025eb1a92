"""Products with weights of 8 or 4 bits, for processors. A row of the result depends on that row of the input alone.

`by_rows`: weights are whole numbers times a scale of their output channel, activations whole numbers times a scale of their row;
whole numbers are multiplied exactly. Signed weights of 8 bits are what AMX and VNNI take. A processor without either adds up pairs
of products in 16 bits, where 8-bit weights overflow: ONNX Runtime then needs `session.x64quantprecision`, or weights of 7 bits.

`by_blocks`: weights, and inside the operator activations, have a scale for every block of a row.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from blip2_export.graphs.builder import MICROSOFT, Graph, UnsupportedError
from blip2_export.graphs.grid import on_grid

_ZERO_POINT = 128  # activations are unsigned, as the kernels want them
_STEP = 1 / 127
_SMALLEST = 1e-30  # stands in for the largest value of a row of zeros
_INT8_ACTIVATIONS = 4  # of MatMulNBits: without it weights become float32 at every run


def by_rows(g: Graph, x: str, weight: np.ndarray, n_bits: int) -> str:
    """`x · weightᵀ`."""
    numbers, largest = _narrowed(g, x)
    weights, scales = signed(weight, n_bits)
    inputs = [numbers, g.raw(np.ascontiguousarray(weights.T)), g.constant(_STEP, np.float32), g.raw(scales)]
    inputs.append(g.constant(_ZERO_POINT, np.uint8))
    return str(g.op("Mul", [g.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT), largest]))


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
    most = 2 ** (n_bits - 1) - 1
    found = on_grid(weight.astype(np.float32)) if n_bits == 8 else None
    if found is not None:
        return found[0], found[1].astype(np.float32)
    rows = weight.astype(np.float32)
    scales = np.maximum(np.abs(rows).max(1) / np.float32(most), np.finfo(np.float32).tiny)
    return np.rint(rows / scales[:, None]).astype(np.int8), scales


def blocks(weight: np.ndarray, n_bits: int, size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned numbers [out, blocks, bytes], the lower half of a byte first, and scales [out, blocks] of `dtype`."""
    most = 2 ** (n_bits - 1) - 1
    rows = weight.astype(np.float32).reshape(len(weight), -1, size)
    scales = np.maximum(np.abs(rows).max(-1) / np.float32(most), ml_dtypes.finfo(dtype).tiny).astype(dtype)
    numbers = np.rint(rows / scales[..., None].astype(np.float32)).clip(-most, most)
    numbers = (numbers + most + 1).astype(np.uint8)
    return (numbers if n_bits == 8 else numbers[..., ::2] | numbers[..., 1::2] << 4), scales


def _narrowed(g: Graph, x: str) -> tuple[str, str]:
    """uint8 numbers of `x`, and the largest magnitude of each row. Shared by all products of one value."""
    if x not in g.narrowed:
        largest = g.op("ReduceMax", [g.op("Abs", [x]), g.constant([-1])], keepdims=1)
        largest = g.op("Max", [largest, g.constant(_SMALLEST, np.float32)])
        parts = [g.op("Div", [x, largest]), g.constant(_STEP, np.float32), g.constant(_ZERO_POINT, np.uint8)]
        g.narrowed[x] = g.op("QuantizeLinear", parts), largest
    return g.narrowed[x]
