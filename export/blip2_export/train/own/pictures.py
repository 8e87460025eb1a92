"""Pixels of records, as the base's own processor makes them; pictures that cannot be read give way to others."""

from __future__ import annotations

import hashlib
import io
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from blip2_export.train.own.records import Record
from blip2_export.train.own.sources import DataError

# A longer line of bad pictures is bad data.
_TRIES = 64
# The engine's own bound.
MOST_PIXELS = 89_478_485
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# LAVIS' `blip2_image_train`, as in the paper's two stages: at least half the area, nearly square, half of them mirrored.
_AREA, _SHAPE, _MIRRORED = (0.5, 1.0), (3 / 4, 4 / 3), 0.5

# What Pillow warns of is refused here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Look:
    """How pixels are made: squashed to a square by `resample`, then (x / 255 - mean) / std."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = int(Image.Resampling.BICUBIC)

    def pixels(self, data: bytes, chance: random.Random | None = None) -> np.ndarray:
        """[3, side, side]; an exception if this is no picture. By `chance`, a part of it, perhaps mirrored."""
        picture = opened(data)
        box = None if chance is None else _part(picture.size, chance)
        small = picture.resize((self.side, self.side), Image.Resampling(self.resample), box=box)
        if chance is not None and chance.random() < _MIRRORED:
            small = ImageOps.mirror(small)
        scaled = np.asarray(small, np.float32) / 255
        normal = (scaled - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(normal.transpose(2, 0, 1))


def opened(data: bytes, reduced: int | None = None) -> Image.Image:
    """An upright picture in RGB, as the engine reads it: transparency is dropped. `reduced`: it need only be about so large."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise OSError(f"it has {picture.width}×{picture.height} pixels, more than {MOST_PIXELS}")
            if picture.mode.startswith(("I", "F")):
                raise OSError("its greys have more than 8 bits, which the engine reads as white; convert it")
            if reduced is not None:
                picture.draft("RGB", (reduced, reduced))
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Image.UnidentifiedImageError:
        raise OSError(f"it is no picture ({', '.join(FORMATS)})" if data else "it has no bytes") from None


def _part(size: tuple[int, int], chance: random.Random) -> tuple[float, float, float, float]:
    """`RandomResizedCrop`: an area and a shape, ten tries, else the middle, as much of it as a shape allows."""
    width, height = size
    for _ in range(10):
        area = width * height * chance.uniform(*_AREA)
        shape = float(np.exp(chance.uniform(float(np.log(_SHAPE[0])), float(np.log(_SHAPE[1])))))
        w, h = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x, y = chance.randint(0, width - w), chance.randint(0, height - h)
            return x, y, x + w, y + h
    w, h = min(width, round(height * _SHAPE[1])), min(height, round(width / _SHAPE[0]))
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


@dataclass
class Kept:
    """Features that are known: `rows` [others, positions, width] of those of a part that are not `fresh`; `digests` of all."""

    digests: list[str]
    fresh: list[int]
    rows: Tensor


class Memory(Protocol):
    """Features of pictures that were seen before."""

    def get(self, digest: str) -> Tensor | None:
        """[positions, width], by the SHA-256 of a picture's bytes."""
        ...

    def stacked(self, rows: Sequence[Tensor]) -> Tensor:
        """[rows, positions, width], also of none."""
        ...


@dataclass
class Looked:
    """Pixels [fresh, 3, side, side], of all records unless some are `kept`. `bad`: keys that gave way, and why."""

    pixels: Tensor
    records: list[Record]
    bad: dict[str, str] = field(default_factory=dict)
    kept: Kept | None = None


@dataclass(frozen=True)
class Sight:
    """How pictures are seen: in parts that chance cuts out of them where it `augments`, and from `memory` what is known."""

    look: Look
    augments: bool = False
    memory: Memory | None = None


@dataclass(frozen=True)
class Looker:
    """Makes pixels. `another`: what comes in the place of a picture that cannot be read.

    It is drawn by the place's own chance: the same whenever, and in whichever process, the step is made.
    """

    sight: Sight
    another: Callable[[random.Random], Record]

    def looked(self, wanted: Sequence[Record], chances: Sequence[random.Random]) -> Looked:
        """Of these records, or of others in their places."""
        bad = dict[str, str]()
        found = [self._one(record, chance, bad) for record, chance in zip(wanted, chances, strict=True)]
        pixels = [one.pixels for one in found if one.pixels is not None]
        side, memory = self.sight.look.side, self.sight.memory
        stacked = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, 3, side, side)
        kept = None
        if memory is not None:
            rows = memory.stacked([one.known for one in found if one.known is not None])
            kept = Kept([one.digest for one in found], [i for i, one in enumerate(found) if one.known is None], rows)
        return Looked(stacked, [one.record for one in found], bad, kept)

    def _one(self, record: Record, chance: random.Random, bad: dict[str, str]) -> _One:
        for _ in range(_TRIES):
            try:
                return self._seen(record, chance)
            except Exception as error:  # Pillow raises what its decoders raise
                bad[record.key] = str(error) or type(error).__name__
                record = self.another(chance)
        first, why = next(iter(bad.items()))
        raise DataError(f"{len(bad)} pictures one after another cannot be read, the first is {first} ({why})")

    def _seen(self, record: Record, chance: random.Random) -> _One:
        data = record.source.read()
        sight = self.sight
        digest = hashlib.sha256(data).hexdigest() if sight.memory is not None else ""
        known = sight.memory.get(digest) if sight.memory is not None else None
        if known is not None:
            return _One(record, None, digest, known)
        return _One(record, sight.look.pixels(data, chance if sight.augments else None), digest)


@dataclass
class _One:
    record: Record
    pixels: np.ndarray | None
    digest: str
    known: Tensor | None = None
