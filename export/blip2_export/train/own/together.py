"""What several processes share, so that they learn what one with the whole batch would; alone each of these is nothing at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

_apart = False


def size() -> int:
    """How many processes there are."""
    if _apart:
        return 1
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if size() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Each process by itself, as if there were no others."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def agreed(value: Any) -> Any:
    """What the first process has, for all: decisions must not differ by a rounding. Asked within `alone`, too."""
    if not distributed.is_available() or not distributed.is_initialized():
        return value
    found = [value]
    distributed.broadcast_object_list(found, src=0)
    return found[0]


def is_first() -> bool:
    """Whether this is the process that tells and writes."""
    return rank() == 0


def tells() -> bool:
    """The same, asked within `alone`, too."""
    return not distributed.is_available() or not distributed.is_initialized() or distributed.get_rank() == 0


def is_lost(error: RuntimeError) -> bool:
    """Whether another process is gone, which each backend says in its own words."""
    return size() > 1 and any(word in str(error) for word in ("gloo", "NCCL", "Connection", "connection"))


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order; gradients flow back to whoever made a row."""
    return _Gathered.apply(rows) if size() > 1 else rows


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.n_rows = len(rows)
        found = [torch.empty_like(rows) for _ in range(size())]
        distributed.all_gather(found, rows.contiguous())
        return torch.cat(found)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """What every process' loss says of this one's rows."""
        whole = gradients[0].contiguous().clone()
        distributed.all_reduce(whole)
        first = rank() * context.n_rows
        return whole[first : first + context.n_rows]


def mean(value: Tensor) -> Tensor:
    """Over processes, without gradients."""
    value = value.detach().clone().float()
    if size() == 1:
        return value
    # NCCL knows GPUs only, and some of what is agreed on was counted elsewhere.
    moved = value.cuda() if distributed.get_backend() == "nccl" else value
    distributed.all_reduce(moved)
    return (moved / size()).to(value.device)


def any_(value: bool) -> bool:
    """Whether it holds in one of them."""
    return bool(mean(torch.tensor(float(value))) > 0) if size() > 1 else value
