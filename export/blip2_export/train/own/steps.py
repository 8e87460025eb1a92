"""What the steps of a run see, made ahead by other processes.

Each is a pure function of its step, so that a run that goes on sees what an unbroken one would have seen.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

from blip2_export.train.own.sources import DataError

_Seen = TypeVar("_Seen")


def made(make: Callable[[int], _Seen], steps: range, workers: int) -> Iterator[tuple[int, _Seen]]:
    """Each step with what `make` makes of it, in order, in so many processes, or in this one."""
    loader = DataLoader(
        _Steps(make, steps.stop),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        # `make` is a closure; nothing else can carry it over.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_leave_signals,
    )
    for step, seen in zip(steps, loader, strict=True):
        if isinstance(seen, DataError):
            raise seen
        yield step, seen


class _Steps(Dataset[_Seen | DataError]):
    def __init__(self, make: Callable[[int], _Seen], n: int) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, step: int) -> _Seen | DataError:
        try:
            return self.make(step)
        except DataError as error:
            # Raised here, it would come out of another process with all its traces in its text.
            return error


def _leave_signals(_: int) -> None:
    """Signals reach all processes at once; those that make batches end when the one that asks for them does, or tells them to.

    That is by SIGTERM too, if they do not end by themselves: it is the second that ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
