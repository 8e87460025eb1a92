"""Muon: momentum whose matrix is made orthogonal before it is applied (Jordan et al. 2024), in float32.

The demo's phases need about half the steps of AdamW with it. `torch.optim.Muon` orthogonalises in bfloat16, which processors
without bfloat16 arithmetic emulate: on AVX2 a step takes some twelve times as long, for equal losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of the Newton–Schulz iteration, from the authors
_SMALLEST_SIDE = 64


class Muon(torch.optim.Optimizer):
    """For hidden weight matrices only. The root mean square of an update is about 0.2 × `lr`, as AdamW's (Liu et al. 2025)."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, matrices in by_shape.items():
                updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in matrices]))
                for p, update in zip(matrices, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient."""
        kept = self.state[p].setdefault("momentum", torch.zeros_like(p))
        kept.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(kept, momentum)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of [n, rows, columns], singular values within about 0.7..1.2."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def takes(module: nn.Module) -> set[str]:
    """Names of the parameters that are hidden matrices: of linear layers, no head, no embedding and nothing tied to one."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return {
        f"{name}.weight" if name else "weight"
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear)
        and min(m.weight.shape) >= _SMALLEST_SIDE
        and id(m.weight) not in embeddings
        and not name.endswith("lm_head")
    }
