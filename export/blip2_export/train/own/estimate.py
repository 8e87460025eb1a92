"""What a run will take, said before its first step: memory of weights, gradients and optimiser, and what one step takes by measuring it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from blip2_export.train.own.sources import DataError

_ADAM = 2  # moments of each parameter that is trained
_GIB = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """Bytes, without activations."""

    frozen: int
    trained: int
    learning: int
    checkpoint: int

    @property
    def memory(self) -> int:
        """Resident at least."""
        return self.frozen + self.trained + self.learning

    def __str__(self) -> str:
        sizes = {"frozen weights": self.frozen, "trained weights": self.trained, "gradients and AdamW": self.learning}
        parts = " + ".join(f"{size / _GIB:.2f} GiB {name}" for name, size in sizes.items())
        return f"memory at least {self.memory / _GIB:.2f} GiB ({parts}, activations come on top); a checkpoint has {self.checkpoint / _GIB:.2f} GiB"


def of(trained: nn.Module, *frozen: nn.Module) -> Estimate:
    """For a module that is trained, as far as it wants gradients, beside others that are not."""
    size, learnt = 0, 0
    for p in trained.parameters():
        size += p.numel() * p.element_size()
        learnt += p.numel() * 4 if p.requires_grad else 0
    still = sum(p.numel() * p.element_size() for module in frozen for p in module.parameters())
    return Estimate(still, size, learnt * (1 + _ADAM), learnt * (1 + _ADAM))


def check_disk(work: Path, needed: int) -> None:
    """Refuses where two checkpoints, the new one beside the last, do not fit."""
    free = shutil.disk_usage(work).free
    if free < 2 * needed:
        raise DataError(f"{work}: {free / _GIB:.1f} GiB are free, two checkpoints take {2 * needed / _GIB:.1f}")
