"""A share of the records that no step sees, and pictures that are on both sides of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blip2_export.train.own import prints
from blip2_export.train.own.records import Record

_STEPS = 1 << 32
# So many are looked through for copies whose bytes differ; reading all pictures takes 5 to 40 ms each.
MOST = 50_000


def by_share(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Records to learn from, and about this share that is held out, chosen by key: more data later leaves every record on its side.

    Where the data itself says so, `val` is held out instead, and `test` is on neither side.
    """
    if any(record.part == "val" for record in records):
        return [record for record in records if record.part in ("", "train")], [r for r in records if r.part == "val"]
    known = [record for record in records if record.part != "test"]
    train = [record for record in known if _place(record.key) >= share]
    return train, [record for record in known if _place(record.key) < share]


def copies(
    train: Sequence[Record], held_out: Sequence[Record], threads: int = 2, keep: Path | None = None
) -> np.ndarray:
    """[train], whether a picture is held out as well: under any name byte by byte, or, unless there are too many, saved anew.

    `keep`: where the next to ask finds what was made of each picture.
    """
    same = _same_bytes(train, held_out)
    if train and held_out and are_compared(train, held_out):
        found = prints.of([*train, *held_out], threads, keep)
        same |= found[: len(train)].like(found[len(train) :])
    return same


def are_compared(train: Sequence[Record], held_out: Sequence[Record]) -> bool:
    """Whether pictures are looked at, not only their bytes."""
    return len(train) + len(held_out) <= MOST


def _same_bytes(train: Sequence[Record], held_out: Sequence[Record]) -> np.ndarray:
    sizes = {record.source.size() for record in train} & {record.source.size() for record in held_out} - {None}
    digests = {_digest(record) for record in held_out if record.source.size() in sizes} - {b""}
    return np.array([record.source.size() in sizes and _digest(record) in digests for record in train], bool)


def _place(key: str) -> float:
    """From 0 to 1, evenly, the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / _STEPS


def _digest(record: Record) -> bytes:
    """Nothing if it cannot be read; that is told when its turn comes."""
    try:
        return hashlib.sha256(record.source.read()).digest()
    except OSError:
        return b""
