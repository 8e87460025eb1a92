"""The Q-Former of stage 2: `image_features` → `queries` [batch, n_queries, embedding width of the language model]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import Blip2QFormerConfig

from blip2_export.checkpoint import Checkpoint, CheckpointError
from blip2_export.graph import MICROSOFT, Graph

_PREFIX = "qformer.encoder.layer."


def build(
    folder: Path, checkpoint: Checkpoint, cfg: Blip2QFormerConfig, n_queries: int, n_positions: int, width: int
) -> Graph:
    """Query tokens through BERT layers with cross-attention, then the language projection.

    `n_positions`: positions of the image features. `width`: what the language model's `inputs_embeds` want.
    """
    g = Graph(folder, "qformer")
    features = g.input("image_features", "float32", ["batch", n_positions, cfg.encoder_hidden_size])
    x = g.repeat_batch(_first_attention(checkpoint, cfg, n_queries), features)
    for i in range(cfg.num_hidden_layers):
        name = f"{_PREFIX}{i}."
        if i > 0:
            x = _attention(g, checkpoint, cfg, name + "attention.", x, x, cfg.hidden_size)
        if i % cfg.cross_attention_frequency == 0:
            x = _attention(g, checkpoint, cfg, name + "crossattention.", x, features, cfg.encoder_hidden_size)
        x = _feed_forward(g, checkpoint, cfg, name, x)
    g.output(_project(g, checkpoint, cfg, x, n_queries, width), "queries", "float32", ["batch", n_queries, width])
    g.save()
    return g


def _attention(
    g: Graph, checkpoint: Checkpoint, cfg: Blip2QFormerConfig, name: str, x: str, source: str, n_source: int
) -> str:
    width = cfg.hidden_size
    widths = {"query": width, "key": n_source, "value": n_source}
    qkv = [
        g.linear(
            x if part == "query" else source,
            checkpoint.tensor(f"{name}attention.{part}.weight", (width, n_in)),
            checkpoint.tensor(f"{name}attention.{part}.bias", (width,)),
        )
        for part, n_in in widths.items()
    ]
    y = g.op("MultiHeadAttention", qkv, domain=MICROSOFT, num_heads=cfg.num_attention_heads)
    return _add_and_norm(g, checkpoint, cfg, name + "output", y, x, width)


def _feed_forward(g: Graph, checkpoint: Checkpoint, cfg: Blip2QFormerConfig, name: str, x: str) -> str:
    inner = cfg.intermediate_size
    weight = checkpoint.tensor(name + "intermediate_query.dense.weight", (inner, cfg.hidden_size))
    bias = checkpoint.tensor(name + "intermediate_query.dense.bias", (inner,))
    y = g.activation(g.linear(x, weight, bias), cfg.hidden_act)
    return _add_and_norm(g, checkpoint, cfg, name + "output_query", y, x, inner)


def _add_and_norm(
    g: Graph, checkpoint: Checkpoint, cfg: Blip2QFormerConfig, name: str, y: str, x: str, n_in: int
) -> str:
    width = cfg.hidden_size
    weight, bias = (
        checkpoint.tensor(name + ".dense.weight", (width, n_in)),
        checkpoint.tensor(name + ".dense.bias", (width,)),
    )
    y = g.op("Add", [g.linear(y, weight, bias), x])
    scale, shift = (checkpoint.tensor(f"{name}.LayerNorm.{k}", (width,)) for k in ("weight", "bias"))
    return g.layer_norm(y, scale, shift, cfg.layer_norm_eps, width)


def _project(g: Graph, checkpoint: Checkpoint, cfg: Blip2QFormerConfig, x: str, n_queries: int, width: int) -> str:
    weight = checkpoint.tensor("language_projection.weight")
    n_out = weight.shape[0]
    x = g.linear(x, weight, checkpoint.tensor("language_projection.bias", (n_out,)))
    if n_out == width:
        return x
    if n_out < width:
        raise CheckpointError(f"language_projection gives {n_out} values, the language model's embeddings have {width}")
    # The reference scatters features in flattened order, so of wider projections the first n_queries × width values count.
    flat = g.op("Reshape", [x, g.constant([0, n_queries * n_out])])
    kept = g.op("Slice", [flat, g.constant([0]), g.constant([n_queries * width]), g.constant([1])])
    return g.op("Reshape", [kept, g.constant([0, n_queries, width])])


def _first_attention(checkpoint: Checkpoint, cfg: Blip2QFormerConfig, n_queries: int) -> np.ndarray:
    """Query tokens after the embedding's layer norm and the first self-attention: they depend on no image."""
    width, heads = cfg.hidden_size, cfg.num_attention_heads

    def read(name: str, *shape: int) -> np.ndarray:
        return checkpoint.tensor(name, shape).astype(np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + cfg.layer_norm_eps)
        return scaled * read(name + ".weight", width) + read(name + ".bias", width)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ read(name + ".weight", width, width).T + read(name + ".bias", width)

    name = _PREFIX + "0.attention."
    x = norm(read("query_tokens", 1, n_queries, width)[0], "qformer.layernorm")
    q, k, v = (
        linear(x, f"{name}attention.{p}").reshape(n_queries, heads, -1).swapaxes(0, 1)
        for p in ("query", "key", "value")
    )
    scores = q @ k.swapaxes(1, 2) / np.sqrt(width // heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True)) @ v
    y = linear(y.swapaxes(0, 1).reshape(n_queries, width), name + "output.dense")
    return norm(y + x, name + "output.LayerNorm").astype(np.float32)[None]
