"""The sets of a run: read, looked through, and cut into what is learnt and what is held out. Whatever is left out is said."""

from __future__ import annotations

import hashlib
import json
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
    images: tuple[Path, ...]
    held_out: float | Path
    held_out_answers: Path | None
    held_out_images: Path | None
    work: Path
    workers: int
    seed: int


@dataclass(frozen=True)
class Learnt:
    """Records to learn from by set, and those that are held out."""

    order: Order
    train: list[Record]
    held_out: list[Record]

    def print(self) -> str:
        """What is learnt, in short: a run goes on with the same alone."""
        said = ([record.key, record.captions, [(q.text, q.answers) for q in record.questions]] for record in self.train)
        digest = hashlib.sha256()
        for one in said:
            digest.update(json.dumps(one).encode())
        return f"{len(self.train)} pictures ({digest.hexdigest()[:12]})"


def learnt(setup: Setup, usable: Usable) -> Learnt:
    """Of all sets."""
    places = _places(setup)
    sides, held_out = [], _apart(setup, usable)
    for (path, _), place in zip(setup.data, places, strict=True):
        found = _read(setup, path, place, usable)
        if isinstance(setup.held_out, Path):
            sides.append([record for record in found if record.part in ("", "train")])
        else:
            train, held = split.by_share(found, setup.held_out)
            sides.append(train)
            held_out += held
    _tell_few(setup, sides, held_out)
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


@dataclass(frozen=True)
class _Place:
    """What a set needs beside its file: where its pictures are, and VQAv2's annotations."""

    images: Path | None
    answers: Path | None


def _places(setup: Setup) -> list[_Place]:
    """Of each set."""
    n, answers, images = len(setup.data), setup.answers, setup.images
    if len(answers) not in (0, n):
        raise DataError(f"--answers names {len(answers)} files for {n} sets; name one for each --data")
    if len(images) not in (0, 1, n):
        raise DataError(f"--images names {len(images)} folders for {n} sets; name one for all, or one for each --data")
    each = images * n if len(images) == 1 else images or (None,) * n
    return [_Place(*place) for place in zip(each, answers or (None,) * n, strict=True)]


def _apart(setup: Setup, usable: Usable) -> list[Record]:
    """A set of its own; of a file that says which part a picture is in, what is not learnt."""
    if not isinstance(setup.held_out, Path):
        return []
    images = setup.held_out_images or (setup.images[0] if len(setup.images) == 1 else None)
    found = _read(setup, setup.held_out, _Place(images, setup.held_out_answers), usable)
    parts = {record.part for record in found} & {"val", "test"}
    return [record for record in found if record.part == ("val" if "val" in parts else "test")] if parts else found


def _tell_few(setup: Setup, sides: list[list[Record]], held_out: list[Record]) -> None:
    """Of a small set a share may be nothing, and with it every figure that somebody waits for."""
    if setup.held_out and len(held_out) < 2:
        n = len(held_out) + sum(map(len, sides))
        share = "" if isinstance(setup.held_out, Path) else ", for which ones follows from their names"
        _warn(f"{len(held_out)} of {n} pictures held out{share}; a larger --held-out gives more to measure on")


def _read(setup: Setup, path: Path, place: _Place, usable: Usable) -> list[Record]:
    everything = records.read(path, place.images, place.answers, setup.work)
    found, passed_over = usable(everything)
    if not found:
        raise DataError(
            f"{path}: it has nothing to learn from{_instead(everything)}" + (f": {passed_over}" if passed_over else "")
        )
    n_refused = sum(len(record.refused) for record in everything)
    n_taken = sum(len(record.captions) + len(record.questions) for record in found)
    if n_refused > n_taken:
        raise DataError(
            f"{path}: {passed_over}; {n_taken} are left, fewer than half, so the file is not what it should be"
        )
    if passed_over:
        _warn(f"{path}: {passed_over}")
    return there(path, found)


def _instead(found: list[Record]) -> str:
    """What they have that another command learns from."""
    if any(record.questions for record in found):
        return ", for its rows are questions, which `train vqa` learns from"
    if any(record.captions for record in found):
        return ", for its rows are captions, which `train stage1` and `stage2` learn from"
    return ""


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
