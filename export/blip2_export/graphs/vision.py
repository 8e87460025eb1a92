"""The image encoder: `pixel_values` [batch, 3, S, S] → `image_features` [batch, positions, hidden], after the last layer norm.

EVA's ViT-g and CLIP's ViT-L are one network here. CLIP's has a layer norm in front of the blocks and no bias under the patches;
`vision_config.pre_layernorm` says so. `vision_config.post_layernorm_eps` is there where the last norm has another epsilon.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from blip2_export.graphs.builder import Graph, Output, UnsupportedError
from blip2_export.graphs.heads import Heads
from blip2_export.graphs.positions import resize
from blip2_export.read.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import Blip2VisionConfig

_PREFIX = "vision_model."


def build(out: Output, checkpoint: Checkpoint, cfg: Blip2VisionConfig, side: int | None = None) -> Graph:
    """A pre-layer-norm ViT with class token and learned positions, as `Blip2VisionModel`.

    `side`: pictures of another size than the checkpoint's; the position embeddings are interpolated.
    """
    g = out.graph("vision")
    tower = _Tower(g, checkpoint, cfg)
    side, width = side or cfg.image_size, cfg.hidden_size
    positions = position_embeddings(checkpoint, cfg, side)
    x = tower.embed(g.take("pixel_values", ["batch", 3, side, side]), positions)
    if has_pre_layernorm(cfg):
        x = tower.norm("pre_layernorm", x)
    for i in range(cfg.num_hidden_layers):
        x = tower.block(f"encoder.layers.{i}.", x)
    x = tower.norm("post_layernorm", x, post_layernorm_epsilon(cfg))
    g.give(x, "image_features", ["batch", positions.shape[1], width])
    g.save()
    return g


def has_pre_layernorm(cfg: Blip2VisionConfig) -> bool:
    return bool(getattr(cfg, "pre_layernorm", False))


def post_layernorm_epsilon(cfg: Blip2VisionConfig) -> float:
    return float(getattr(cfg, "post_layernorm_eps", cfg.layer_norm_eps))


def n_positions(cfg: Blip2VisionConfig, side: int) -> int:
    """Class token and patches of a picture of this size."""
    return (side // cfg.patch_size) ** 2 + 1


def position_embeddings(checkpoint: Checkpoint, cfg: Blip2VisionConfig, side: int) -> np.ndarray:
    """[1, positions, hidden] in float32, for pictures of `side` × `side`."""
    if side != cfg.image_size and side % cfg.patch_size:
        raise UnsupportedError(f"image size {side} is no multiple of the patch size {cfg.patch_size}")
    shape = (1, n_positions(cfg, cfg.image_size), cfg.hidden_size)
    table = checkpoint.tensor(_PREFIX + "embeddings.position_embedding", shape).astype(np.float32)
    if side == cfg.image_size:
        return table
    # The reference's loader of CLIP aligns the corners of the two grids, that of EVA does not.
    return resize(table, side // cfg.patch_size, align_corners=has_pre_layernorm(cfg))


class _Tower:
    """The layers of the image encoder."""

    def __init__(self, graph: Graph, checkpoint: Checkpoint, cfg: Blip2VisionConfig) -> None:
        self.g, self.checkpoint, self.cfg, self.width = graph, checkpoint, cfg, cfg.hidden_size

    def read(self, name: str, *shape: int) -> np.ndarray:
        return self.checkpoint.tensor(_PREFIX + name, shape)

    def embed(self, pixels: str, positions: np.ndarray) -> str:
        g, name, width, patch = self.g, "embeddings.", self.width, self.cfg.patch_size
        weights = [self.read(name + "patch_embedding.weight", width, 3, patch, patch)]
        if not has_pre_layernorm(self.cfg):
            weights.append(self.read(name + "patch_embedding.bias", width))
        token = self.read(name + "class_embedding", 1, 1, width).astype(np.float32)
        x = g.patches(pixels, weights, math.isqrt(positions.shape[1]))
        x = g.op("Add", [x, g.weight(positions[:, 1:])])
        return g.op("Concat", [g.repeat(g.weight(token + positions[:, :1]), pixels), x], axis=1)

    def block(self, name: str, x: str) -> str:
        g, cfg, width, n = self.g, self.cfg, self.width, self.cfg.num_attention_heads
        y = self.norm(name + "layer_norm1", x)
        weight = self.read(name + "self_attn.qkv.weight", 3 * width, width)
        bias = self.read(name + "self_attn.qkv.bias", 3 * width) if cfg.qkv_bias else None
        parts = [slice(k * width, (k + 1) * width) for k in range(3)]
        qkv = [g.linear(y, weight[p], None if bias is None else bias[p]) for p in parts]
        y = g.attention(qkv, Heads(n, n, width // n))
        x = g.op("Add", [x, self.linear(name + "self_attn.projection", y, width, width)])
        y = self.norm(name + "layer_norm2", x)
        y = g.activation(self.linear(name + "mlp.fc1", y, width, cfg.intermediate_size), cfg.hidden_act)
        return g.op("Add", [x, self.linear(name + "mlp.fc2", y, cfg.intermediate_size, width)])

    def norm(self, name: str, x: str, epsilon: float | None = None) -> str:
        weight, bias = (self.read(f"{name}.{k}", self.width) for k in ("weight", "bias"))
        return self.g.layer_norm(x, weight, bias, epsilon or self.cfg.layer_norm_eps, self.width)

    def linear(self, name: str, x: str, n_in: int, n_out: int) -> str:
        return self.g.linear(x, self.read(name + ".weight", n_out, n_in), self.read(name + ".bias", n_out))
