"""Graphs that ONNX Runtime's WebGPU provider runs whole: every node on the device, weights folded to float32 when it loads.

Attention is made of plain operators: where 32 queries or more meet as many keys, the provider's own are wrong on SwiftShader by
a tenth, and they take no padding mask. Arithmetic on int64 and casts of it would run on the processor, so ids become other numbers
by Gather.
"""

from __future__ import annotations

import numpy as np

from blip2_export.graphs.plain import PlainGraph


class WebGpuGraph(PlainGraph):
    target = "webgpu"

    def rows(self, table: np.ndarray, ids: str) -> str:
        """The table is lifted whole when the graph loads: not every device has 16-bit numbers."""
        return self.op("Gather", [self.stored(table), ids], axis=0)

    def n_tokens(self, ids: str, rows: str) -> str:
        """Even the shape of int64 would be asked on the processor."""
        return self.op("Shape", [rows], start=1, end=2)
