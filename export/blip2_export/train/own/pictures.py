"""Pixels of records, as the base's own processor makes them; pictures that cannot be read give way to others."""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from blip2_export.train.own.records import Record
from blip2_export.train.own.sources import DataError

# A longer line of bad pictures is bad data.
_TRIES = 64


@dataclass(frozen=True)
class Look:
    """How pixels are made: squashed to a square by `resample`, then (x / 255 - mean) / std."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = int(Image.Resampling.BICUBIC)

    def pixels(self, data: bytes) -> np.ndarray:
        """[3, side, side]; an exception of Pillow's if this is no picture."""
        with warnings.catch_warnings():
            # Bombs are refused, not warned of.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
        small = upright.resize((self.side, self.side), Image.Resampling(self.resample))
        scaled = np.asarray(small, np.float32) / 255
        normal = (scaled - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))


@dataclass
class Looked:
    """Pixels [batch, 3, side, side] with their records. `bad`: keys that gave way, and why."""

    pixels: Tensor
    records: list[Record]
    bad: dict[str, str] = field(default_factory=dict)


def look(look: Look, wanted: Sequence[Record], another: Callable[[random.Random], Record], seed: str) -> Looked:
    """The pictures of these records. In the place of one that cannot be read comes `another`, the same whenever the step is made."""
    rng, bad = random.Random(seed), dict[str, str]()
    found: list[tuple[np.ndarray, Record]] = []
    for record in wanted:
        for _ in range(_TRIES):
            try:
                found.append((look.pixels(record.source.read()), record))
                break
            except Exception as error:  # Pillow raises what its decoders raise
                bad[record.key] = f"{type(error).__name__}: {error}"
                record = another(rng)
        else:
            first, why = next(iter(bad.items()))
            raise DataError(f"{len(bad)} pictures one after another cannot be read, the first is {first} ({why})")
    return Looked(torch.from_numpy(np.stack([pixels for pixels, _ in found])), [record for _, record in found], bad)
