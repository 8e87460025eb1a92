"""Pictures that are copies of others though their bytes differ: saved again, or at another size."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from blip2_export.train.own import pictures
from blip2_export.train.own.records import Record

# Of 64 bits of a difference hash (is a cell brighter than the one to its left), and of 255 levels of any cell of 16 × 16.
DISTANCE, LEVELS = 8, 24
_MARGIN = 3  # levels; without it even areas would be all chance
_CELLS = 16
_REDUCED = 64


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


def of(records: Sequence[Record], threads: int = 2) -> Prints:
    """Reads every picture once, as small as its format allows."""
    bits, cells = np.zeros(len(records), np.uint64), np.zeros((len(records), 3 * _CELLS**2), np.uint8)
    there = np.zeros(len(records), bool)

    def read(i: int) -> None:
        try:
            bits[i], cells[i] = _print(records[i].source.read())
            there[i] = True
        except Exception:  # told when its turn comes
            return

    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(read, range(len(records))))
    return Prints(bits, cells, there)


def _print(data: bytes) -> tuple[np.uint64, np.ndarray]:
    picture = pictures.opened(data, _REDUCED)
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    brighter = (grey[:, 1:] > grey[:, :-1] + _MARGIN).ravel()
    cells = np.asarray(picture.resize((_CELLS, _CELLS), Image.Resampling.BOX)).ravel()
    return np.packbits(brighter).view(np.uint64)[0], cells
