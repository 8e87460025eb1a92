"""Checkpoints: written whole or not at all, read, and taken over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2_export.train.own.aside import aside_of
from blip2_export.train.own.sources import DataError


def write(file: Path, state: dict[str, Any]) -> None:
    """What was there before gives way once this is on the disk."""
    aside = aside_of(file)
    try:
        with aside.open("wb") as opened:
            torch.save(state, opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(aside, file)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{file}: it cannot be written ({error}); what was saved before is as it was") from error


def read(file: Path) -> dict[str, Any]:
    """What was written."""
    try:
        kept: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the format has no exception of its own
        raise DataError(f"{file}: it is no checkpoint that can be read ({error}); remove it to begin anew") from error
    return kept


def fill(trained: dict[str, nn.Parameter], kept: dict[str, Tensor], file: Path) -> None:
    """Takes over the weights of a checkpoint."""
    if kept.keys() != trained.keys() or any(kept[name].shape != p.shape for name, p in trained.items()):
        raise DataError(f"{file} belongs to another model; name another --work")
    with torch.no_grad():
        for name, value in kept.items():
            trained[name].copy_(value)
