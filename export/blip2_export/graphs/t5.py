"""Flan-T5 as two graphs.

`encoder`: query tokens and prompt embeddings → keys and values of every cross-attention, computed once a prompt.
`decoder`: new embeddings, the cache in place and those keys and values → logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

from blip2_export.graphs.builder import Graph, Output, UnsupportedError
from blip2_export.graphs.decoding import Cached, Decoder, Head, declare_inputs, embed, finish, own_head, select
from blip2_export.graphs.heads import Heads
from blip2_export.graphs.precision import Precision
from blip2_export.read.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import T5Config

_PREFIX = "language_model."
_TABLE = _PREFIX + "decoder.embed_tokens.weight"
_PARTS = {"k": "key", "v": "value"}
MAX_POSITIONS = 2048  # what a model without a position table is trusted with


@dataclass(frozen=True)
class EncoderDecoder:
    """Both graphs with what `bundle.json` says of them."""

    encoder: Graph
    decoder: Decoder
    cross_attention: dict[str, Any]


class _Stack:
    """The encoder's or the decoder's layers."""

    def __init__(self, graph: Graph, checkpoint: Checkpoint, cfg: T5Config, side: str) -> None:
        self.g, self.checkpoint, self.cfg, self.side = graph, checkpoint, cfg, f"{_PREFIX}{side}."
        self.heads = Heads(cfg.num_heads, cfg.num_heads, cfg.d_kv, 8)

    def read(self, name: str, *shape: int) -> np.ndarray:
        return self.checkpoint.tensor(self.side + name, shape)

    def linear(self, name: str, x: str, n_in: int, n_out: int) -> str:
        return self.g.linear(x, self.read(name + ".weight", n_out, n_in), None)

    def norm(self, name: str, x: str) -> str:
        return self.g.rms_norm(x, self.read(name + ".weight", self.cfg.d_model), self.cfg.layer_norm_epsilon)

    def to_heads(self, name: str, x: str) -> str:
        weight = self.read(name + ".weight", self.heads.n * self.heads.width, self.cfg.d_model)
        return self.g.linear(x, self.heads.rows(weight, self.heads.n), None)

    def packed_qkv(self, name: str, x: str) -> str:
        heads, width = self.heads, self.heads.n * self.heads.width
        parts = [self.read(f"{name}{p}.weight", width, self.cfg.d_model) for p in "qkv"]
        return self.g.linear(x, heads.packed_qkv(parts), None)

    def from_heads(self, name: str, x: str) -> str:
        weight = self.read(name + ".weight", self.cfg.d_model, self.heads.n * self.heads.width)
        return self.g.linear(x, self.heads.columns(weight), None)

    def feed_forward(self, name: str, x: str) -> str:
        g, cfg, width, inner = self.g, self.cfg, self.cfg.d_model, self.cfg.d_ff
        y, name = self.norm(name + "layer_norm", x), name + "DenseReluDense."
        if cfg.is_gated_act:
            gate = g.activation(self.linear(name + "wi_0", y, width, inner), cfg.dense_act_fn)
            y = g.op("Mul", [gate, self.linear(name + "wi_1", y, width, inner)])
        else:
            y = g.activation(self.linear(name + "wi", y, width, inner), cfg.dense_act_fn)
        return str(g.op("Add", [x, self.linear(name + "wo", y, inner, width)]))

    def relative_bias(self, distances: str, bidirectional: bool) -> str:
        """The bias of every distance, attended minus attending position in float32, heads last. Layer 0 holds it for all layers."""
        cfg, most = self.cfg, self.cfg.relative_attention_max_distance
        name = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        learned = self.read(name, cfg.relative_attention_num_buckets, cfg.num_heads)
        first = -most  # beyond, and in the decoder from 0 on, all distances share a bucket
        known = np.arange(first, most + 1 if bidirectional else 1)
        buckets = relative_buckets(known, cfg.relative_attention_num_buckets, most, bidirectional)
        low, high = (self.g.constant(end, np.float32) for end in (known[0], known[-1]))
        rows = self.g.op("Sub", [self.g.op("Clip", [distances, low, high]), low])
        return self.g.rows(learned[buckets], self.g.op("Cast", [rows], to=TensorProto.INT32))


def build(out: Output, checkpoint: Checkpoint, cfg: T5Config) -> EncoderDecoder:
    """Inputs and outputs as `models/README.md` lists them."""
    n_layers, head = cfg.num_decoder_layers, Heads(cfg.num_heads, cfg.num_heads, cfg.d_kv, 8).padded
    if out.precision == Precision.FLOAT16:
        raise UnsupportedError("Flan-T5 overflows float16; bfloat16 is possible (--language bfloat16)")
    out = replace(out, narrow=np.dtype(ml_dtypes.bfloat16))
    data = out.data("language")  # both embed tokens with one table
    encoder, decoder = (out.graph(name, data, MAX_POSITIONS) for name in ("encoder", "decoder"))
    cross = {"n_layers": n_layers, "n_heads": cfg.num_heads, "head_dim": head, "dtype": decoder.dtype.name}
    cross |= {part: f"cross.{{}}.{part}" for part in _PARTS.values()}
    return EncoderDecoder(_encoder(encoder, checkpoint, cfg), _decoder(decoder, checkpoint, cfg), cross)


def _table(checkpoint: Checkpoint, cfg: T5Config) -> np.ndarray:
    if _TABLE not in checkpoint.tied(_PREFIX + "shared.weight"):
        raise UnsupportedError(
            f"`{_TABLE}` is another table than the encoder's `shared.weight`; one for both is supported"
        )
    return checkpoint.tensor(_PREFIX + "shared.weight", (cfg.vocab_size, cfg.d_model))


def _encoder(g: Graph, checkpoint: Checkpoint, cfg: T5Config) -> Graph:
    s = _Stack(g, checkpoint, cfg, "encoder")
    x = embed(g, _table(checkpoint, cfg), "batch", reads_queries=True)
    lengths = g.input("lengths", "int32", ["batch"])
    positions = g.count(g.op("Shape", [x], start=1, end=2))
    distances = g.op("Sub", [positions, g.op("Unsqueeze", [positions, g.constant([1])])])
    bias = g.op("Transpose", [s.relative_bias(distances, bidirectional=True)], perm=[2, 0, 1])
    mask = g.mask_behind(lengths, x, 1, g.op("Unsqueeze", [bias, g.constant([0])]))
    for i in range(cfg.num_layers):
        name = f"block.{i}.layer."
        y = s.norm(name + "0.layer_norm", x)
        qkv = [s.to_heads(f"{name}0.SelfAttention.{p}", y) for p in "qkv"]
        x = g.op("Add", [x, s.from_heads(name + "0.SelfAttention.o", g.attention(qkv, s.heads, mask, 1.0))])
        x = s.feed_forward(name + "1.", x)
    _cross_outputs(g, checkpoint, cfg, s.norm("final_layer_norm", x))
    g.save()
    return g


def _cross_outputs(g: Graph, checkpoint: Checkpoint, cfg: T5Config, x: str) -> None:
    """What the decoder's cross-attentions look at, projected by the decoder's weights."""
    s = _Stack(g, checkpoint, cfg, "decoder")
    n, width = s.heads.n, s.heads.padded
    for i in range(cfg.num_decoder_layers):
        for p, part in _PARTS.items():
            y = s.to_heads(f"block.{i}.layer.1.EncDecAttention.{p}", x)
            y = g.op("Transpose", [g.op("Reshape", [y, g.constant([0, 0, n, width])])], perm=[0, 2, 1, 3])
            g.output(y, f"cross.{i}.{part}", g.dtype.name, ["batch", n, "sequence", width])


def _decoder(g: Graph, checkpoint: Checkpoint, cfg: T5Config) -> Decoder:
    s = _Stack(g, checkpoint, cfg, "decoder")
    table = _table(checkpoint, cfg)
    new = declare_inputs(g, table, reads_queries=False)
    lengths = g.input("encoder_lengths", "int32", ["slots"])
    cached = Cached(g, s.heads, g.over_cache(new, s.heads, 1.0, _cache_bias(s, new.positions)))
    x, read = new.embeds, g.mask_behind(lengths, "cross.0.key", 2)
    for i in range(cfg.num_decoder_layers):
        name = f"block.{i}.layer."
        y = cached.attend(i, s.packed_qkv(name + "0.SelfAttention.", s.norm(name + "0.layer_norm", x)))
        x = g.op("Add", [x, s.from_heads(name + "0.SelfAttention.o", y)])
        q = g.to_slots(s.to_heads(name + "1.EncDecAttention.q", s.norm(name + "1.layer_norm", x)))
        shape = ["slots", s.heads.n, "n_encoder", s.heads.padded]
        kv = [g.input(f"cross.{i}.{part}", g.dtype.name, shape) for part in _PARTS.values()]
        y = g.to_rows(g.attention([q, *kv], s.heads, read, 1.0, by_heads=True))
        x = g.op("Add", [x, s.from_heads(name + "1.EncDecAttention.o", y)])
        x = s.feed_forward(name + "2.", x)
    x = s.norm("final_layer_norm", select(g, x, cfg.d_model))
    if cfg.scale_decoder_outputs:
        x = g.op("Mul", [x, g.number(cfg.d_model**-0.5)])
    head = own_head(checkpoint, _PREFIX + "shared.weight", _PREFIX + "lm_head.weight", table.shape)
    return finish(g, x, Head(table, head), s.heads, cfg.num_decoder_layers)


def _cache_bias(s: _Stack, positions: str) -> str:
    """[rows, heads, new positions, positions of the cache]."""
    g = s.g
    at = g.op("Unsqueeze", [g.op("Cast", [g.int32(positions)], to=TensorProto.FLOAT), g.constant([-1])])
    distances = g.op("Sub", [g.cache_positions(), at])
    return str(g.op("Transpose", [s.relative_bias(distances, bidirectional=False)], perm=[0, 3, 1, 2]))


def relative_buckets(distances: np.ndarray, n_buckets: int, most: int, bidirectional: bool) -> np.ndarray:
    """Bucket of each distance: one a distance when near, then logarithmically wider ones, the last from `most` on.

    In the float32 arithmetic of `T5Attention`, so that distances at the edge of a bucket fall on the same side.
    """
    n = n_buckets // 2 if bidirectional else n_buckets
    exact = n // 2
    if exact < 1 or most <= exact:
        raise UnsupportedError(f"{n_buckets} relative position buckets over {most} positions are not supported")
    away = np.abs(distances) if bidirectional else np.maximum(-distances, 0)
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(most / exact))
    far = np.minimum(exact + (ratio * np.float32(n - exact)).astype(np.int64), n - 1)
    return np.where(away < exact, away, far) + np.where(bidirectional & (distances > 0), n, 0)
