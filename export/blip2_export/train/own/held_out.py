"""What is measured on, and a few pictures of it that are shown: the same whenever it is looked at, on however many processes."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from blip2_export.train.own import pictures
from blip2_export.train.own.batches import Part, Say
from blip2_export.train.own.pictures import Sight
from blip2_export.train.own.records import Record

MOST = 1000  # pictures that a measurement takes, as many as Flickr30k's test set has
_THUMBNAIL = 240
_FEWEST = 2  # rows of a part; one alone has nothing to be told apart from


class HeldOut:
    """Records in an order of its own. `size`: pictures of a part, about."""

    def __init__(
        self,
        records: Sequence[Record],
        sight: Sight,
        size: int,
        seed: int = 0,
        note: Callable[[Part], object] = lambda _: None,
    ) -> None:
        ordered = sorted(records, key=lambda record: record.key)
        random.Random(f"{seed} held out").shuffle(ordered)
        self.records, self.size, self.seed = ordered[:MOST], max(_FEWEST, size), seed
        self._note = note
        self._looker = pictures.Looker(sight, lambda chance: chance.choice(self.records))

    def __len__(self) -> int:
        return len(self.records)

    def parts(self, say: Say, most: int | None = None) -> Iterator[Part]:
        """All of it, or the first `most`, in parts that are as large as one another, give or take one; made when asked for."""
        records = self.records[:most]
        n = max(1, len(records) // self.size)
        edges = [len(records) * i // n for i in range(n + 1)]
        for first, end in pairwise(edges):
            yield self.part(records[first:end], say)

    def part(self, wanted: Sequence[Record], say: Say) -> Part:
        """These records, with what is said of them."""
        seen, said, drawn = (self._chances(wanted, what) for what in ("seen", "said", "drawn"))
        chances = torch.tensor([[chance.random(), chance.random()] for chance in drawn])
        looked = self._looker.looked(wanted, seen)
        part = Part(looked.pixels, say(looked.records, said, chances), looked.bad, looked.kept)
        self._note(part)
        return part

    def _chances(self, wanted: Sequence[Record], what: str) -> list[random.Random]:
        """Of a record, whatever part it is in."""
        return [random.Random(f"{self.seed} held out {what} {record.key}") for record in wanted]

    def shown(self, n: int) -> tuple[list[Record], dict[str, bytes]]:
        """The first records whose pictures can be read, and small JPEG files of those."""
        found, thumbnails = [], dict[str, bytes]()
        for record in self.records[: 4 * n]:
            if len(found) == n:
                break
            if record.key in thumbnails:  # of another set
                continue
            try:
                thumbnails[record.key] = thumbnail(record.source.read())
            except Exception:  # Pillow raises what its decoders raise; it is told of when it is learnt or measured on
                continue
            found.append(record)
        return found, thumbnails


def thumbnail(data: bytes) -> bytes:
    """A small JPEG of a picture."""
    small = pictures.opened(data, 2 * _THUMBNAIL)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    kept = io.BytesIO()
    small.save(kept, "JPEG", quality=80)
    return kept.getvalue()
