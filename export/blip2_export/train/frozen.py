"""Proof that a frozen model stays as it is while others are trained around it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_ADAPTER = ".lora_"  # what `peft` puts into a frozen model is trained


@contextmanager
def frozen(module: nn.Module, what: str) -> Iterator[None]:
    """Raises `AssertionError` when any weight of `module` is another one at the end of the block."""
    before = fingerprint(module)
    yield
    if fingerprint(module) != before:
        raise AssertionError(f"the frozen {what} changed during training")


def fingerprint(module: nn.Module) -> str:
    """Hash over all weights but those of adapters."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if _ADAPTER not in name:
            bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode() + bits.numpy().tobytes())
    return digest.hexdigest()
