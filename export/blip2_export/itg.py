"""The Q-Former as a writer: text embeddings and the cache, which begins with the queries' keys and values → logits.

Text positions see all queries and the text up to themselves; with the queries in front of the cache this is plain causal attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import Blip2QFormerConfig

from blip2_export.bert import TEXT, Layers
from blip2_export.checkpoint import Checkpoint
from blip2_export.graph import MICROSOFT, Graph

_HEAD = "cls.predictions."
BIAS = _HEAD + "bias"  # there only with the head of image-grounded text generation


def build(
    folder: Path, checkpoint: Checkpoint, cfg: Blip2QFormerConfig, n_queries: int
) -> tuple[Graph, dict[str, Any]]:
    """The graph, with inputs and outputs of the language models' decoder, and the `language` facts without token ids."""
    g = Graph(folder, "decoder")
    layers = Layers(g, checkpoint, cfg)
    width, vocab, n_text = cfg.hidden_size, cfg.vocab_size, cfg.max_position_embeddings
    x = g.input("inputs_embeds", "float32", ["batch", "sequence", width])
    positions = g.input("position_ids", "int64", ["batch", "sequence"])
    g.input("seqlens_k", "int32", ["batch"])
    g.input("total_sequence_length", "int32", [])
    at = g.input("logits_at", "int64", ["batch", "n_logits"])
    words = layers.read("embeddings.word_embeddings.weight", vocab, width)
    where = g.append(words)
    learned = layers.read("embeddings.position_embeddings.weight", n_text, width)
    x = layers.embedding_norm(g.op("Add", [x, g.op("Gather", [g.weight(learned), positions], axis=0)]))
    for i in range(cfg.num_hidden_layers):
        x = layers.feed_forward(i, _attention(layers, i, x), TEXT)
    x = g.op("GatherND", [x, g.op("Unsqueeze", [at, g.constant([-1])])], batch_dims=1)
    x = g.activation(layers.linear(_HEAD + "transform.dense", x, width, width), cfg.hidden_act)
    x = layers.norm(_HEAD + "transform.LayerNorm", x)
    scores = g.op("FusedMatMul", [x, g.stored(words, where)], domain=MICROSOFT, transB=1)
    g.outputs.insert(0, {"name": "logits", "dtype": "float32", "shape": ["batch", "n_logits", vocab]})
    g.op("Add", [scores, g.weight(layers.read(BIAS, vocab))], ["logits"])
    g.save()
    return g, {
        "hidden": width,
        "vocab_size": vocab,
        "max_positions": n_queries + n_text,
        "embedding": {"file": g.data_name, "offset": where, "dtype": str(words.dtype), "shape": list(words.shape)},
        "kv_cache": {
            "n_layers": cfg.num_hidden_layers,
            "n_heads": layers.heads,
            "head_dim": layers.padded_head,
            "dtype": "float32",
            **{
                f"{side}_{p}": f"{stem}.{{}}.{p}"
                for side, stem in (("past", "past_key_values"), ("present", "present"))
                for p in ("key", "value")
            },
        },
    }


def _attention(layers: Layers, i: int, x: str) -> str:
    g, name = layers.g, f"qformer.encoder.layer.{i}.attention."
    heads, width, more = layers.heads, layers.width, layers.padded_head - layers.head
    query_key_value = [g.linear(x, *_padded_rows(layers, f"{name}attention.{p}")) for p in ("query", "key", "value")]
    cache = ["batch", heads, "capacity", layers.padded_head]
    past = [g.input(f"past_key_values.{i}.{p}", "float32", cache) for p in ("key", "value")]
    present = [f"present.{i}.{p}" for p in ("key", "value")]
    y, *_ = g.op(
        "GroupQueryAttention",
        [*query_key_value, *past, "seqlens_k", "total_sequence_length"],
        [g.fresh("attention"), *present],
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=heads,
        scale=layers.head**-0.5,
    )
    for value in present:
        g.output(value, value, "float32", cache)
    weight = layers.read(name + "output.dense.weight", width, width)
    if more:
        weight = np.pad(weight.reshape(width, heads, -1), ((0, 0), (0, 0), (0, more))).reshape(width, -1)
    y = g.linear(y, weight, layers.read(name + "output.dense.bias", width))
    return layers.norm(name + "output.LayerNorm", g.op("Add", [y, x]))


def _padded_rows(layers: Layers, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Projection to heads, every head padded with zero rows to the width the operator takes."""
    heads, width, more = layers.heads, layers.width, layers.padded_head - layers.head
    weight = layers.read(name + ".weight", width, width).reshape(heads, -1, width)
    bias = layers.read(name + ".bias", width).reshape(heads, -1)
    return np.pad(weight, ((0, 0), (0, more), (0, 0))).reshape(-1, width), np.pad(bias, ((0, 0), (0, more))).reshape(-1)
