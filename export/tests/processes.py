"""Two processes that learn together."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import torch
from torch import multiprocessing

# What takes seconds to import is imported once, in a process that takes no gradient: one that did cannot be forked and take more.
_IMPORTED = ["accelerate", "transformers.models.blip_2.modeling_blip_2", "blip2_export.train.own.stages"]


def two(run: Callable[[int, int, Path, Path], None], folder: Path, work: Path) -> None:
    """`run`, as rank 0 and 1, of a free port and these folders."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(_IMPORTED)
    multiprocessing.start_processes(_alone, (run, port, folder, work), nprocs=2, start_method="forkserver")


def _alone(rank: int, run: Callable[[int, int, Path, Path], None], port: int, folder: Path, work: Path) -> None:
    torch.set_num_threads(1)
    run(rank, port, folder, work)
