"""Files that are written beside their place first, and what a killed run left of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_END = ".part"


def aside_of(file: Path) -> Path:
    """Where a file that one process alone writes is until it is whole."""
    return file.with_name(f"{file.name}{_END}")


def beside(file: Path) -> Path:
    """Where this process, of several that may, writes `file` until it is whole."""
    return file.with_name(f".{file.name}.{_host()}.{os.getpid()}{_END}")


def sweep(found: Iterable[Path]) -> None:
    """Removes, of these, what processes of this machine left that are no more; others may still be writing."""
    for file in found:
        rest = file.name.removesuffix(_END)
        owner, _, number = rest.rpartition(".")
        if rest == file.name or not owner.endswith(f".{_host()}") or not number.isdigit():
            continue
        if not _lives(int(number)):
            with suppress(OSError):
                file.unlink()


def _host() -> str:
    return socket.gethostname().replace("/", "_")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
