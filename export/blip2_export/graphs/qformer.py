"""The Q-Former of stage 2: `image_features` → `queries` [batch, n_queries, embedding width of the language model].

Where it is conditioned on a question (InstructBLIP, BLIP-2 fine-tuned for VQA), `question_ids` and `question_mask` go in as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from blip2_export.graphs.bert import QUERY, TEXT, Layers
from blip2_export.graphs.builder import Graph, Output
from blip2_export.read.checkpoint import Checkpoint, CheckpointError

if TYPE_CHECKING:
    from blip2_export.graphs.bert import Config


@dataclass(frozen=True)
class Shape:
    """`n_positions`: positions of the image features. `width`: what the language model's `inputs_embeds` want."""

    n_queries: int
    n_positions: int
    width: int


def reads_text(cfg: Config) -> bool:
    """Whether a question goes into the Q-Former; InstructBLIP's always reads one."""
    return type(cfg).model_type == "instructblip_qformer" or cfg.use_qformer_text_input


def build(out: Output, checkpoint: Checkpoint, cfg: Config, shape: Shape) -> Graph:
    """Query tokens through BERT layers with cross-attention, then the language projection."""
    g = out.graph("qformer")
    features = g.take("image_features", ["batch", shape.n_positions, cfg.encoder_hidden_size])
    run = _with_question if reads_text(cfg) else _queries_alone
    x = run(Layers(g, checkpoint, cfg), features, shape.n_queries)
    x = _project(g, checkpoint, x, shape)
    g.give(x, "queries", ["batch", shape.n_queries, shape.width])
    g.save()
    return g


def _queries_alone(layers: Layers, features: str, n_queries: int) -> str:
    g = layers.g
    x = g.repeat(g.weight(_first_attention(layers.checkpoint, layers.cfg, n_queries)), features)
    for i in range(layers.cfg.num_hidden_layers):
        x = layers.self_attention(i, x) if i > 0 else x
        x = layers.feed_forward(i, layers.cross_attention(i, x, features), QUERY)
    return x


def _with_question(layers: Layers, features: str, n_queries: int) -> str:
    """Query tokens and the question attend to each other; only query tokens see the image, each kind has its own FFN."""
    g, n_layers = layers.g, layers.cfg.num_hidden_layers
    ids, mask = (g.input(name, "int64", ["batch", "question"]) for name in ("question_ids", "question_mask"))
    tokens = g.repeat(g.weight(layers.query_tokens(n_queries)), features)
    seen = layers.real(mask, tokens, n_queries)
    x = layers.embedding_norm(layers.joined(tokens, layers.embed_text(ids)))
    for i in range(n_layers):
        last = i == n_layers - 1
        x = layers.self_attention(i, x, seen, layers.queries_of(x, n_queries) if last else None)
        queries = x if last else layers.queries_of(x, n_queries)
        queries = layers.feed_forward(i, layers.cross_attention(i, queries, features), QUERY)
        if last:  # nobody reads the question's last states
            layers.pass_over_feed_forward(i, TEXT)
            return queries
        text = layers.text_of(x, n_queries, ids)
        x = layers.joined(queries, layers.feed_forward(i, text, TEXT))
    raise CheckpointError(f"{layers.checkpoint.folder}: config.json gives the Q-Former no layers")


def _project(g: Graph, checkpoint: Checkpoint, x: str, shape: Shape) -> str:
    n_queries, width = shape.n_queries, shape.width
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


def _first_attention(checkpoint: Checkpoint, cfg: Config, n_queries: int) -> np.ndarray:
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

    name = "qformer.encoder.layer.0.attention."
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
