"""What is measured on, and a few pictures of it that are shown: the same whenever it is looked at, on however many processes."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from blip2_export.train.own import pictures
from blip2_export.train.own.batches import Part
from blip2_export.train.own.pictures import Look
from blip2_export.train.own.records import Record

MOST = 1000  # pictures that a measurement takes, as many as Flickr30k's test set has
_THUMBNAIL = 240
_FEWEST = 2  # rows of a part; one alone has nothing to be told apart from

Say = Callable[[list[Record], random.Random, Tensor], Any]


class HeldOut:
    """Records in an order of its own. `size`: pictures of a part, about."""

    def __init__(self, records: Sequence[Record], look: Look, size: int, seed: int = 0, most: int = MOST) -> None:
        ordered = sorted(records, key=lambda record: record.key)
        random.Random(f"{seed} held out").shuffle(ordered)
        self.records, self.look, self.size, self.seed = ordered[:most], look, max(_FEWEST, size), seed

    def __len__(self) -> int:
        return len(self.records)

    def parts(self, say: Say) -> Iterator[Part]:
        """All of it, in parts that are as large as one another, give or take one; made as they are asked for."""
        n = max(1, len(self.records) // self.size)
        edges = [len(self.records) * i // n for i in range(n + 1)]
        for first, end in pairwise(edges):
            yield self.part(self.records[first:end], say)

    def part(self, wanted: Sequence[Record], say: Say) -> Part:
        """These records, with what is said of them."""
        seed = f"{self.seed} held out {wanted[0].key}"
        rng = random.Random(f"{seed} said")
        chances = torch.tensor([[rng.random(), rng.random()] for _ in wanted])
        looked = pictures.look(self.look, wanted, lambda r: r.choice(self.records), seed)
        return Part(looked.pixels, say(looked.records, rng, chances), looked.bad)

    def shown(self, n: int) -> tuple[list[Record], dict[str, bytes]]:
        """The first records whose pictures can be read, and small JPEG files of those."""
        found, thumbnails = [], dict[str, bytes]()
        for record in self.records[: 4 * n]:
            if len(found) == n:
                break
            try:
                thumbnails[record.key] = thumbnail(record.source.read())
            except Exception:  # Pillow raises what its decoders raise; it is told of when it is learnt or measured on
                continue
            found.append(record)
        return found, thumbnails


def thumbnail(data: bytes) -> bytes:
    """A small JPEG of a picture."""
    with Image.open(io.BytesIO(data)) as opened:
        small = ImageOps.exif_transpose(opened).convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    kept = io.BytesIO()
    small.save(kept, "JPEG", quality=80)
    return kept.getvalue()
