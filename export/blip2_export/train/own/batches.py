"""What a step sees: records of its order as pixels and tokens, cut into the parts of a process; a pure function of the step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blip2_export.train.own import language, together
from blip2_export.train.own.captions import clean
from blip2_export.train.own.order import Order
from blip2_export.train.own.pictures import Kept, Looker, Sight
from blip2_export.train.own.records import Record, passed_over
from blip2_export.train.own.sources import DataError

# What is said of records, by the chance of each row, and a few numbers from 0 to 1 for each.
Say = Callable[[list[Record], Sequence[random.Random], Tensor], Any]


@dataclass(frozen=True)
class Sizes:
    """`batch`: pictures of a step, over all processes and parts. `accumulate`: parts of each process, one after another."""

    batch: int
    accumulate: int = 1

    @property
    def part(self) -> int:
        """Pictures of one part of one process."""
        return self.batch // (self.accumulate * together.size())

    def check(self) -> None:
        """Refuses a step that cannot be cut into equal parts."""
        n, processes = self.accumulate, together.size()
        if self.batch < 1 or n < 1:
            raise DataError(f"a batch of {self.batch} in {n} parts: both must be 1 or more")
        if self.batch % (n * processes):
            raise DataError(
                f"a batch of {self.batch} cannot be cut into {n} parts for each of {processes} processes; "
                f"--batch-size must be a multiple of {n * processes}"
            )


@dataclass
class Part:
    """Pixels [rows, 3, side, side], none of those that are `kept`, and what goes with them. `bad`: pictures that gave way."""

    pixels: Tensor
    said: Any
    bad: dict[str, str] = field(default_factory=dict)
    kept: Kept | None = None


@dataclass
class Captioned:
    """One caption for each row, its tokens, and numbers that are the same where the picture is."""

    captions: list[str]
    ids: Tensor
    mask: Tensor
    picture: Tensor
    chances: Tensor


class Batches:
    """Makes the parts of a step."""

    def __init__(self, order: Order, sight: Sight, sizes: Sizes, seed: int = 0) -> None:
        sizes.check()
        self.order, self.sizes, self.seed = order, sizes, seed
        self._looker = Looker(sight, self._another)

    def parts(self, step: int, say: Say) -> list[Part]:
        """Those of this process. Chance belongs to a row's place in the batch, however that is cut."""
        wanted, size = self.order.batch(step, self.sizes.batch), self.sizes.part
        chances = torch.rand(
            len(wanted), 2, generator=torch.Generator().manual_seed(number(f"{self.seed} chances {step}"))
        )
        made = []
        for n in range(self.sizes.accumulate):
            first = (n * together.size() + together.rank()) * size
            rows = slice(first, first + size)
            seen, said = (self._chances(step, rows, what) for what in ("seen", "said"))
            looked = self._looker.looked(wanted[rows], seen)
            made.append(Part(looked.pixels, say(looked.records, said, chances[rows]), looked.bad, looked.kept))
        return made

    def _chances(self, step: int, rows: slice, what: str) -> list[random.Random]:
        return [random.Random(f"{self.seed} {what} {step} {row}") for row in range(rows.start, rows.stop)]

    def _another(self, rng: random.Random) -> Record:
        return self.order.at(rng.randrange(len(self.order)))


def captioned(
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
) -> Say:
    """Of stage 1."""

    def say(records: list[Record], rngs: Sequence[random.Random], chances: Tensor) -> Captioned:
        captions = [clean(rng.choice(record.captions)) for record, rng in zip(records, rngs, strict=True)]
        ids, mask = encode(captions)
        return Captioned(captions, ids, mask, torch.tensor([number(str(record.source)) for record in records]), chances)

    return say


@dataclass(frozen=True)
class Telling:
    """How the language model comes to write captions: behind `prompt`, or, where it `splits`, from a place within them."""

    speaks: language.Language
    prompt: str = ""
    splits: bool = False


def written(telling: Telling) -> Say:
    """Of stage 2: what the language model reads of a caption, and the rest, which it writes."""

    def say(records: list[Record], rngs: Sequence[random.Random], _: Tensor) -> language.Texts:
        rows = []
        for place, (record, rng) in enumerate(zip(records, rngs, strict=True)):
            caption = clean(rng.choice(record.captions))
            read, rest = language.split(caption, rng) if telling.splits else (telling.prompt, caption)
            rows.append(language.Text(place, read, rest))
        return telling.speaks.texts(rows)

    return say


def usable(records: list[Record]) -> tuple[list[Record], str]:
    """Records with captions, and what was passed over."""
    return [record for record in records if record.captions], passed_over(records)


def number(text: str) -> int:
    """The same for the same text, on every machine; of 63 bits."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "big") >> 1
