"""Two processes that learn together."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import multiprocessing


def two(run: Callable[[int, int, Path, Path], None], folder: Path, work: Path) -> None:
    """`run`, as rank 0 and 1, of a free port and these folders; forked where that is safe, for imports take long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    method = "spawn" if torch.cuda.is_available() else "fork"
    multiprocessing.start_processes(_alone, (run, port, folder, work), nprocs=2, start_method=method)


def _alone(rank: int, run: Callable[[int, int, Path, Path], None], port: int, folder: Path, work: Path) -> None:
    """Without what a fork knows of the process that it comes from: that it is by itself, and has threads, which are not here."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    run(rank, port, folder, work)
