"""The Q-Former of stage 2: `image_features` → `queries` [batch, n_queries, embedding width of the language model].

Where it is conditioned on a question (InstructBLIP, BLIP-2 fine-tuned for VQA), `question_ids` and `question_mask` go in as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig

from blip2_export.checkpoint import Checkpoint, CheckpointError
from blip2_export.graph import MICROSOFT, Graph

_PREFIX = "qformer.encoder.layer."
_END = (1 << 63) - 1
Config = Blip2QFormerConfig | InstructBlipQFormerConfig


@dataclass(frozen=True)
class Shape:
    """`n_positions`: positions of the image features. `width`: what the language model's `inputs_embeds` want."""

    n_queries: int
    n_positions: int
    width: int


def reads_text(cfg: Config) -> bool:
    """Whether a question goes into the Q-Former; InstructBLIP's always reads one."""
    return isinstance(cfg, InstructBlipQFormerConfig) or cfg.use_qformer_text_input


def build(folder: Path, checkpoint: Checkpoint, cfg: Config, shape: Shape) -> Graph:
    """Query tokens through BERT layers with cross-attention, then the language projection."""
    g = Graph(folder, "qformer")
    features = g.input("image_features", "float32", ["batch", shape.n_positions, cfg.encoder_hidden_size])
    run = _with_question if reads_text(cfg) else _queries_alone
    x = run(g, checkpoint, cfg, features, shape.n_queries)
    x = _project(g, checkpoint, cfg, x, shape.n_queries, shape.width)
    g.output(x, "queries", "float32", ["batch", shape.n_queries, shape.width])
    g.save()
    return g


def _queries_alone(g: Graph, checkpoint: Checkpoint, cfg: Config, features: str, n_queries: int) -> str:
    x = g.repeat_batch(_first_attention(checkpoint, cfg, n_queries), features)
    for i in range(cfg.num_hidden_layers):
        name = f"{_PREFIX}{i}."
        if i > 0:
            x = _attention(g, checkpoint, cfg, name + "attention.", x, x, cfg.hidden_size)
        x = _query_layer(g, checkpoint, cfg, i, x, features)
    return x


def _query_layer(g: Graph, checkpoint: Checkpoint, cfg: Config, i: int, x: str, features: str) -> str:
    """What follows the self-attention of query tokens in layer `i`."""
    name = f"{_PREFIX}{i}."
    if i % cfg.cross_attention_frequency == 0:
        x = _attention(g, checkpoint, cfg, name + "crossattention.", x, features, cfg.encoder_hidden_size)
    return _feed_forward(g, checkpoint, cfg, name, x, "_query")


def _with_question(g: Graph, checkpoint: Checkpoint, cfg: Config, features: str, n_queries: int) -> str:
    """Query tokens and the question attend to each other; only query tokens see the image, each kind has its own FFN."""
    ids, mask = (g.input(name, "int64", ["batch", "question"]) for name in ("question_ids", "question_mask"))
    x = _embed(g, checkpoint, cfg, ids, n_queries)
    mask = g.op("Cast", [mask], to=TensorProto.INT32)
    seen = g.op("Pad", [mask, g.constant([0, n_queries, 0, 0]), g.constant(1, np.int32)])
    for i in range(cfg.num_hidden_layers):
        name, last = f"{_PREFIX}{i}.", i == cfg.num_hidden_layers - 1
        asking = _cut(g, x, 0, n_queries) if last else x  # nobody reads the question's last states
        x = _attention(g, checkpoint, cfg, name + "attention.", asking, x, cfg.hidden_size, seen)
        queries = _query_layer(g, checkpoint, cfg, i, x if last else _cut(g, x, 0, n_queries), features)
        if last:
            return queries
        text = _feed_forward(g, checkpoint, cfg, name, _cut(g, x, n_queries, _END), "")
        x = g.op("Concat", [queries, text], axis=1)
    raise CheckpointError(f"{checkpoint.folder}: config.json gives the Q-Former no layers")


def _embed(g: Graph, checkpoint: Checkpoint, cfg: Config, ids: str, n_queries: int) -> str:
    """Query tokens, then words with their positions from 0, all through one layer norm."""
    width, own = cfg.hidden_size, isinstance(cfg, InstructBlipQFormerConfig)
    prefix, norm = (
        ("qformer.embeddings.", "qformer.embeddings.layernorm") if own else ("embeddings.", "qformer.layernorm")
    )
    words = checkpoint.tensor(prefix + "word_embeddings.weight", (cfg.vocab_size, width))
    places = checkpoint.tensor(prefix + "position_embeddings.weight", (cfg.max_position_embeddings, width))
    tokens = checkpoint.tensor("query_tokens", (1, n_queries, width)).astype(np.float32)
    end = g.op("Shape", [ids], start=1, end=2)
    places = g.op("Slice", [g.weight(places), g.constant([0]), end, g.constant([0])])
    text = g.op("Add", [g.rows(words, ids), places])
    x = g.op("Concat", [g.repeat_batch(tokens, ids), text], axis=1)
    scale, shift = (checkpoint.tensor(f"{norm}.{k}", (width,)) for k in ("weight", "bias"))
    return g.layer_norm(x, scale, shift, cfg.layer_norm_eps, width)


def _cut(g: Graph, x: str, start: int, end: int) -> str:
    return str(g.op("Slice", [x, *(g.constant([v]) for v in (start, end, 1))]))


def _attention(
    g: Graph, checkpoint: Checkpoint, cfg: Config, name: str, x: str, source: str, n_source: int, seen: str = ""
) -> str:
    """`x` attends to `source`, to those positions only that `seen` [batch, positions] marks with 1 where it is given."""
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
    masked = ["", seen] if seen else []
    y = g.op("MultiHeadAttention", [*qkv, *masked], domain=MICROSOFT, num_heads=cfg.num_attention_heads)
    return _add_and_norm(g, checkpoint, cfg, name + "output", y, x, width)


def _feed_forward(g: Graph, checkpoint: Checkpoint, cfg: Config, name: str, x: str, kind: str) -> str:
    """`kind`: `_query` for query tokens, nothing for text."""
    inner = cfg.intermediate_size
    weight = checkpoint.tensor(f"{name}intermediate{kind}.dense.weight", (inner, cfg.hidden_size))
    bias = checkpoint.tensor(f"{name}intermediate{kind}.dense.bias", (inner,))
    y = g.activation(g.linear(x, weight, bias), cfg.hidden_act)
    return _add_and_norm(g, checkpoint, cfg, f"{name}output{kind}", y, x, inner)


def _add_and_norm(g: Graph, checkpoint: Checkpoint, cfg: Config, name: str, y: str, x: str, n_in: int) -> str:
    width = cfg.hidden_size
    weight, bias = (
        checkpoint.tensor(name + ".dense.weight", (width, n_in)),
        checkpoint.tensor(name + ".dense.bias", (width,)),
    )
    y = g.op("Add", [g.linear(y, weight, bias), x])
    scale, shift = (checkpoint.tensor(f"{name}.LayerNorm.{k}", (width,)) for k in ("weight", "bias"))
    return g.layer_norm(y, scale, shift, cfg.layer_norm_eps, width)


def _project(g: Graph, checkpoint: Checkpoint, cfg: Config, x: str, n_queries: int, width: int) -> str:
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
