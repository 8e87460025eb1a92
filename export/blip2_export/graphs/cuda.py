"""Graphs that ONNX Runtime's CUDA provider runs whole: every node has a kernel of its type there.

Patches of pixels are cut out by Reshape and Transpose: convolution has no bfloat16 in this operator set. No number that the
processor holds is computed with, so nothing is copied between the nodes.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from blip2_export.graphs.builder import Attend, Mask, New, Output
from blip2_export.graphs.cpu import CpuGraph
from blip2_export.graphs.heads import Heads
from blip2_export.graphs.plain import PlainGraph
from blip2_export.graphs.precision import FLOATS, Precision

# Blocks of 32 are what its kernels take that multiply without unpacking first.
_BLOCKS = {Precision.INT8_BLOCKS: (8, 32), Precision.INT4_BLOCKS: (4, 32)}


class CudaGraph(CpuGraph, PlainGraph):
    target = "cuda"
    blocks = _BLOCKS
    precisions = (*FLOATS, *_BLOCKS)
    natural: ClassVar[Precision] = Precision.FLOAT16
    calibrated = ()  # only weights are whole numbers, so nothing is smoothed for what they meet

    @classmethod
    def activations(cls, out: Output) -> np.dtype:
        return out.narrow if out.precision in _BLOCKS else super().activations(out)

    def patches(self, pixels: str, weights: list[np.ndarray], n: int) -> str:
        width, n_colours, side, _ = weights[0].shape
        ends = self.constant([n * side] * 2)  # a border that makes no patch is left out
        x = self.op("Slice", [pixels, self.constant([0, 0]), ends, self.constant([2, 3])])
        x = self.op("Reshape", [x, self.constant([0, n_colours, n, side, n, side])])
        x = self.op("Transpose", [x], perm=[0, 2, 4, 1, 3, 5])
        x = self.op("Reshape", [x, self.constant([0, n * n, n_colours * side * side])])
        y = self.product(x, self.weight(weights[0].reshape(width, -1)))
        return self.op("Add", [y, self.weight(weights[1])]) if len(weights) > 1 else y

    def cache_positions(self) -> str:
        return PlainGraph.cache_positions(self)

    def attention(
        self, qkv: list[str], heads: Heads, mask: Mask | None = None, scale: float | None = None, by_heads: bool = False
    ) -> str:
        """MultiHeadAttention has no heads that share keys and values."""
        kind = CpuGraph if heads.n == heads.n_kv else PlainGraph
        return kind.attention(self, qkv, heads, mask, scale, by_heads)

    def over_cache(
        self, new: New, heads: Heads, scale: float, bias: str = "", rotary: tuple[np.ndarray, ...] = ()
    ) -> Attend:
        """GroupQueryAttention takes 16 bits only, and the length of what a bias is for from the processor."""
        where = PlainGraph if bias or not self.is_narrow else CpuGraph
        return where.over_cache(self, new, heads, scale, bias, rotary)
