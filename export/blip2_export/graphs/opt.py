"""The OPT decoder with its KV cache in place: new embeddings and the cache → logits. One graph for prefill and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from blip2_export.graphs.builder import Graph, Output
from blip2_export.graphs.decoding import Cached, Decoder, Head, declare_inputs, finish, own_head, select
from blip2_export.graphs.heads import Heads
from blip2_export.read.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import OPTConfig

_PREFIX = "language_model.model.decoder."
_HEAD = "language_model.lm_head.weight"
_POSITION_OFFSET = 2  # OPT's table has two rows in front of position 0
_EPSILON = 1e-5


class _Builder:
    def __init__(self, graph: Graph, checkpoint: Checkpoint, cfg: OPTConfig) -> None:
        self.g, self.checkpoint, self.cfg = graph, checkpoint, cfg
        self.width, n = cfg.hidden_size, cfg.num_attention_heads
        self.heads = Heads(n, n, cfg.hidden_size // n, 8)

    def read(self, name: str, *shape: int) -> np.ndarray:
        return self.checkpoint.tensor(_PREFIX + name, shape)

    def bias(self, name: str, width: int) -> np.ndarray | None:
        return self.read(name + ".bias", width) if self.cfg.enable_bias else None

    def linear(self, name: str, x: str, n_in: int, n_out: int) -> str:
        return self.g.linear(x, self.read(name + ".weight", n_out, n_in), self.bias(name, n_out))

    def norm(self, name: str, x: str) -> str:
        affine = self.cfg.layer_norm_elementwise_affine
        weight, bias = (self.read(f"{name}.{k}", self.width) if affine else None for k in ("weight", "bias"))
        return self.g.layer_norm(x, weight, bias, _EPSILON, self.width)

    def attention(self, name: str, x: str, layer: int, cached: Cached) -> str:
        heads, width = self.heads, self.width
        names = [f"{name}self_attn.{p}_proj" for p in "qkv"]
        weight = heads.packed_qkv([self.read(n + ".weight", width, width) for n in names])
        bias = heads.packed_qkv([self.read(n + ".bias", width) for n in names]) if self.cfg.enable_bias else None
        y = cached.attend(layer, self.g.linear(x, weight, bias))
        weight = self.read(name + "self_attn.out_proj.weight", width, width)
        return self.g.linear(y, heads.columns(weight), self.bias(name + "self_attn.out_proj", width))

    def layer(self, i: int, x: str, cached: Cached) -> str:
        cfg, g, name = self.cfg, self.g, f"layers.{i}."
        before = cfg.do_layer_norm_before
        y = self.norm(name + "self_attn_layer_norm", x) if before else x
        x = g.op("Add", [x, self.attention(name, y, i, cached)])
        x = x if before else self.norm(name + "self_attn_layer_norm", x)
        y = self.norm(name + "final_layer_norm", x) if before else x
        y = g.activation(self.linear(name + "fc1", y, self.width, cfg.ffn_dim), cfg.activation_function)
        x = g.op("Add", [x, self.linear(name + "fc2", y, cfg.ffn_dim, self.width)])
        return x if before else self.norm(name + "final_layer_norm", x)


def build(out: Output, checkpoint: Checkpoint, cfg: OPTConfig) -> Decoder:
    """Inputs and outputs as `models/README.md` lists them."""
    g = out.graph("decoder", n_positions=cfg.max_position_embeddings)
    b = _Builder(g, checkpoint, cfg)
    width, narrow, vocab = cfg.hidden_size, cfg.word_embed_proj_dim, cfg.vocab_size
    table = b.read("embed_tokens.weight", vocab, narrow)
    new = declare_inputs(g, table, reads_queries=True)
    x, cached = new.embeds, Cached(g, b.heads, g.over_cache(new, b.heads, b.heads.width**-0.5))
    if narrow != width:
        x = g.linear(x, b.read("project_in.weight", width, narrow), None)
    learned = b.read("embed_positions.weight", cfg.max_position_embeddings + _POSITION_OFFSET, width)
    x = g.op("Add", [x, g.op("Gather", [g.weight(learned[_POSITION_OFFSET:]), new.positions], axis=0)])
    for i in range(cfg.num_hidden_layers):
        x = b.layer(i, x, cached)
    x = select(g, x, width)
    if cfg.do_layer_norm_before and not cfg._remove_final_layer_norm:
        x = b.norm("final_layer_norm", x)
    if narrow != width:
        x = g.linear(x, b.read("project_out.weight", narrow, width), None)
    head = own_head(checkpoint, _PREFIX + "embed_tokens.weight", _HEAD, table.shape)
    return finish(g, x, Head(table, head), b.heads, cfg.num_hidden_layers)
