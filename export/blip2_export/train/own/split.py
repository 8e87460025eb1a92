"""A share of the records that no step sees, and pictures that are on both sides of it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from blip2_export.train.own.records import Record

_STEPS = 1 << 32


@dataclass(frozen=True)
class Split:
    """Records to learn from, and others to measure on. `doubled`: keys left out of the former for their picture is in the latter."""

    train: list[Record]
    held_out: list[Record]
    doubled: list[str]


def by_share(records: list[Record], share: float) -> Split:
    """About this share is held out, chosen by key: more data later leaves every record on its side."""
    held_out = [record for record in records if _place(record.key) < share]
    return apart([record for record in records if _place(record.key) >= share], held_out)


def apart(train: list[Record], held_out: list[Record]) -> Split:
    """Leaves out of `train` every picture that is held out under any name, byte by byte."""
    same_size = {record.source.size() for record in held_out} - {None}
    digests = {_digest(record) for record in held_out} if train else set()
    candidates = (record for record in train if record.source.size() in same_size)
    doubled = {record.key for record in candidates if _digest(record) in digests}
    return Split([record for record in train if record.key not in doubled], held_out, sorted(doubled))


def doubles(records: Iterable[Record]) -> list[list[str]]:
    """Keys of records that have one picture, byte by byte."""
    by_size: dict[int | None, list[Record]] = defaultdict(list)
    for record in records:
        by_size[record.source.size()].append(record)
    found: dict[bytes, list[str]] = defaultdict(list)
    for size, group in by_size.items():
        if size is not None and len(group) > 1:
            for record in group:
                found[_digest(record)].append(record.key)
    return sorted(keys for digest, keys in found.items() if digest and len(keys) > 1)


def _place(key: str) -> float:
    """From 0 to 1, evenly, the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / _STEPS


def _digest(record: Record) -> bytes:
    """Nothing if it cannot be read; that is told when its turn comes."""
    try:
        return hashlib.sha256(record.source.read()).digest()
    except OSError:
        return b""
