"""Where the bytes of a picture are."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MOST_BYTES = 256 << 20  # of one picture


class DataError(ValueError):
    """The data cannot be used; the message says what to mend."""


class Source(Protocol):
    """Bytes that can be read again."""

    def read(self) -> bytes:
        """All of them; an `OSError` if that is not possible."""
        ...

    def size(self) -> int | None:
        """How many, if they are there."""
        ...


@dataclass(frozen=True)
class File:
    """A file of its own."""

    path: Path

    def read(self) -> bytes:
        size = self.size()
        if size is None:
            raise FileNotFoundError(f"{self.path} is not there, or no file")
        if size > MOST_BYTES:
            raise OSError(f"{self.path} has {size} bytes, more than {MOST_BYTES}")
        return self.path.read_bytes()

    def size(self) -> int | None:
        """Nothing of pipes and devices either: reading them need not end."""
        try:
            found = self.path.stat()
        except (OSError, ValueError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None


@dataclass(frozen=True)
class Member:
    """A part of an uncompressed archive."""

    archive: Path
    offset: int
    length: int

    def read(self) -> bytes:
        if self.length > MOST_BYTES:
            raise OSError(f"a member of {self.archive} has {self.length} bytes, more than {MOST_BYTES}")
        with self.archive.open("rb") as opened:
            opened.seek(self.offset)
            found = opened.read(self.length)
        if len(found) < self.length:
            raise OSError(f"{self.archive} ends within a member")
        return found

    def size(self) -> int | None:
        return self.length
