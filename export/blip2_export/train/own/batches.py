"""What a step sees: records of its order as pixels and tokens, cut into the parts of a process; a pure function of the step."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blip2_export.train.own import language, pictures, together
from blip2_export.train.own.captions import LONGEST, clean, says_something
from blip2_export.train.own.order import Order
from blip2_export.train.own.pictures import Look
from blip2_export.train.own.records import Record
from blip2_export.train.own.sources import DataError


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
    """Pixels [rows, 3, side, side] and what goes with them; `bad`: pictures that gave way."""

    pixels: Tensor
    said: Any
    bad: dict[str, str] = field(default_factory=dict)


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

    def __init__(self, order: Order, look: Look, sizes: Sizes, seed: int = 0) -> None:
        self.order, self.look, self.sizes, self.seed = order, look, sizes, seed

    def parts(self, step: int, say: Callable[[list[Record], random.Random, Tensor], Any]) -> list[Part]:
        """`say`: what is said of records, given chance and for each a few numbers from 0 to 1."""
        wanted, size = self.order.batch(step, self.sizes.batch), self.sizes.part
        chances = torch.rand(
            len(wanted), 2, generator=torch.Generator().manual_seed(_number(f"{self.seed} chances {step}"))
        )
        made = []
        for n in range(self.sizes.accumulate):
            first = (n * together.size() + together.rank()) * size
            rows = slice(first, first + size)
            seed = f"{self.seed} {step} {first}"
            looked = pictures.look(self.look, wanted[rows], self._another, seed)
            said = say(looked.records, random.Random(f"{seed} said"), chances[rows])
            made.append(Part(looked.pixels, said, looked.bad))
        return made

    def _another(self, rng: random.Random) -> Record:
        return self.order.at(rng.randrange(len(self.order)))


def captioned(
    encode: Callable[[list[str]], tuple[Tensor, Tensor]],
) -> Callable[[list[Record], random.Random, Tensor], Captioned]:
    """Of stage 1."""

    def say(records: list[Record], rng: random.Random, chances: Tensor) -> Captioned:
        captions = [clean(rng.choice(record.captions)) for record in records]
        ids, mask = encode(captions)
        return Captioned(captions, ids, mask, torch.tensor([_number(record.key) for record in records]), chances)

    return say


def written(
    texts: language.Language, prompt: str, splits: bool
) -> Callable[[list[Record], random.Random, Tensor], language.Texts]:
    """Of stage 2: what the language model reads in front of a caption, and the caption; `splits` cuts captions instead."""

    def say(records: list[Record], rng: random.Random, _: Tensor) -> language.Texts:
        rows = []
        for place, record in enumerate(records):
            caption = clean(rng.choice(record.captions))
            read, rest = language.split(caption, rng) if splits else (prompt, caption)
            rows.append(language.Text(place, read, rest))
        return texts.texts(rows)

    return say


def usable(records: list[Record]) -> tuple[list[Record], str]:
    """Records with captions that say something, and what was passed over."""
    found, passed_over = [], 0
    for record in records:
        captions = [caption for caption in record.captions if says_something(caption)]
        passed_over += len(record.captions) - len(captions)
        if captions:
            found.append(Record(record.key, record.source, captions, record.questions))
    said = f"{passed_over} captions that are empty or longer than {LONGEST} characters are passed over"
    return found, said if passed_over else ""


def _number(text: str) -> int:
    return zlib.crc32(text.encode())
