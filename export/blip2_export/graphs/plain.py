"""Graphs of standard operators: attention of matrix products and Softmax, over a cache that `ScatterElements` writes in place.

Attention looks at the whole capacity of the cache: positions that are not written yet are masked. Only rotations are an operator of
ONNX Runtime's own.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from blip2_export.graphs.builder import MICROSOFT, Attend, Graph, Mask, New
from blip2_export.graphs.heads import Heads


class PlainGraph(Graph):
    def product(self, x: str, weight: str) -> str:
        return self.op("MatMul", [x, self.op("Transpose", [weight], perm=[1, 0])])

    def mask(self, real: str) -> Mask:
        hidden = self.op("Gather", [self.number([self.masked, 0]), real], axis=0)
        return Mask(bias=self.op("Unsqueeze", [hidden, self.constant([1, 2])]))

    def mask_behind(self, lengths: str, like: str, axis: int, bias: str = "") -> Mask:
        keys = self.count(self.op("Shape", [like], start=axis, end=axis + 1))
        lengths = self.op("Unsqueeze", [self._float(lengths), self.constant([1, 2, 3])])
        return Mask(bias=self._joined(self._hidden_unless(self.op("Less", [keys, lengths])), bias))

    def attention(
        self, qkv: list[str], heads: Heads, mask: Mask | None = None, scale: float | None = None, by_heads: bool = False
    ) -> str:
        q, *kv = qkv
        kv = kv if by_heads else [self._by_heads(x, heads) for x in kv]
        return self._attention(q, kv, heads, mask.bias if mask else "", heads.padded**-0.5 if scale is None else scale)

    def _attention(self, q: str, kv: list[str], heads: Heads, mask: str, scale: float) -> str:
        """Keys and values by heads stay as they are: it is the queries that are turned, which in a step are few."""
        n, n_kv, width = heads.n, heads.n_kv, heads.padded
        if scale != 1:
            q = self.op("Mul", [q, self.number(scale)])
        q = self.op("Reshape", [q, self.constant([0, 0, n_kv, n // n_kv, width])])
        q = self.op("Transpose", [q], perm=[0, 2, 4, 3, 1])
        q = self.op("Reshape", [q, self.constant([0, 0, 0, -1])])
        scores = self.op("Transpose", [self.op("MatMul", [kv[0], q])], perm=[0, 1, 3, 2])
        scores = self.op("Reshape", [scores, self.constant([0, n, -1, 0])])
        if mask:
            scores = self.op("Add", [scores, mask])
        weights = self.op("Softmax", [scores], axis=-1)
        weights = self.op("Reshape", [weights, self.constant([0, n_kv, -1, 0])])
        y = self.op("Reshape", [self.op("MatMul", [weights, kv[1]]), self.constant([0, n, -1, width])])
        y = self.op("Transpose", [y], perm=[0, 2, 1, 3])
        return self.op("Reshape", [y, self.constant([0, 0, n * width])])

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
            y = self.attention([self.to_slots(q), *present], heads, mask, scale, by_heads=True)
            return self.to_rows(self.shaped(y, ["slots", "sequence", heads.n * heads.padded]))

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
