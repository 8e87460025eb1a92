"""Precision and memory: 16-bit arithmetic, frozen weights that are held in 16 bits, activations that are computed twice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from blip2_export.train.own.sources import DataError

PRECISIONS = ("no", "bf16", "fp16")
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Steps without one that could be made, after which the scale can no more be the reason.
_MOST_SKIPPED = 50


class Precision:
    """How a step is computed. Trained weights, their gradients and AdamW's moments are float32 whatever it is.

    `bf16`, `fp16`: matrix products in 16 bits (`torch.autocast`). The loss is scaled with fp16, which has few exponents; a step
    whose gradients overflow all the same is left out, and the scale halved.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in PRECISIONS:
            raise DataError(f"the precision `{name}` is none of {', '.join(PRECISIONS)}")
        self.name, self.device = name, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self._in_a_row = 0

    @property
    def tolerates_overflow(self) -> bool:
        return self.scaler.is_enabled()

    def autocast(self) -> AbstractContextManager[Any]:
        """For the forward pass."""
        return torch.autocast(self.device.type, _TYPES[self.name]) if self.name in _TYPES else nullcontext()

    def step(self, optimiser: torch.optim.Optimizer, norm: float) -> bool:
        """After `scaler.unscale_`: the optimiser's step, unless the norm of the gradients is no number. Whether it was left out."""
        skips = self.tolerates_overflow and not norm < float("inf")
        self._in_a_row = self._in_a_row + 1 if skips else 0
        if self._in_a_row >= _MOST_SKIPPED:
            raise FloatingPointError(f"{_MOST_SKIPPED} steps in a row overflow fp16; take --precision bf16 or no")
        self.scaler.step(optimiser)
        self.scaler.update()
        return skips

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"scaler": self.scaler.state_dict(), "in_a_row": self._in_a_row}

    def take(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's."""
        self._in_a_row = state["in_a_row"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def held(module: nn.Module, precision: str) -> nn.Module:
    """Frozen matrices and tables in the 16-bit type that they are computed in; norms and biases stay as they are.

    They take half the memory. What is written in the end is not these but the base's own.
    """
    kind = _TYPES.get(precision)
    if kind is not None:
        for p in module.parameters():
            if p.ndim >= 2 and not p.requires_grad:
                p.data = p.data.to(kind)
    return module


def lifted(value: Tensor) -> Tensor:
    """In float32, if it has fewer bits: what sums, softmaxes and cross-entropies are taken of."""
    return value.float() if value.itemsize < 4 else value


def check_language(precision: str, family: str) -> None:
    """Refuses what cannot go well before hours are spent on it."""
    if precision == "fp16" and family == "t5":
        raise DataError("Flan-T5 overflows fp16; take --precision bf16, as its authors did, or no")


def recomputed(*modules: nn.Module) -> int:
    """Layers keep their inputs alone and are computed again in the backward pass; how many there are.

    `transformers` does so in training mode only, but it is the frozen language model, in evaluation, whose activations take most.
    """
    layers = [
        layer for module in modules for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)
    ]
    for layer in layers:
        layer.forward = _Twice(layer.forward)  # type: ignore[method-assign]
    return len(layers)


class _Twice:
    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
