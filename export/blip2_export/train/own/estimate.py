"""What a run will take, said before its first step: memory and disk by counting, time by rehearsing a step that changes nothing."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip2_export.train.own import together
from blip2_export.train.own.sources import DataError

_ADAM = 2  # moments of each parameter that is trained
_FILES = 2 + 1 / 3  # the last checkpoint, a new one beside it until it is whole, and the weights alone of the best
_ENOUGH = 10.0  # seconds; what takes longer is rehearsed once
_GIB = 1 << 30


@dataclass(frozen=True)
class Estimate:
    """Bytes, without activations. `folder`: of the model that is written at the end."""

    frozen: int
    trained: int
    learning: int
    checkpoint: int
    folder: int

    @property
    def memory(self) -> int:
        """Resident at least."""
        return self.frozen + self.trained + self.learning

    def __str__(self) -> str:
        sizes = {"frozen": self.frozen, "trained": self.trained, "gradients and AdamW": self.learning}
        parts = " + ".join(f"{_gib(size)} {name}" for name, size in sizes.items())
        whole, checkpoint = _gib(self.memory), _gib(self.checkpoint)
        return f"memory at least {whole} GiB ({parts}), activations on top; a checkpoint has {checkpoint} GiB"


def of(trained: nn.Module, *frozen: nn.Module) -> Estimate:
    """For a module that is trained, as far as it wants gradients, beside others that are not."""
    size, learnt = 0, 0
    for p in trained.parameters():
        size += p.numel() * p.element_size()
        learnt += p.numel() * 4 if p.requires_grad else 0
    still = sum(p.numel() * p.element_size() for module in frozen for p in module.parameters())
    return Estimate(still, size, learnt * (1 + _ADAM), learnt * (1 + _ADAM), still + size)


def check_disk(work: Path, name: str, told: Estimate, out: Path | None) -> None:
    """Refuses where checkpoints, and the folder that is written at the end, will not fit."""
    work.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in work.glob(f"{name}*.pt"))
    needed = {work: max(told.checkpoint, int(_FILES * told.checkpoint) - there)}
    if out is not None:
        place = next(path for path in out.absolute().parents if path.exists())
        same = place.stat().st_dev == work.stat().st_dev
        needed |= {work: needed[work] + told.folder} if same else {place: told.folder}
    for place, size in needed.items():
        free = shutil.disk_usage(place).free
        if free < size:
            raise DataError(f"{place}: {_gib(free)} GiB are free, checkpoints and models will take {_gib(size)} GiB")


@dataclass(frozen=True)
class Rehearsal:
    """Seconds of a step, and the most bytes that were in use."""

    step: float
    peak: int


def rehearse(make: Callable[[], list[Any]], compute: Callable[[Any], None], workers: int) -> Rehearsal:
    """`make`: the parts of a step, in so many `workers`; `compute`: forward and backward of one.

    What is done first is slower than ever after, so it is done again, unless that takes long.
    """
    try:
        making, parts = _timed(make)
        took, _ = _timed(lambda: compute(parts[0]))
        # Whoever computes once more, and alone, would wait for the others.
        if together.agreed(took) < _ENOUGH:
            took, _ = _timed(lambda: compute(parts[0]))
    except torch.OutOfMemoryError as error:
        raise DataError(
            "a part of a step does not fit into memory; raise --accumulate, or lower --batch-size"
        ) from error
    computing = took * len(parts)
    return Rehearsal(max(computing, making / workers) if workers else computing + making, _peak())


def _timed(what: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    made = what()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began, made


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"
