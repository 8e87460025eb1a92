"""What data says: pictures with captions or questions, in the forms that people have them in."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2_export.train.own import shards
from blip2_export.train.own.sources import DataError, File, Source

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_TEXTS = ("caption", "captions", "text", "texts", "sentences", "comment")
_NAMES = ("image", "file_name", "filename", "image_name", "path", "picture")
_FOLDER_FILES = ("metadata.jsonl", "metadata.csv", "annotations.json", "captions.json", "captions.txt", "captions.csv")
_ENTRY = re.compile(r"^(?P<name>[^\t#]+)#\d+\t(?P<caption>.*)$")


@dataclass(frozen=True)
class Question:
    """A question and its answers, each with its weight; weights sum up to 1. `people`: how many answered."""

    text: str
    answers: tuple[tuple[str, float], ...]
    people: int = 1

    @property
    def given(self) -> list[str]:
        """The answer of each of them."""
        return [answer for answer, weight in self.answers for _ in range(round(weight * self.people))]


@dataclass
class Record:
    """A picture and what is said or asked about it. `key` names it, and decides on which side of a split it is."""

    key: str
    source: Source
    captions: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


@dataclass(frozen=True)
class Said:
    """One row: the picture's name, and captions or a question with its answers."""

    name: str
    captions: tuple[str, ...] = ()
    question: Question | None = None


def read(data: Path, images: Path | None = None, answers: Path | None = None) -> list[Record]:
    """The records of a file, a folder or shards, ordered by key.

    `data` is one of: a COCO captions file, VQAv2's questions (with `answers`, its annotations), Karpathy's or any other JSON list, JSON Lines
    or CSV of rows that name a picture and its captions or its question and answers, Flickr30k's `.token` file, a folder that has one of
    these, a folder of pictures with a text file beside each, or WebDataset shards (`a.tar`, `a-{000..099}.tar`).
    Names of pictures start from `images`, by default the file's folder.
    """
    if shards.are_meant(data):
        return shards.read(data)
    if not data.exists():
        raise DataError(f"{data}: there is no such file or folder")
    file = _file_of(data) if data.is_dir() else data
    if file is None:
        return _beside(data)
    rows = _rows(file, answers)
    return _records(file, rows, images or file.parent)


def _file_of(folder: Path) -> Path | None:
    return next((folder / name for name in _FOLDER_FILES if (folder / name).is_file()), None)


def _beside(folder: Path) -> list[Record]:
    """A folder of pictures, each with a text file of its name; every line is a caption."""
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    found = []
    for path in pictures:
        texts = path.with_suffix(".txt")
        if texts.is_file():
            lines = _text(texts).splitlines()
            found.append(
                Record(path.relative_to(folder).as_posix(), File(path), [line for line in lines if line.strip()])
            )
    if not found:
        names = ", ".join(_FOLDER_FILES)
        raise DataError(f"{folder}: it has none of {names}, and no picture with a text file of its name beside it")
    return found


def _records(file: Path, rows: Iterable[Said], root: Path) -> list[Record]:
    found: dict[str, Record] = {}
    for row in rows:
        record = found.setdefault(row.name, Record(row.name, File(root / row.name)))
        record.captions.extend(row.captions)
        if row.question:
            record.questions.append(row.question)
    if not found:
        raise DataError(f"{file}: it has no picture with a caption or a question")
    return [found[name] for name in sorted(found)]


def _rows(file: Path, answers: Path | None) -> Iterator[Said]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file}: only {', '.join(_READERS)} files and .tar shards are read")
    try:
        if answers is not None:
            yield from _vqa(_json(file), _json(answers))
        else:
            yield from reader(file)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: a row is in none of the forms that are known ({error!r})") from error


def _of_json(file: Path) -> Iterator[Said]:
    data = _json(file)
    if isinstance(data, list):
        yield from _each(file, data)
    elif "annotations" in data and "images" in data:
        names = {image["id"]: image["file_name"] for image in data["images"]}
        for note in data["annotations"]:
            yield Said(names[note["image_id"]], (_checked(file, note["caption"]),))
    elif "images" in data:
        yield from _karpathy(file, data["images"])
    elif "questions" in data:
        raise DataError(f"{file}: these are questions alone; name their answers with --answers")
    else:
        raise DataError(f"{file}: neither COCO captions, VQAv2 questions, Karpathy's form nor a list of rows")


def _karpathy(file: Path, images: list[Any]) -> Iterator[Said]:
    for image in images:
        name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
        yield Said(name, tuple(_checked(file, sentence["raw"]) for sentence in image["sentences"]))


def _of_json_lines(file: Path) -> Iterator[Said]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}: line {number} is not valid JSON ({error})") from error
            yield from _each(file, [row])


def _of_csv(file: Path) -> Iterator[Said]:
    text = _text(file)
    header = text.splitlines()[0] if text else ""
    delimiter = max("|,\t;", key=header.count)
    rows = csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    trimmed = ({(key or "").strip(): value for key, value in row.items()} for row in rows)
    yield from _each(file, trimmed)


def _of_text(file: Path) -> Iterator[Said]:
    """Flickr30k's `NAME#N<TAB>CAPTION`, or CSV under another name."""
    lines = _text(file).splitlines()
    if lines and not _ENTRY.match(lines[0]):
        yield from _of_csv(file)
        return
    for number, line in enumerate(lines, 1):
        if not (found := _ENTRY.match(line)):
            raise DataError(f"{file}: line {number} is not NAME#N, a tab and a caption")
        yield Said(found["name"], (found["caption"],))


def _each(file: Path, rows: Iterable[dict[str, Any]]) -> Iterator[Said]:
    for row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{file}: a row is {row!r}, not an object that names a picture")
        name = next((row[key] for key in _NAMES if row.get(key)), None)
        if not isinstance(name, str):
            raise DataError(f"{file}: a row names no picture under any of {', '.join(_NAMES)}: {str(row)[:120]}")
        if "question" in row:
            yield Said(name, question=_question(file, row))
            continue
        said = next((row[key] for key in _TEXTS if key in row), None)
        if said is None:
            raise DataError(f"{file}: the row of {name} has no {', '.join(_TEXTS)} and no question")
        yield Said(name, tuple(_checked(file, text) for text in (said if isinstance(said, list) else [said])))


def _question(file: Path, row: dict[str, Any]) -> Question:
    given = row.get("answers", row.get("answer"))
    answers = given if isinstance(given, list) else [given]
    texts = [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]
    return _asked(_checked(file, row["question"]), [_checked(file, text) for text in texts])


def _vqa(questions: Any, annotations: Any) -> Iterator[Said]:
    """VQAv2: the picture's name follows from its id and from the part of COCO that the file is about."""
    part = questions.get("data_subtype")
    answers = {note["question_id"]: [a["answer"] for a in note["answers"]] for note in annotations["annotations"]}
    for asked in questions["questions"]:
        number = int(asked["image_id"])
        name = f"COCO_{part}_{number:012}.jpg" if part else f"{number:012}.jpg"
        yield Said(name, question=_asked(asked["question"], answers[asked["question_id"]]))


def _asked(text: str, answers: list[str]) -> Question:
    return Question(text, weighted(answers), sum(bool(answer.strip()) for answer in answers))


def weighted(answers: list[str]) -> tuple[tuple[str, float], ...]:
    """Distinct answers by their share, as LAVIS weighs them in the loss: an answer of 3 people of 10 counts 0.3."""
    known = [answer.strip() for answer in answers if answer.strip()]
    if not known:
        raise DataError("a question has no answer")
    return tuple((answer, known.count(answer) / len(known)) for answer in dict.fromkeys(known))


def _checked(file: Path, text: Any) -> str:
    if not isinstance(text, str):
        raise DataError(f"{file}: a text is {text!r}, not a string")
    return text


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: it cannot be read ({error})") from error


_READERS: dict[str, Callable[[Path], Iterator[Said]]] = {
    ".json": _of_json,
    ".jsonl": _of_json_lines,
    ".csv": _of_csv,
    ".token": _of_text,
    ".txt": _of_text,
}
