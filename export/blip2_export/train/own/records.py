"""What data says: pictures with captions or questions, in the forms that people have them in."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from blip2_export.train.own import forms, shards, texts
from blip2_export.train.own.forms import Question, Said, weighted
from blip2_export.train.own.sources import PICTURES, DataError, File, Source

_LISTS = ("metadata.jsonl", "metadata.csv", "annotations.json", "captions.json", "captions.txt", "captions.csv")
_BESIDE = (".txt", ".caption")


@dataclass
class Record:
    """A picture and what is said or asked about it. `key` names it, and decides on which side of a split it is.

    `part`: where the data itself puts it, if it does: `train`, `val` or `test`. `refused`: why texts of it were passed over.
    """

    key: str
    source: Source
    captions: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    part: str = ""
    refused: list[str] = field(default_factory=list)

    def take(self, said: Said) -> None:
        """Whatever of a row can be learnt."""
        self.part = said.part or self.part
        if said.refused:
            self.refused.append(said.refused)
        if said.question:
            self.questions.append(said.question)
        for caption in said.captions:
            if why := texts.why_not(caption):
                self.refused.append(why)
            else:
                self.captions.append(str(caption))


def read(data: Path, images: Path | None = None, answers: Path | None = None, work: Path | None = None) -> list[Record]:
    """The records of a file, a folder or shards, ordered by key.

    `data` is one of: a COCO captions file, VQAv2's questions (with `answers`, its annotations, by default those beside it),
    Karpathy's or any other JSON list, JSON Lines or CSV of rows that name a picture and its captions or its question and answers,
    Flickr30k's `.token` or `results.csv`, a folder that has a list (Hugging Face's imagefolder with `metadata.csv` or `.jsonl`),
    a folder of pictures with a text file beside each, or WebDataset shards (`a.tar`, `a-{000..099}.tar`, a pattern, a folder of
    them). Names of pictures start from `images`, by default the file's folder, and stay below it. Compressed shards are unpacked
    into `work`.
    """
    file = _list_of(data)
    if file is None and shards.are_meant(data):
        return _of_shards(data, work)
    if not data.exists():
        raise DataError(f"{data}: there is no such file or folder")
    if file is None:
        return _beside(data)
    return _records(file, forms.rows(file, answers), images or file.parent)


def passed_over(records: Iterable[Record]) -> str:
    """What could not be learnt of them, by reason, and where it begins; nothing if all could."""
    refused = [(why, record.key) for record in records for why in record.refused]
    if not refused:
        return ""
    counts = Counter(why for why, _ in refused).most_common(4)
    by_reason = ", ".join(f"{n} {why}" for why, n in counts)
    return f"{len(refused)} texts are passed over ({by_reason}), the first is that of {refused[0][1]}"


def _list_of(data: Path) -> Path | None:
    """The file itself, or the list of a folder; none for shards."""
    if not data.is_dir():
        return None if shards.are_meant(data) else data
    return next((data / name for name in _LISTS if (data / name).is_file()), None)


def _of_shards(data: Path, work: Path | None) -> list[Record]:
    found = []
    for source, said in shards.read(data, work):
        found.append(Record(said.name, source))
        found[-1].take(said)
    return sorted(found, key=lambda record: record.key)


def _beside(folder: Path) -> list[Record]:
    """A folder of pictures, each with a text file of its name; every line is a caption."""
    found, n_pictures = [], 0
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in PICTURES or path.name.startswith("."):
            continue
        n_pictures += 1
        beside = next((path.with_suffix(end) for end in _BESIDE if path.with_suffix(end).is_file()), None)
        if beside is not None:
            # A name need not be Unicode; a key is written down.
            key = os.fsencode(path.relative_to(folder).as_posix()).decode(errors="backslashreplace")
            found.append(Record(key, File(path)))
            found[-1].take(_captions(found[-1].key, beside))
    if not found:
        raise DataError(f"{folder}: {_nothing_in(folder, n_pictures)}")
    return found


def _captions(name: str, file: Path) -> Said:
    try:
        if file.stat().st_size > 1 << 20:
            return Said(name, refused="more than 1 MiB of text")
        found = [line for line in texts.lines(texts.decoded(file.read_bytes())) if line.strip()]
    except (OSError, UnicodeDecodeError):
        return Said(name, refused="a text file that is not UTF-8, or cannot be read")
    return Said(name, tuple(found or [""]))


def _nothing_in(folder: Path, n_pictures: int) -> str:
    parts = [name for name in ("train", "validation", "test") if _list_of(folder / name) not in (None, folder / name)]
    if parts:
        return f"its lists are in {', '.join(parts)}; name {folder / parts[0]} instead"
    return (
        f"it has none of {', '.join(_LISTS)}, no shards, and none of its {n_pictures} pictures has a text file beside it; "
        "of a list under another name, name the file"
    )


def _records(file: Path, rows: Iterable[Said], root: Path) -> list[Record]:
    found: dict[str, Record] = {}
    for row in rows:
        if row.name not in found:
            found[row.name] = Record(row.name, File(_below(root, row.name, file)))
        found[row.name].take(row)
    if not found:
        raise DataError(f"{file}: it has no picture with a caption or a question")
    return [found[name] for name in sorted(found)]


def _below(root: Path, name: str, file: Path) -> Path:
    """A list may come from anywhere; it shall not choose files beyond the folder that was named."""
    if "\0" in name or not texts.is_unicode(name):
        raise DataError(f"{file}: {name!r} can be no file's name")
    place, top = os.path.abspath(root / name), os.path.abspath(root)
    if os.path.commonpath([place, top]) != top:
        raise DataError(f"{file}: {name} is not in {root}; name the folder that holds all pictures with --images")
    return Path(os.path.normpath(root / name))


__all__ = ["PICTURES", "Question", "Record", "Said", "passed_over", "read", "weighted"]
