"""Which records a step sees: a pure function of the step, so that a run that was killed sees what an unbroken one would have."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blip2_export.train.own.records import Record
from blip2_export.train.own.sources import DataError

_CYCLE = 1000
# Shards that pictures come from at a time, so that a disk reads a few files rather than all of them.
_OPEN_SHARDS = 16


@dataclass(frozen=True)
class Part:
    """Records, and how often they come beside other parts."""

    records: Sequence[Record]
    weight: float = 1.0


class Order:
    """Every part goes through its records in an order of its own, a new one each time; parts take turns by their weights.

    Of every thousand places each part has its share, to the nearest thousandth and at least one.
    """

    def __init__(self, parts: Sequence[Part], seed: int = 0) -> None:
        if not parts or any(not part.records for part in parts):
            raise DataError("a set has no record to learn from")
        if any(not 0 < part.weight < float("inf") for part in parts):
            raise DataError("the weight of a set must be a number above 0")
        if len(parts) > _CYCLE:
            raise DataError(f"these are more than {_CYCLE} sets")
        self.parts, self.seed = list(parts), seed
        self._turns = _turns([part.weight for part in parts])
        self._shares = [self._turns.count(which) for which in range(len(parts))]

    def __len__(self) -> int:
        return sum(len(part.records) for part in self.parts)

    def batch(self, step: int, size: int) -> list[Record]:
        """What a step sees, if every step sees `size`."""
        return [self.at(step * size + i) for i in range(size)]

    def at(self, place: int) -> Record:
        """The record at a place of the endless line."""
        cycle, within = divmod(place, _CYCLE)
        which, rank = self._cycle(cycle)[within]
        part = self.parts[which].records
        epoch, i = divmod(cycle * self._shares[which] + rank, len(part))
        return part[self._permutation(which, epoch)[i]]

    @functools.lru_cache(maxsize=4)  # noqa: B019, it lives as long as the run
    def _cycle(self, cycle: int) -> list[tuple[int, int]]:
        """For every place of a cycle its part, and how many of that part stand before it."""
        turns = list(self._turns)
        random.Random(f"{self.seed} cycle {cycle}").shuffle(turns)
        counts, places = [0] * len(self.parts), []
        for which in turns:
            places.append((which, counts[which]))
            counts[which] += 1
        return places

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def _permutation(self, which: int, epoch: int) -> list[int]:
        """Shards come in any order, some at a time, whose records are mixed; records of no shard are all mixed."""
        rng = random.Random(f"{self.seed} part {which} epoch {epoch}")
        shards = self._shards(which)
        rng.shuffle(shards)
        order = []
        for first in range(0, len(shards), _OPEN_SHARDS):
            mixed = [i for shard in shards[first : first + _OPEN_SHARDS] for i in shard]
            rng.shuffle(mixed)
            order += mixed
        return order

    def _shards(self, which: int) -> list[list[int]]:
        found: dict[Path | None, list[int]] = {}
        for i, record in enumerate(self.parts[which].records):
            found.setdefault(getattr(record.source, "archive", None), []).append(i)
        return list(found.values())


def _turns(weights: list[float]) -> list[int]:
    """Parts of a cycle by their shares, each at least once; what rounding leaves goes to those that lost most by it."""
    shares = [weight / sum(weights) * _CYCLE for weight in weights]
    counts = [max(1, int(share)) for share in shares]
    by_loss = sorted(range(len(weights)), key=lambda which: counts[which] - shares[which])
    for n in range(abs(_CYCLE - sum(counts))):
        if sum(counts) < _CYCLE:
            counts[by_loss[n % len(by_loss)]] += 1
        else:
            counts[max(range(len(counts)), key=counts.__getitem__)] -= 1
    return [which for which, count in enumerate(counts) for _ in range(count)]
