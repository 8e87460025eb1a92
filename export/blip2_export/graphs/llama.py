"""The LLaMA decoder with its KV cache in place, as in Vicuna: new embeddings and the cache → logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from blip2_export.graphs.builder import Graph, Output, UnsupportedError
from blip2_export.graphs.decoding import Cached, Decoder, Head, declare_inputs, finish, own_head, select
from blip2_export.graphs.heads import Heads, pad_groups
from blip2_export.read.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import LlamaConfig

_PREFIX = "language_model.model."
_ROTARY_MULTIPLE = 16  # GroupQueryAttention rotates heads of no other width


class _Builder:
    def __init__(self, graph: Graph, checkpoint: Checkpoint, cfg: LlamaConfig) -> None:
        self.g, self.checkpoint, self.cfg = graph, checkpoint, cfg
        self.width = cfg.hidden_size
        self.heads = Heads(cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, _ROTARY_MULTIPLE)

    def read(self, name: str, *shape: int) -> np.ndarray:
        return self.checkpoint.tensor(_PREFIX + name, shape)

    def linear(self, name: str, x: str, n_in: int, n_out: int) -> str:
        bias = self.read(name + ".bias", n_out) if self.cfg.mlp_bias else None
        return self.g.linear(x, self.read(name + ".weight", n_out, n_in), bias)

    def norm(self, name: str, x: str) -> str:
        return self.g.rms_norm(x, self.read(name + ".weight", self.width), self.cfg.rms_norm_eps)

    def attention(self, name: str, x: str, layer: int, cached: Cached) -> str:
        heads, biased = self.heads, self.cfg.attention_bias
        bias = self._packed_qkv(name, ".bias") if biased else None
        qkv = self.g.linear(x, self._packed_qkv(name, ".weight", self.width), bias)
        y = cached.attend(layer, qkv)
        weight = self.read(name + "o_proj.weight", self.width, heads.n * heads.width)
        bias = self.read(name + "o_proj.bias", self.width) if biased else None
        return self.g.linear(y, heads.columns(weight), bias)

    def _packed_qkv(self, name: str, kind: str, *n_in: int) -> np.ndarray:
        """Rotation pairs the two halves of a head, so in queries and keys each half is padded on its own."""
        heads, parts = self.heads, []
        for p, n in (("q", heads.n), ("k", heads.n_kv), ("v", heads.n_kv)):
            part = self.read(f"{name}{p}_proj{kind}", n * heads.width, *n_in)
            parts.append(heads.rows(part, n) if p == "v" else pad_groups(part, 2 * n, heads.padded // 2))
        return np.concatenate(parts)

    def layer(self, i: int, x: str, cached: Cached) -> str:
        g, cfg, name = self.g, self.cfg, f"layers.{i}."
        inner = cfg.intermediate_size
        y = self.attention(name + "self_attn.", self.norm(name + "input_layernorm", x), i, cached)
        x = g.op("Add", [x, y])
        y = self.norm(name + "post_attention_layernorm", x)
        gate = g.activation(self.linear(name + "mlp.gate_proj", y, self.width, inner), cfg.hidden_act)
        y = g.op("Mul", [gate, self.linear(name + "mlp.up_proj", y, self.width, inner)])
        return str(g.op("Add", [x, self.linear(name + "mlp.down_proj", y, inner, self.width)]))


def build(out: Output, checkpoint: Checkpoint, cfg: LlamaConfig) -> Decoder:
    """Inputs and outputs as those of the OPT decoder. The cache holds `num_key_value_heads` heads."""
    g = out.graph("decoder", n_positions=cfg.max_position_embeddings)
    table = checkpoint.tensor(_PREFIX + "embed_tokens.weight", (cfg.vocab_size, cfg.hidden_size))
    new = declare_inputs(g, table, reads_queries=True)
    b = _Builder(g, checkpoint, cfg)
    rotary = _rotary_tables(cfg, b.heads.padded // 2)
    attend = g.over_cache(new, b.heads, b.heads.width**-0.5, rotary=rotary)
    x, cached = new.embeds, Cached(g, b.heads, attend)
    for i in range(cfg.num_hidden_layers):
        x = b.layer(i, x, cached)
    x = b.norm("norm", select(g, x, cfg.hidden_size))
    head = own_head(checkpoint, _PREFIX + "embed_tokens.weight", "language_model.lm_head.weight", table.shape)
    return finish(g, x, Head(table, head), b.heads, cfg.num_hidden_layers)


def _rotary_tables(cfg: LlamaConfig, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine [max positions, half] of the angles, in the float32 arithmetic of the reference."""
    kind = cfg.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise UnsupportedError(f"rotary embeddings of type `{kind}` are not supported; `default` ones are")
    exponents = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
    frequencies = np.zeros(half, np.float32)
    frequencies[: len(exponents)] = 1 / np.float32(cfg.rope_parameters["rope_theta"]) ** exponents
    angles = np.arange(cfg.max_position_embeddings, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)
