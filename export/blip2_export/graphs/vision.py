"""The image encoder: `pixel_values` [batch, 3, S, S] → `image_features` [batch, positions, hidden], after the last layer norm.

EVA's ViT-g and CLIP's ViT-L are one network here. CLIP's has a layer norm in front of the blocks and no bias under the patches;
`vision_config.pre_layernorm` says so. `vision_config.post_layernorm_eps` is there where the last norm has another epsilon.
"""

from __future__ import annotations

import numpy as np
from transformers import Blip2VisionConfig

from blip2_export.graphs.builder import Graph, Output, UnsupportedError
from blip2_export.graphs.heads import Heads
from blip2_export.graphs.positions import resize
from blip2_export.read.checkpoint import Checkpoint

_PREFIX = "vision_model."


def build(out: Output, checkpoint: Checkpoint, cfg: Blip2VisionConfig, side: int | None = None) -> Graph:
    """A pre-layer-norm ViT with class token and learned positions, as `Blip2VisionModel`.

    `side`: pictures of another size than the checkpoint's; the position embeddings are interpolated.
    """
    g = out.graph("vision")
    side, width = side or cfg.image_size, cfg.hidden_size
    positions = position_embeddings(checkpoint, cfg, side)
    x = g.input("pixel_values", "float32", ["batch", 3, side, side])
    x = _embed(g, checkpoint, cfg, x, positions)
    if has_pre_layernorm(cfg):
        x = _norm(g, checkpoint, _PREFIX + "pre_layernorm", x, cfg)
    for i in range(cfg.num_hidden_layers):
        x = _block(g, checkpoint, f"{_PREFIX}encoder.layers.{i}.", x, cfg)
    x = _norm(g, checkpoint, _PREFIX + "post_layernorm", x, cfg, post_layernorm_epsilon(cfg))
    g.output(x, "image_features", "float32", ["batch", positions.shape[1], width])
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


def _embed(g: Graph, checkpoint: Checkpoint, cfg: Blip2VisionConfig, pixels: str, positions: np.ndarray) -> str:
    name, width, patch = _PREFIX + "embeddings.", cfg.hidden_size, cfg.patch_size
    weights = [checkpoint.tensor(name + "patch_embedding.weight", (width, 3, patch, patch))]
    if not has_pre_layernorm(cfg):
        weights.append(checkpoint.tensor(name + "patch_embedding.bias", (width,)))
    token = checkpoint.tensor(name + "class_embedding", (1, 1, width)).astype(np.float32)
    x = g.op("Conv", [pixels, *map(g.weight, weights)], kernel_shape=[patch, patch], strides=[patch, patch])
    x = g.op("Reshape", [x, g.constant([0, width, positions.shape[1] - 1])])
    x = g.op("Transpose", [x], perm=[0, 2, 1])
    x = g.op("Add", [x, g.weight(positions[:, 1:])])
    return g.op("Concat", [g.repeat(g.weight(token + positions[:, :1]), pixels), x], axis=1)


def _block(g: Graph, checkpoint: Checkpoint, name: str, x: str, cfg: Blip2VisionConfig) -> str:
    width, n, inner = cfg.hidden_size, cfg.num_attention_heads, cfg.intermediate_size
    y = _norm(g, checkpoint, name + "layer_norm1", x, cfg)
    weight = checkpoint.tensor(name + "self_attn.qkv.weight", (3 * width, width))
    bias = checkpoint.tensor(name + "self_attn.qkv.bias", (3 * width,)) if cfg.qkv_bias else None
    parts = [slice(k * width, (k + 1) * width) for k in range(3)]
    qkv = [g.linear(y, weight[p], None if bias is None else bias[p]) for p in parts]
    y = g.attention(qkv, Heads(n, n, width // n))
    x = g.op("Add", [x, _linear(g, checkpoint, name + "self_attn.projection", y, width, width)])
    y = _norm(g, checkpoint, name + "layer_norm2", x, cfg)
    y = g.activation(_linear(g, checkpoint, name + "mlp.fc1", y, width, inner), cfg.hidden_act)
    return g.op("Add", [x, _linear(g, checkpoint, name + "mlp.fc2", y, inner, width)])


def _norm(
    g: Graph, checkpoint: Checkpoint, name: str, x: str, cfg: Blip2VisionConfig, epsilon: float | None = None
) -> str:
    width = cfg.hidden_size
    weight, bias = (checkpoint.tensor(f"{name}.{k}", (width,)) for k in ("weight", "bias"))
    return g.layer_norm(x, weight, bias, epsilon or cfg.layer_norm_eps, width)


def _linear(g: Graph, checkpoint: Checkpoint, name: str, x: str, n_in: int, n_out: int) -> str:
    return g.linear(x, checkpoint.tensor(name + ".weight", (n_out, n_in)), checkpoint.tensor(name + ".bias", (n_out,)))
