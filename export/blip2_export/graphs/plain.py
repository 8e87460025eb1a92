"""Graphs of standard operators: attention of matrix products and Softmax."""

from __future__ import annotations

from blip2_export.graphs.builder import Mask
from blip2_export.graphs.heads import Heads
from blip2_export.graphs.scattered import ScatteredGraph


class PlainGraph(ScatteredGraph):
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
