"""Graphs of ONNX Runtime's fused operators, for processors."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from onnx import TensorProto

from blip2_export.graphs import quantized
from blip2_export.graphs.builder import MASKED, MICROSOFT, Attend, Data, Graph, Mask, New, Output
from blip2_export.graphs.heads import Heads
from blip2_export.graphs.precision import Precision
from blip2_export.graphs.statistics import Channels

_BLOCKS = {Precision.INT8_BLOCKS: (8, 128), Precision.INT4_BLOCKS: (4, 32)}


class CpuGraph(Graph):
    target = "cpu"
    blocks: ClassVar[dict[Precision, tuple[int, int]]] = _BLOCKS  # bits, weights of a block
    calibrated = (Precision.INT8, *_BLOCKS)
    precisions = (Precision.FLOAT32, *calibrated)

    def __init__(self, out: Output, name: str, data: Data | None = None, n_positions: int = 0) -> None:
        super().__init__(out, name, data, n_positions)
        blocks = self.blocks.get(self.precision)
        self._products = quantized.Blocks(self, *blocks) if blocks else quantized.Rows(self, out.weight_bits)

    def narrow_product(self, x: str, weight: np.ndarray, channels: Channels | None) -> str:
        return self._products.product(x, weight, channels)

    def narrowing(self) -> dict[str, int]:
        match self._products:
            case quantized.Blocks(size=size):
                return {"block_size": size}
            case quantized.Rows(n_bits=n_bits) if self.precision is Precision.INT8:
                return {"weight_bits": n_bits}
        return {}

    def product(self, x: str, weight: str) -> str:
        return self.op("FusedMatMul", [x, weight], domain=MICROSOFT, transB=1)

    def rows(self, table: np.ndarray, ids: str) -> str:
        """Rows of another type are lifted after they are picked."""
        table = self.fitted(table)
        return self.lifted(self.op("Gather", [self.raw(table), ids], axis=0), table)

    def n_tokens(self, ids: str, rows: str) -> str:
        return self.op("Shape", [ids], start=1, end=2)

    def mask(self, real: str) -> Mask:
        return Mask(padding=real)

    def mask_behind(self, lengths: str, like: str, axis: int, bias: str = "") -> Mask:
        return Mask(lengths, bias)

    def attention(
        self, qkv: list[str], heads: Heads, mask: Mask | None = None, scale: float | None = None, by_heads: bool = False
    ) -> str:
        attributes: dict[str, Any] = {"num_heads": heads.n}
        if scale is not None:
            attributes["scale"] = scale
        if mask is None:
            return self.op("MultiHeadAttention", qkv, domain=MICROSOFT, **attributes)
        inputs = [*qkv, "", mask.padding, *([mask.bias] if mask.bias else [])]
        return self.op("MultiHeadAttention", inputs, domain=MICROSOFT, mask_filter_value=MASKED, **attributes)

    def cache_positions(self) -> str:
        end = self.op("Cast", ["total_sequence_length"], to=TensorProto.INT64)
        return self.count(self.op("Unsqueeze", [end, self.constant([0])]))

    def over_cache(
        self, new: New, heads: Heads, scale: float, bias: str = "", rotary: tuple[np.ndarray, ...] = ()
    ) -> Attend:
        more, attributes = [], {"num_heads": heads.n, "kv_num_heads": heads.n_kv, "scale": float(scale)}
        if rotary:
            more, attributes["do_rotary"] = (
                [*(self.raw(self.fitted(table)) for table in rotary), self.to_slots(new.positions)],
                1,
            )
        if bias:
            more = ["", "", "", self.to_slots(bias)]

        def attend(qkv: str, past: list[str], present: list[str]) -> str:
            inputs = [self.to_slots(qkv), "", "", *past, "seqlens_k", "total_sequence_length", *more]
            outputs = [self.fresh("attention"), *present]
            y, *_ = self.op("GroupQueryAttention", inputs, outputs, domain=MICROSOFT, **attributes)
            return self.to_rows(y)

        return attend
