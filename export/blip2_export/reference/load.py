"""Loads a checkpoint into `transformers`, in float32, for recording goldens. What its BLIP-2 lacks is added to its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from blip2_export.graphs import vision
from blip2_export.read.checkpoint import Checkpoint
from blip2_export.read.guarded import in_one_sentence

if TYPE_CHECKING:
    from torch import Tensor, nn


def load(checkpoint: Checkpoint, kind: Any, side: int) -> Any:
    """`kind`, a model class of BLIP-2, with the checkpoint's weights, for pictures of `side` × `side`."""
    import torch

    if type(checkpoint) is Checkpoint:
        with in_one_sentence(f"{checkpoint.folder}: the reference cannot load it"):
            model = kind.from_pretrained(checkpoint.folder, dtype=torch.float32)
    else:
        config = kind.config_class(**checkpoint.config)
        with torch.device("meta"):
            parameters = dict(kind(config).named_parameters(remove_duplicate=False))
        state = {name: tensor(checkpoint, name) for name in checkpoint.names() if name in parameters}
        model = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    _adapt(model.vision_model, checkpoint, side)
    return model.eval()


def tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    import torch

    return torch.from_numpy(np.array(checkpoint.tensor(name, shape), np.float32))


def _adapt(eye: nn.Module, checkpoint: Checkpoint, side: int) -> None:
    """The layer norm in front of CLIP's blocks, the last norm's own epsilon, and position embeddings for another size."""
    import torch

    cfg: Any = eye.config
    eye.post_layernorm.eps = vision.post_layernorm_epsilon(cfg)
    if vision.has_pre_layernorm(cfg):
        norm = add_pre_layernorm(eye)
        for kind in ("weight", "bias"):
            getattr(norm, kind).data.copy_(tensor(checkpoint, f"vision_model.pre_layernorm.{kind}"))
    if side != cfg.image_size:
        eye.embeddings.position_embedding = torch.nn.Parameter(_resized(eye.embeddings.position_embedding, side, cfg))


def add_pre_layernorm(eye: nn.Module) -> nn.Module:
    """CLIP's layer norm in front of the blocks, which the reference's image encoder has no place for, as `pre_layernorm` of it."""
    import torch

    torch.nn.init.zeros_(eye.embeddings.patch_embedding.bias)
    norm = torch.nn.LayerNorm(eye.config.hidden_size, eye.config.layer_norm_eps)
    eye.pre_layernorm = norm
    eye.embeddings.register_forward_hook(lambda _module, _inputs, x: norm(x))
    return norm


def _resized(table: Tensor, side: int, cfg: Any) -> Tensor:
    import torch
    from torch.nn import functional as F

    n_in, n_out = cfg.image_size // cfg.patch_size, side // cfg.patch_size
    grid = table.detach()[:, 1:].reshape(1, n_in, n_in, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(n_out, n_out), mode="bicubic", align_corners=vision.has_pre_layernorm(cfg))
    return torch.cat([table.detach()[:, :1], grid.permute(0, 2, 3, 1).reshape(1, n_out * n_out, -1)], 1)
