"""Rows of the files that captions and questions come in."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip2_export.train.own import texts
from blip2_export.train.own.sources import DataError

_TEXTS = ("caption", "captions", "text", "texts", "sentences", "comment", "raw")
_NAMES = ("image", "file_name", "filename", "image_name", "path", "picture")
_ENTRY = re.compile(r"^(?P<name>[^\t#]+)#\d+\t(?P<caption>.*)$")
# Karpathy's parts: `restval` are pictures of COCO's validation that everybody trains on.
_PARTS = {"train": "train", "restval": "train", "val": "val", "validation": "val", "test": "test"}
_LONGEST_FIELD = 1 << 24


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


@dataclass(frozen=True)
class Said:
    """One row: the picture's name, and captions, as they are, or a question with its answers, or why it was refused."""

    name: str
    captions: tuple[object, ...] = ()
    question: Question | None = None
    part: str = ""
    refused: str = ""


def rows(file: Path, answers: Path | None = None) -> Iterator[Said]:
    """All rows of a file; `answers`: VQAv2's annotations to its questions."""
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file}: only {', '.join(_READERS)} files and .tar shards are read")
    try:
        if answers is not None:
            yield from _vqa(_json(file), _json(answers))
        else:
            yield from reader(file)
    except DataError:
        raise
    except csv.Error as error:
        raise DataError(f"{file}: not valid CSV ({error})") from error
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise DataError(f"{file}: a row is in none of the forms that are known ({error!r})") from error


def row(where: str, found: Any, name: str | None = None) -> Said:
    """Of an object that names a picture, unless its name is known, and says or asks something."""
    if not isinstance(found, dict):
        raise DataError(f"{where}: a row is {str(found)[:80]}, not an object that names a picture")
    name = name or next((found[key] for key in _NAMES if found.get(key)), None)
    if not isinstance(name, str):
        raise DataError(f"{where}: a row names no picture under any of {', '.join(_NAMES)}: {str(found)[:120]}")
    part = _PARTS.get(str(found.get("split", "")), "")
    if "question" in found:
        return _asked(name, found["question"], found.get("answers", found.get("answer")), part)
    said = next((found[key] for key in _TEXTS if key in found), ())
    if said == ():
        raise DataError(f"{where}: the row of {name} has no {', '.join(_TEXTS)} and no question")
    each = said if isinstance(said, list) else _listed(said)
    return Said(name, tuple(text.get("raw") if isinstance(text, dict) else text for text in each), part=part)


def _listed(said: object) -> list[Any]:
    """One text, or the list that Flickr30k's table has in a field."""
    if isinstance(said, str) and said.startswith('["') and said.endswith('"]'):
        try:
            return list(json.loads(said))
        except ValueError:
            pass
    return [said]


def weighted(answers: list[str]) -> tuple[tuple[str, float], ...]:
    """Distinct answers by their share, as LAVIS weighs them in the loss: an answer of 3 people of 10 counts 0.3."""
    known = [answer.strip() for answer in answers if answer.strip()]
    if not known:
        raise DataError("a question has no answer")
    return tuple((answer, known.count(answer) / len(known)) for answer in dict.fromkeys(known))


def _asked(name: str, question: object, answers: object, part: str = "") -> Said:
    each = answers if isinstance(answers, list) else [answers]
    found = [answer.get("answer") if isinstance(answer, dict) else answer for answer in each]
    if why := texts.why_not(question):
        return Said(name, part=part, refused=f"a question that is {why}")
    good = [str(answer) for answer in found if isinstance(answer, str) and answer.strip() and not _odd(answer)]
    if not good:
        return Said(name, part=part, refused="a question without an answer")
    return Said(name, question=Question(str(question).strip(), weighted(good), len(good)), part=part)


def _odd(answer: str) -> bool:
    return len(answer) > texts.LONGEST or not texts.is_unicode(answer)


def _of_json(file: Path) -> Iterator[Said]:
    data = _json(file)
    if isinstance(data, list):
        yield from (row(str(file), found) for found in data)
    elif "annotations" in data and "images" in data:
        yield from _coco(file, data)
    elif "images" in data:
        yield from (_karpathy(str(file), image) for image in data["images"])
    elif "questions" in data:
        yield from _vqa(data, _json(_annotations(file)))
    else:
        raise DataError(f"{file}: neither COCO captions, VQAv2 questions, Karpathy's form nor a list of rows")


def _coco(file: Path, data: dict[str, Any]) -> Iterator[Said]:
    names: dict[Any, str] = {}
    for image in data["images"]:
        if not isinstance(image["file_name"], str):
            raise DataError(f"{file}: the picture with the id {image['id']} has no name")
        if names.setdefault(image["id"], image["file_name"]) != image["file_name"]:
            raise DataError(f"{file}: two pictures have the id {image['id']}")
    for note in data["annotations"]:
        if "caption" not in note:
            raise DataError(f"{file}: its annotations have no caption; COCO's captions are in captions_*.json")
        if note["image_id"] not in names:
            yield Said(f"id {note['image_id']}", refused="of a picture that the file does not name")
        else:
            yield Said(names[note["image_id"]], (note["caption"],))


def _karpathy(where: str, image: dict[str, Any]) -> Said:
    name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
    return row(where, image, name)


def _of_json_lines(file: Path) -> Iterator[Said]:
    for number, line in enumerate(texts.lines(texts.of_file(file)), 1):
        if line.strip():
            where = f"{file}: line {number}"
            yield row(where, texts.parsed(line, where))


def _of_csv(file: Path) -> Iterator[Said]:
    text = texts.of_file(file)
    header = text.partition("\n")[0]
    delimiter = max("|,\t;", key=header.count)
    # Flickr30k's `results.csv` does not quote; a caption may hold a quotation mark.
    quoting = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    csv.field_size_limit(_LONGEST_FIELD)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, quoting=quoting)
    for found in table:
        named = {(key or "").strip(): value for key, value in found.items()}
        made = row(f"{file}: line {table.line_num}", named)
        # A separator within a text that is not quoted: what is left of it would be learnt as if it were all.
        is_cut = any(field.strip() for field in found.get(None) or ())  # type: ignore[call-overload]
        yield replace(made, captions=(), question=None, refused="in a row of too many fields") if is_cut else made


def _of_text(file: Path) -> Iterator[Said]:
    """Flickr30k's `NAME#N<TAB>CAPTION`, or CSV under another name."""
    lines = texts.lines(texts.of_file(file))
    if not _ENTRY.match(lines[0]):
        yield from _of_csv(file)
        return
    for number, line in enumerate(lines, 1):
        if (found := _ENTRY.match(line)) is not None:
            yield Said(found["name"], (found["caption"],))
        elif line.strip():
            raise DataError(f"{file}: line {number} is not NAME#N, a tab and a caption")


def _annotations(questions: Path) -> Path:
    """VQAv2's answers beside its questions."""
    name = questions.name.replace("questions", "annotations")
    for found in (name.replace("OpenEnded_", ""), name):
        if found != questions.name and questions.with_name(found).is_file():
            return questions.with_name(found)
    raise DataError(f"{questions}: these are questions alone; name their answers with --answers")


def _vqa(questions: Any, annotations: Any) -> Iterator[Said]:
    """VQAv2: the picture's name follows from its id and from the part of COCO that the file is about."""
    part = str(questions.get("data_subtype", ""))
    prefix = f"COCO_{part}_" if part.endswith(("2014", "2015")) else ""
    answers = {note["question_id"]: note["answers"] for note in annotations["annotations"]}
    for asked in questions["questions"]:
        name = f"{prefix}{int(asked['image_id']):012}.jpg"
        yield _asked(name, asked["question"], answers.get(asked["question_id"]))


def _json(file: Path) -> Any:
    found = texts.parsed(texts.of_file(file), str(file))
    if not isinstance(found, dict | list):
        raise DataError(f"{file}: it holds {str(found)[:40]}, neither an object nor a list")
    return found


_READERS: dict[str, Callable[[Path], Iterator[Said]]] = {
    ".json": _of_json,
    ".jsonl": _of_json_lines,
    ".csv": _of_csv,
    ".tsv": _of_csv,
    ".token": _of_text,
    ".txt": _of_text,
}
