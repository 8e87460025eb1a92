"""What is measured takes long: who stops it gets what is there."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = 130  # the exit status


@contextmanager
def like_ctrl_c() -> Iterator[None]:
    """SIGTERM raises `KeyboardInterrupt` in here, as SIGINT does."""
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)
