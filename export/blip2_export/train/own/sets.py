"""The sets of a run: read, looked through, and cut into what is learnt and what is held out. Whatever is left out is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blip2_export.train.own import records, split, together
from blip2_export.train.own.order import Order, Part
from blip2_export.train.own.records import Record
from blip2_export.train.own.sources import DataError

# Of records, those that can be learnt, and what has to be said of the rest.
Usable = Callable[[list[Record]], tuple[list[Record], str]]


class Setup(Protocol):
    """What a person says of data."""

    data: list[tuple[Path, float]]
    answers: tuple[Path, ...]
    images: Path | None
    held_out: float | Path
    held_out_answers: Path | None
    work: Path
    workers: int
    seed: int


@dataclass(frozen=True)
class Learnt:
    """Records to learn from by set, and those that are held out."""

    order: Order
    train: list[Record]
    held_out: list[Record]


def learnt(setup: Setup, usable: Usable) -> Learnt:
    """Of all sets."""
    answers = setup.answers or (None,) * len(setup.data)
    if len(answers) != len(setup.data):
        raise DataError(f"--answers names {len(answers)} files for {len(setup.data)} sets; name one for each --data")
    apart = _apart(setup, usable)
    sides, held_out = [], list(apart or [])
    for (path, _), notes in zip(setup.data, answers, strict=True):
        found = _read(setup, path, notes, usable)
        if isinstance(setup.held_out, Path):
            sides.append([record for record in found if record.part in ("", "train")])
        else:
            train, held = split.by_share(found, setup.held_out)
            sides.append(train)
            held_out += held
    sides = _without_copies(setup, sides, held_out)
    for (path, _), train in zip(setup.data, sides, strict=True):
        if not train:
            raise DataError(f"{path}: nothing is left to learn from, all of its records are held out")
    order = Order([Part(train, weight) for train, (_, weight) in zip(sides, setup.data, strict=True)], setup.seed)
    return Learnt(order, [record for train in sides for record in train], held_out)


def there(path: Path, found: list[Record]) -> list[Record]:
    """Those whose picture is there. Some that are missing are told; where most are, the folder is wrong."""
    missing = [record for record in found if not record.source.size()]
    if not missing:
        return found
    said = f"{path}: {len(missing)} of {len(found)} pictures are not there, or empty; the first is {missing[0].key}"
    if len(missing) * 2 > len(found):
        raise DataError(f"{said}; name the folder that they are in with --images")
    _warn(f"{said}; they are passed over")
    gone = {id(record) for record in missing}
    return [record for record in found if id(record) not in gone]


def _apart(setup: Setup, usable: Usable) -> list[Record] | None:
    """A set of its own; of a file that says which part a picture is in, what is not learnt."""
    if not isinstance(setup.held_out, Path):
        return None
    found = _read(setup, setup.held_out, setup.held_out_answers, usable)
    parts = {record.part for record in found} & {"val", "test"}
    return [record for record in found if record.part == ("val" if "val" in parts else "test")] if parts else found


def _read(setup: Setup, path: Path, answers: Path | None, usable: Usable) -> list[Record]:
    everything = records.read(path, setup.images, answers, setup.work)
    found, passed_over = usable(everything)
    if not found:
        raise DataError(f"{path}: it has nothing to learn from" + (f": {passed_over}" if passed_over else ""))
    n_refused = sum(len(record.refused) for record in everything)
    n_taken = sum(len(record.captions) + len(record.questions) for record in found)
    if n_refused > n_taken:
        raise DataError(
            f"{path}: {passed_over}; {n_taken} are left, fewer than half, so the file is not what it should be"
        )
    if passed_over:
        _warn(f"{path}: {passed_over}")
    return there(path, found)


def _without_copies(setup: Setup, sides: list[list[Record]], held_out: list[Record]) -> list[list[Record]]:
    every = [record for side in sides for record in side]
    if every and held_out and not split.are_compared(every, held_out):
        _warn(
            f"more than {split.MOST} pictures: those that are held out as well are found only where they are the same files"
        )
    same = iter(split.copies(every, held_out, max(1, setup.workers), setup.work / "prints.npz"))
    kept = []
    for (path, _), side in zip(setup.data, sides, strict=True):
        doubled = [next(same) for _ in side]
        if any(doubled):
            first = side[doubled.index(True)].key
            _warn(f"{path}: {sum(doubled)} pictures are held out under another name, and not learnt: {first}")
        kept.append([record for record, is_double in zip(side, doubled, strict=True) if not is_double])
    return kept


def _warn(said: str) -> None:
    if together.is_first():
        print(f"warning: {said}", file=sys.stderr)
