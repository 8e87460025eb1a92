"""Attention over a cache that `ScatterElements` writes in place, for targets or types without an operator that does both."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from blip2_export.graphs.builder import MICROSOFT, Attend, Graph, Mask, New
from blip2_export.graphs.heads import Heads


class ScatteredGraph(Graph):
    """Looks at the whole capacity: positions that are not written yet are masked."""

    def cache_positions(self) -> str:
        return self.count(self.op("Shape", ["past_key_values.0.key"], start=2, end=3))

    def over_cache(
        self, new: New, heads: Heads, scale: float, bias: str = "", rotary: tuple[np.ndarray, ...] = ()
    ) -> Attend:
        places = self.op("Unsqueeze", [self._places(new), self.constant([1, 3])])
        seen = self.op("LessOrEqual", [self.cache_positions(), self._float(places)])
        mask = Mask(bias=self._joined(self._hidden_unless(seen), self.to_slots(bias) if bias else ""))
        places = self.op("Add", [places, self.constant(np.zeros((1, heads.n_kv, 1, heads.padded)), np.int32)])
        widths = self.constant([n * heads.padded for n in (heads.n, heads.n_kv, heads.n_kv)])
        turns = [self.raw(self.fitted(table)) for table in rotary]

        def attend(qkv: str, past: list[str], present: list[str]) -> str:
            q, k, v = self.op("Split", [qkv, widths], 3, axis=-1)
            if turns:
                q, k = (self.op("RotaryEmbedding", [x, new.positions, *turns], domain=MICROSOFT) for x in (q, k))
            for x, old, whole in zip((k, v), past, present, strict=True):
                x = self._by_heads(self.to_slots(x), heads)
                self.op("ScatterElements", [old, places, x], [whole], axis=2)  # in place where both are one buffer
            return self.to_rows(self.attention([self.to_slots(q), *present], heads, mask, scale, by_heads=True))

        return attend

    def _places(self, new: New) -> str:
        """int32 [slots, new positions]: where in the cache they go; the first places of a slot without a row."""
        row_places = self.to_slots(self.op("Add", [self.int32(new.positions), self.constant(new.offset, np.int32)]))
        first = self.op("Cast", [self.count(self.op("Shape", [new.embeds], start=1, end=2))], to=TensorProto.INT32)
        idle = self.op("Equal", ["seqlens_k", self.constant(0, np.int32)])
        return self.op("Where", [self.op("Unsqueeze", [idle, self.constant([1])]), first, row_places])

    def _by_heads(self, x: str, heads: Heads) -> str:
        x = self.op("Reshape", [x, self.constant([0, 0, heads.n_kv, heads.padded])])
        return self.op("Transpose", [x], perm=[0, 2, 1, 3])

    def _hidden_unless(self, seen: str) -> str:
        return self.op("Where", [seen, *(self.number([v]) for v in (0, self.masked))])

    def _joined(self, mask: str, bias: str) -> str:
        return self.op("Add", [mask, bias]) if bias else mask

    def _float(self, x: str) -> str:
        return self.op("Cast", [x], to=TensorProto.FLOAT)
