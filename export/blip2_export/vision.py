"""The image encoder: `pixel_values` [batch, 3, S, S] → `image_features` [batch, positions, hidden], after the last layer norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import Blip2VisionConfig

from blip2_export.checkpoint import Checkpoint
from blip2_export.graph import MICROSOFT, Graph


def build(folder: Path, checkpoint: Checkpoint, cfg: Blip2VisionConfig) -> Graph:
    """A pre-layer-norm ViT with class token and learned positions, as `Blip2VisionModel`."""
    g = Graph(folder, "vision")
    side, patch, width = cfg.image_size, cfg.patch_size, cfg.hidden_size
    n_patches = (side // patch) ** 2
    prefix = "vision_model."
    x = g.input("pixel_values", "float32", ["batch", 3, side, side])
    x = _embed(g, checkpoint, prefix + "embeddings.", x, patch, width, n_patches)
    for i in range(cfg.num_hidden_layers):
        x = _block(g, checkpoint, f"{prefix}encoder.layers.{i}.", x, cfg)
    x = _norm(g, checkpoint, prefix + "post_layernorm", x, cfg)
    g.output(x, "image_features", "float32", ["batch", n_patches + 1, width])
    g.save()
    return g


def _embed(g: Graph, checkpoint: Checkpoint, name: str, x: str, patch: int, width: int, n_patches: int) -> str:
    kernel = checkpoint.tensor(name + "patch_embedding.weight", (width, 3, patch, patch))
    bias = checkpoint.tensor(name + "patch_embedding.bias", (width,))
    positions = checkpoint.tensor(name + "position_embedding", (1, n_patches + 1, width)).astype(np.float32)
    token = checkpoint.tensor(name + "class_embedding", (1, 1, width)).astype(np.float32)
    x = g.op("Conv", [x, g.weight(kernel), g.weight(bias)], kernel_shape=[patch, patch], strides=[patch, patch])
    x = g.op("Reshape", [x, g.constant([0, width, n_patches])])
    x = g.op("Transpose", [x], perm=[0, 2, 1])
    x = g.op("Add", [x, g.weight(positions[:, 1:])])
    return g.op("Concat", [g.repeat_batch(token + positions[:, :1], x), x], axis=1)


def _block(g: Graph, checkpoint: Checkpoint, name: str, x: str, cfg: Blip2VisionConfig) -> str:
    width, heads, inner = cfg.hidden_size, cfg.num_attention_heads, cfg.intermediate_size
    y = _norm(g, checkpoint, name + "layer_norm1", x, cfg)
    weight = checkpoint.tensor(name + "self_attn.qkv.weight", (3 * width, width))
    bias = checkpoint.tensor(name + "self_attn.qkv.bias", (3 * width,)) if cfg.qkv_bias else None
    parts = [slice(k * width, (k + 1) * width) for k in range(3)]
    qkv = [g.linear(y, weight[p], None if bias is None else bias[p]) for p in parts]
    y = g.op("MultiHeadAttention", qkv, domain=MICROSOFT, num_heads=heads)
    x = g.op("Add", [x, _linear(g, checkpoint, name + "self_attn.projection", y, width, width)])
    y = _norm(g, checkpoint, name + "layer_norm2", x, cfg)
    y = g.activation(_linear(g, checkpoint, name + "mlp.fc1", y, width, inner), cfg.hidden_act)
    return g.op("Add", [x, _linear(g, checkpoint, name + "mlp.fc2", y, inner, width)])


def _norm(g: Graph, checkpoint: Checkpoint, name: str, x: str, cfg: Blip2VisionConfig) -> str:
    width = cfg.hidden_size
    weight, bias = (checkpoint.tensor(f"{name}.{k}", (width,)) for k in ("weight", "bias"))
    return g.layer_norm(x, weight, bias, cfg.layer_norm_eps, width)


def _linear(g: Graph, checkpoint: Checkpoint, name: str, x: str, n_in: int, n_out: int) -> str:
    return g.linear(x, checkpoint.tensor(name + ".weight", (n_out, n_in)), checkpoint.tensor(name + ".bias", (n_out,)))
