"""Outlier channels as trained language models have them: a few, the same in every layer, tens of times as large as the rest.

They stand behind the layer norms and in what the second product of a feed-forward network reads, of OPT, T5 and LLaMA. The
weights that read them are smaller there, though not by as much.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_N = 4
_NORM, _READ = 40.0, 1 / 8
_INNER, _INNER_READ = 20.0, 1 / 5
_LAYER = r"language_model\..*(layers|block)\.\d+\."
_RULES = tuple(
    (re.compile(_LAYER + pattern), axis, factor)
    for pattern, axis, factor in (
        (r".*(layer_norm|layernorm)\.(weight|bias)$", 0, _NORM),
        (r".*self_attn\.[qkv]_proj\.weight$", 1, _READ),
        (r".*(SelfAttention\.[qkv]|EncDecAttention\.q)\.weight$", 1, _READ),
        (r".*(fc1|wi_0|wi_1|wi|gate_proj|up_proj)\.weight$", 1, _READ),
        (r".*(fc1|wi_1|wi|up_proj)\.(weight|bias)$", 0, _INNER),
        (r".*(fc2|wo|down_proj)\.weight$", 1, _INNER_READ),
    )
)


def plant(folder: Path) -> None:
    """Gives outliers to the language model of a checkpoint. Holds one shard in memory."""
    for file in folder.glob("*.safetensors"):
        save_file({name: _planted(name, tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def _planted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of this name in a model with outliers."""
    for pattern, axis, factor in _RULES:
        if pattern.match(name):
            by = torch.ones(tensor.shape[axis])
            by[channels(tensor.shape[axis])] = factor
            tensor = tensor * by.to(tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1 - axis))
    return tensor


def channels(width: int) -> torch.Tensor:
    """Which are outliers."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(width))[:_N]
