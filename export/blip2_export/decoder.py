"""The OPT decoder with its KV cache in place: new embeddings and the cache → logits. One graph for prefill and steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import OPTConfig

from blip2_export.checkpoint import Checkpoint
from blip2_export.graph import MICROSOFT, Graph

_PREFIX = "language_model.model.decoder."
_POSITION_OFFSET = 2  # OPT's table has two rows in front of position 0
_EPSILON = 1e-5
_HEAD_MULTIPLE = 8  # GroupQueryAttention takes no other head dimensions


@dataclass(frozen=True)
class Decoder:
    """The built graph with what `bundle.json` says of it."""

    graph: Graph
    embedding: dict[str, Any]
    kv_cache: dict[str, Any]


class _Builder:
    def __init__(self, graph: Graph, checkpoint: Checkpoint, cfg: OPTConfig) -> None:
        self.g, self.checkpoint, self.cfg = graph, checkpoint, cfg
        self.width = cfg.hidden_size
        self.head = cfg.hidden_size // cfg.num_attention_heads
        self.padded_head = -(-self.head // _HEAD_MULTIPLE) * _HEAD_MULTIPLE

    def read(self, name: str, *shape: int) -> np.ndarray:
        return self.checkpoint.tensor(_PREFIX + name, shape)

    def linear(self, name: str, x: str, n_in: int, n_out: int, bias: bool) -> str:
        return self.g.linear(
            x, self.read(name + ".weight", n_out, n_in), self.read(name + ".bias", n_out) if bias else None
        )

    def norm(self, name: str, x: str) -> str:
        affine = self.cfg.layer_norm_elementwise_affine
        weight, bias = (self.read(f"{name}.{k}", self.width) if affine else None for k in ("weight", "bias"))
        return self.g.layer_norm(x, weight, bias, _EPSILON, self.width)

    def attention(self, name: str, x: str, layer: int) -> str:
        cfg, g = self.cfg, self.g
        heads, inner = cfg.num_attention_heads, cfg.num_attention_heads * self.padded_head
        q, k, v = (g.linear(x, *self._padded_rows(f"{name}self_attn.{p}_proj")) for p in "qkv")
        cache = ["batch", heads, "capacity", self.padded_head]
        past = [g.input(f"past_key_values.{layer}.{p}", "float32", cache) for p in ("key", "value")]
        present = [f"present.{layer}.{p}" for p in ("key", "value")]
        y, *_ = g.op(
            "GroupQueryAttention",
            [q, k, v, *past, "seqlens_k", "total_sequence_length"],
            [g.fresh("attention"), *present],
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=heads,
            scale=self.head**-0.5,
        )
        for value in present:
            g.output(value, value, "float32", cache)
        weight = self.read(name + "self_attn.out_proj.weight", self.width, self.width)
        if self.padded_head != self.head:
            split = weight.reshape(self.width, heads, self.head)
            weight = np.pad(split, ((0, 0), (0, 0), (0, self.padded_head - self.head))).reshape(self.width, inner)
        bias = self.read(name + "self_attn.out_proj.bias", self.width) if cfg.enable_bias else None
        return g.linear(y, weight, bias)

    def _padded_rows(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Projection to heads, every head padded with zero rows to the width the operator takes."""
        heads, more = self.cfg.num_attention_heads, self.padded_head - self.head
        weight = self.read(name + ".weight", self.width, self.width)
        bias = self.read(name + ".bias", self.width) if self.cfg.enable_bias else None
        if more:
            weight = np.pad(weight.reshape(heads, self.head, self.width), ((0, 0), (0, more), (0, 0))).reshape(
                -1, self.width
            )
            bias = None if bias is None else np.pad(bias.reshape(heads, self.head), ((0, 0), (0, more))).reshape(-1)
        return weight, bias

    def layer(self, i: int, x: str) -> str:
        cfg, g, name = self.cfg, self.g, f"layers.{i}."
        before = cfg.do_layer_norm_before
        y = self.norm(name + "self_attn_layer_norm", x) if before else x
        x = g.op("Add", [x, self.attention(name, y, i)])
        x = x if before else self.norm(name + "self_attn_layer_norm", x)
        y = self.norm(name + "final_layer_norm", x) if before else x
        y = self.linear(name + "fc1", y, self.width, cfg.ffn_dim, cfg.enable_bias)
        y = self.linear(
            name + "fc2", g.activation(y, cfg.activation_function), cfg.ffn_dim, self.width, cfg.enable_bias
        )
        x = g.op("Add", [x, y])
        return x if before else self.norm(name + "final_layer_norm", x)


def build(folder: Path, checkpoint: Checkpoint, cfg: OPTConfig) -> Decoder:
    """Inputs and outputs as `models/README.md` lists them."""
    g = Graph(folder, "decoder")
    b = _Builder(g, checkpoint, cfg)
    width, narrow, vocab = cfg.hidden_size, cfg.word_embed_proj_dim, cfg.vocab_size
    x = g.input("inputs_embeds", "float32", ["batch", "sequence", narrow])
    positions = g.input("position_ids", "int64", ["batch", "sequence"])
    g.input("seqlens_k", "int32", ["batch"])
    g.input("total_sequence_length", "int32", [])
    at = g.input("logits_at", "int64", ["batch", "n_logits"])
    table = b.read("embed_tokens.weight", vocab, narrow)
    embedding = _embedding(g, table)
    if narrow != width:
        x = b.linear("project_in", x, narrow, width, bias=False)
    learned = b.read("embed_positions.weight", cfg.max_position_embeddings + _POSITION_OFFSET, width)
    x = g.op("Add", [x, g.op("Gather", [g.weight(learned[_POSITION_OFFSET:]), positions], axis=0)])
    for i in range(cfg.num_hidden_layers):
        x = b.layer(i, x)
    x = g.op("GatherND", [x, g.op("Unsqueeze", [at, g.constant([-1])])], batch_dims=1)
    if cfg.do_layer_norm_before and not cfg._remove_final_layer_norm:
        x = b.norm("final_layer_norm", x)
    if narrow != width:
        x = b.linear("project_out", x, width, narrow, bias=False)
    logits = _head(g, checkpoint, cfg, x, embedding, table)
    g.outputs.insert(0, {"name": "logits", "dtype": "float32", "shape": ["batch", "n_logits", vocab]})
    g.op("Identity", [logits], ["logits"])
    g.save()
    cache = {
        "n_layers": cfg.num_hidden_layers,
        "n_heads": cfg.num_attention_heads,
        "head_dim": b.padded_head,
        "dtype": "float32",
        **{
            f"{side}_{p}": f"{stem}.{{}}.{p}"
            for side, stem in (("past", "past_key_values"), ("present", "present"))
            for p in ("key", "value")
        },
    }
    return Decoder(g, embedding, cache)


def _embedding(g: Graph, table: np.ndarray) -> dict[str, Any]:
    """Writes the token embeddings first; the engine reads their rows straight from the file."""
    dtype = str(table.dtype)
    return {"file": g.data_name, "offset": g.append(table), "dtype": dtype, "shape": list(table.shape)}


def _head(
    g: Graph, checkpoint: Checkpoint, cfg: OPTConfig, x: str, embedding: dict[str, Any], table: np.ndarray
) -> str:
    name = "language_model.lm_head.weight"
    if cfg.tie_word_embeddings or not checkpoint.has(name):
        weight = g.stored(table, embedding["offset"])
    else:
        weight = g.weight(checkpoint.tensor(name, (cfg.vocab_size, cfg.word_embed_proj_dim)))
    return g.op("FusedMatMul", [x, weight], domain=MICROSOFT, transB=1)
