"""Pictures that are copies of others though their bytes differ: saved again, or at another size."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from blip2_export.train.own import pictures
from blip2_export.train.own.aside import aside_of
from blip2_export.train.own.records import Record
from blip2_export.train.own.sources import Source

# Of 64 bits of a difference hash (is a cell brighter than the one to its left), and of 255 levels of any cell of 16 × 16.
DISTANCE, LEVELS = 8, 24
_MARGIN = 3  # levels; without it even areas would be all chance
_CELLS = 16
_REDUCED = 64
_NAME = 16  # bytes


@dataclass(frozen=True)
class Prints:
    """`bits` [n] and `cells` [n, 768] of pictures; `there` [n]: whether they could be read."""

    bits: np.ndarray
    cells: np.ndarray
    there: np.ndarray

    def like(self, others: Prints) -> np.ndarray:
        """[n], whether one of the others shows the same."""
        found = np.zeros(len(self.bits), bool)
        for i in np.flatnonzero(self.there):
            apart = np.bitwise_count(self.bits[i] ^ others.bits)
            near = others.cells[(apart <= DISTANCE) & others.there].astype(np.int16)
            found[i] = bool((np.abs(near - self.cells[i]).max(1) <= LEVELS).any()) if len(near) else False
        return found

    def __getitem__(self, which: slice) -> Prints:
        return Prints(self.bits[which], self.cells[which], self.there[which])


def of(records: Sequence[Record], threads: int = 2, keep: Path | None = None) -> Prints:
    """Reads every picture once, as small as its format allows. `keep`: a file that spares those which are as they were."""
    bits, cells = np.zeros(len(records), np.uint64), np.zeros((len(records), 3 * _CELLS**2), np.uint8)
    there = np.zeros(len(records), bool)
    found, names = Prints(bits, cells, there), [_name(record.source) if keep else None for record in records]
    if keep is not None:
        _take(found, names, keep)

    def read(i: int) -> None:
        try:
            bits[i], cells[i] = _print(records[i].source.read())
            there[i] = True
        except Exception:  # told when its turn comes
            return

    with ThreadPoolExecutor(max(1, threads)) as pool:
        new = np.flatnonzero(~there)
        list(pool.map(read, new))
    if keep is not None and there[new].any():
        _put(found, names, keep)
    return found


def _name(source: Source) -> bytes | None:
    """Of what a print follows from; nothing where that cannot be told."""
    file = getattr(source, "path", None) or getattr(source, "archive", None)
    try:
        known = os.stat(file) if file is not None else None
    except OSError:
        return None
    if known is None:
        return None
    said = [_MARGIN, _CELLS, _REDUCED, repr(source), os.path.abspath(str(file)), known.st_size, known.st_mtime_ns]
    return hashlib.sha256(repr(said).encode(errors="surrogateescape")).digest()[:_NAME]


def _take(found: Prints, names: Sequence[bytes | None], keep: Path) -> None:
    """Fills in what is kept."""
    try:
        with np.load(keep) as kept:
            where = {bytes(name): i for i, name in enumerate(kept["names"])}
            bits, cells = kept["bits"], kept["cells"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return
    for i, name in enumerate(names):
        place = where.get(name) if name else None
        if place is not None:
            found.bits[i], found.cells[i], found.there[i] = bits[place], cells[place], True


def _put(found: Prints, names: Sequence[bytes | None], keep: Path) -> None:
    """Whole or not at all; it spares time, so a disk that is full for it is no error yet."""
    which = [i for i, name in enumerate(names) if name and found.there[i]]
    array = np.frombuffer(b"".join(names[i] or b"" for i in which), np.uint8).reshape(-1, _NAME)
    aside = aside_of(keep)
    try:
        keep.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as out:
            np.savez(out, names=array, bits=found.bits[which], cells=found.cells[which])
        os.replace(aside, keep)
    except OSError:
        aside.unlink(missing_ok=True)


def _print(data: bytes) -> tuple[np.uint64, np.ndarray]:
    picture = pictures.opened(data, _REDUCED)
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    brighter = (grey[:, 1:] > grey[:, :-1] + _MARGIN).ravel()
    cells = np.asarray(picture.resize((_CELLS, _CELLS), Image.Resampling.BOX)).ravel()
    return np.packbits(brighter).view(np.uint64)[0], cells
