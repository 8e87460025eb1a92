"""Where the bytes of a picture are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


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
        return self.path.read_bytes()

    def size(self) -> int | None:
        try:
            return self.path.stat().st_size
        except OSError:
            return None


@dataclass(frozen=True)
class Member:
    """A part of an uncompressed archive."""

    archive: Path
    offset: int
    length: int

    def read(self) -> bytes:
        with self.archive.open("rb") as opened:
            opened.seek(self.offset)
            found = opened.read(self.length)
        if len(found) < self.length:
            raise OSError(f"{self.archive} ends within a member")
        return found

    def size(self) -> int | None:
        return self.length
