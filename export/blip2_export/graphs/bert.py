"""The Q-Former's layers one by one, for graphs that combine them: over queries, over text, or over both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from blip2_export.graphs.builder import Graph, Mask
from blip2_export.graphs.heads import Heads
from blip2_export.read.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig

    Config = Blip2QFormerConfig | InstructBlipQFormerConfig

_END = (1 << 63) - 1
QUERY, TEXT = "_query", ""  # queries and text have their own feed-forward networks


class Layers:
    """Adds layers to a graph. Every method takes and gives values of [batch, positions, hidden]."""

    def __init__(self, graph: Graph, checkpoint: Checkpoint, cfg: Config) -> None:
        self.g, self.checkpoint, self.cfg = graph, checkpoint, cfg
        self.width, n = cfg.hidden_size, cfg.num_attention_heads
        self.heads, self.cached_heads = (Heads(n, n, self.width // n, multiple) for multiple in (1, 8))
        own = type(cfg).model_type == "instructblip_qformer"
        self.embeddings = "qformer.embeddings." if own else "embeddings."
        self.first_norm = "qformer.embeddings.layernorm" if own else "qformer.layernorm"

    def read(self, name: str, *shape: int) -> np.ndarray:
        return self.checkpoint.tensor(name, shape)

    def linear(self, name: str, x: str, n_in: int, n_out: int) -> str:
        return self.g.linear(x, self.read(name + ".weight", n_out, n_in), self.read(name + ".bias", n_out))

    def norm(self, name: str, x: str) -> str:
        weight, bias = (self.read(f"{name}.{k}", self.width) for k in ("weight", "bias"))
        return self.g.layer_norm(x, weight, bias, self.cfg.layer_norm_eps, self.width)

    def embed_text(self, ids: str) -> str:
        """Word and position embeddings, not yet normalised. Positions of text count from 0, whatever stands before it."""
        g, cfg, name = self.g, self.cfg, self.embeddings
        words = self.read(name + "word_embeddings.weight", cfg.vocab_size, self.width)
        places = self.read(name + "position_embeddings.weight", cfg.max_position_embeddings, self.width)
        g.bound(ids, 1, cfg.max_position_embeddings)
        x = g.rows(words, ids)
        end = g.n_tokens(ids, x)
        first = g.op("Slice", [g.weight(places), g.constant([0]), end, g.constant([0])])
        return g.shaped(g.op("Add", [x, first]), [*g.axes(ids), self.width])

    def query_tokens(self, n_queries: int) -> np.ndarray:
        return self.read("query_tokens", 1, n_queries, self.width).astype(np.float32)

    def joined(self, queries: str, text: str) -> str:
        """Text behind the queries."""
        both = self.g.op("Concat", [queries, text], axis=1)
        return self.g.shaped(both, ["batch", "queries and text", self.width])

    def queries_of(self, both: str, n_queries: int) -> str:
        return self.g.shaped(self._cut(both, 0, n_queries), ["batch", n_queries, self.width])

    def text_of(self, both: str, n_queries: int, ids: str) -> str:
        return self.g.shaped(self._cut(both, n_queries, _END), [*self.g.axes(ids), self.width])

    def _cut(self, x: str, start: int, end: int) -> str:
        return str(self.g.op("Slice", [x, *(self.g.constant([v]) for v in (start, end, 1))]))

    def real(self, mask: str, queries: str = "", n_queries: int = 0) -> Mask:
        """Of int64 `mask` [batch, tokens], 1 where a token is real, behind queries that all are."""
        seen = self.g.int32(mask, 2)
        if queries:
            all_real = self.g.repeat(self.g.constant(np.ones((1, n_queries)), np.int32), queries)
            seen = self.g.op("Concat", [all_real, seen], axis=1)
        return self.g.mask(seen)

    def embedding_norm(self, x: str) -> str:
        """The one layer norm that queries and text share."""
        return self.norm(self.first_norm, x)

    def self_attention(self, i: int, x: str, mask: Mask | None = None, queries: str | None = None) -> str:
        """`queries`: the positions that look, if not all."""
        name = f"qformer.encoder.layer.{i}.attention."
        return self._attention(name, queries or x, x, self.width, mask)

    def cross_attention(self, i: int, x: str, features: str) -> str:
        """Looks at the image features where layer `i` does so at all."""
        if i % self.cfg.cross_attention_frequency:
            return x
        name = f"qformer.encoder.layer.{i}.crossattention."
        return self._attention(name, x, features, self.cfg.encoder_hidden_size, None)

    def _attention(self, name: str, x: str, source: str, n_source: int, mask: Mask | None) -> str:
        query = self.linear(name + "attention.query", x, self.width, self.width)
        kv = [self.linear(f"{name}attention.{part}", source, n_source, self.width) for part in ("key", "value")]
        y = self.g.attention([query, *kv], self.heads, mask)
        return self.add_and_norm(name + "output", y, x, self.width)

    def feed_forward(self, i: int, x: str, branch: str) -> str:
        name, inner = f"qformer.encoder.layer.{i}.", self.cfg.intermediate_size
        y = self.linear(f"{name}intermediate{branch}.dense", x, self.width, inner)
        return self.add_and_norm(f"{name}output{branch}", self.g.activation(y, self.cfg.hidden_act), x, inner)

    def pass_over_feed_forward(self, i: int, branch: str) -> None:
        """Says that nothing depends on this one."""
        name = f"qformer.encoder.layer.{i}."
        parts = (f"intermediate{branch}.dense", f"output{branch}.dense", f"output{branch}.LayerNorm")
        self.checkpoint.pass_over(*(f"{name}{part}.{kind}" for part in parts for kind in ("weight", "bias")))

    def add_and_norm(self, name: str, y: str, x: str, n_in: int) -> str:
        return self.norm(name + ".LayerNorm", self.g.op("Add", [self.linear(name + ".dense", y, n_in, self.width), x]))

    def cached(self, i: int, part: str, x: str) -> str:
        """Keys or values of layer `i` as the cache holds them: [batch, heads, positions, padded head]."""
        g = self.g
        heads, name = self.cached_heads, f"qformer.encoder.layer.{i}.attention.attention.{part}"
        weight, bias = self.read(name + ".weight", self.width, self.width), self.read(name + ".bias", self.width)
        y = g.linear(x, heads.rows(weight, heads.n), heads.rows(bias, heads.n))
        y = g.op("Reshape", [y, g.constant([0, 0, heads.n, heads.padded])])
        return g.op("Transpose", [y], perm=[0, 2, 1, 3])

    def normalise(self, x: str) -> str:
        """float32 of length 1 along the last axis."""
        g, x = self.g, self.g.float32(x)
        length = g.op("ReduceL2", [x, g.constant([-1])], keepdims=1)
        return g.op("Div", [x, g.op("Max", [length, g.constant(1e-12, np.float32)])])
