"""Proof that a frozen model stays as it is while others are trained around it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(module: nn.Module, what: str) -> Iterator[None]:
    """Raises `AssertionError` when any weight of `module` is another one at the end of the block."""
    before = fingerprint(module)
    yield
    if fingerprint(module) != before:
        raise AssertionError(f"the frozen {what} changed during training")


def fingerprint(module: nn.Module) -> str:
    """Hash over all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
