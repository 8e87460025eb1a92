"""Checkpoints of many shapes and what is converted from them, each made once, when a test first asks for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip2_export.bundle import Choices, convert
from blip2_export.graphs.precision import EXACT


def converted(
    places: pytest.TempPathFactory, write: Callable[[Path, str], object], opened: Callable[[Path], Any]
) -> Callable[..., tuple[Path, Any]]:
    """For a shape and a target, `cpu` unless it is named: the checkpoint that `write` leaves, and its bundle as `opened`."""

    @functools.cache
    def written(shape: str) -> Path:
        folder = places.mktemp(shape) / "c"
        write(folder, shape)
        return folder

    @functools.cache
    def made(shape: str, target: str) -> tuple[Path, Any]:
        checkpoint = written(shape)
        bundle = checkpoint.with_name(target)
        convert(checkpoint, bundle, Choices(shape, golden=False, target=target, precisions=EXACT))
        return checkpoint, opened(bundle)

    return lambda shape, target="cpu": made(shape, target)
