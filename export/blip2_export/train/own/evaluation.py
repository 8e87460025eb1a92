"""How good a bundle is on pictures that were held out, asked through the engine as a user would ask it."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip2_export.scenes.held_out import Engine
from blip2_export.train.own.answers import accuracy
from blip2_export.train.own.captions import clean
from blip2_export.train.own.records import Question, Record
from blip2_export.train.own.scores import Caption, scores
from blip2_export.train.own.sources import File, Source

_BLOCK = 8  # pictures that are matched with the texts of all of them


@dataclass(frozen=True)
class Shown:
    """A picture as a file, and what is said or asked about it."""

    path: str
    captions: list[str]
    questions: list[Question]


def evaluate(engine: Engine, held_out: Sequence[Record], most: int, written: Path) -> dict[str, float]:
    """Figures of the tasks that the bundle has, on so many pictures at most. What it writes goes to `written`, a row a text."""
    tasks = json.loads((engine.bundle / "bundle.json").read_text())["tasks"]
    with _files(held_out[:most]) as shown:
        found: dict[str, float] = {"pictures": len(shown)}
        captioned = [one for one in shown if one.captions]
        rows: list[dict[str, Any]] = []
        if "embed" in tasks and len(captioned) > 1:
            found |= _recalls(engine, captioned)
        if "match" in tasks and len(captioned) > 1:
            found |= _matches(engine, captioned)
        if "caption" in tasks and captioned:
            found |= _written(engine, captioned, rows)
        if "ask" in tasks and any(one.questions for one in shown):
            found |= _answered(engine, shown, rows)
    written.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return found


def _recalls(engine: Engine, shown: Sequence[Shown]) -> dict[str, float]:
    """Recall at 1 by ITC among all of them, each with its first caption; two pictures with the same caption are both right."""
    texts = [one.captions[0] for one in shown]
    pictures = engine.vectors("image", *(one.path for one in shown))
    cosines = np.einsum("td,pqd->tpq", engine.vectors("text", *texts), pictures).max(2)
    true = np.array([[text in one.captions for one in shown] for text in texts])
    rows = np.arange(len(shown))
    return {
        "images_recalled_at_1": float(true[rows, cosines.argmax(1)].mean()),
        "texts_recalled_at_1": float(true[cosines.argmax(0), rows].mean()),
    }


def _matches(engine: Engine, shown: Sequence[Shown]) -> dict[str, float]:
    """How many true and how many false pairs ITM decides right, and the mean of both."""
    right: dict[bool, list[bool]] = {True: [], False: []}
    blocks = [shown[first : first + _BLOCK] for first in range(0, len(shown), _BLOCK)]
    texts = [list(dict.fromkeys(one.captions[0] for one in block)) for block in blocks for _ in block]
    pairs = [(one.path, of) for one, of in zip(shown, texts, strict=True)]
    for one, rows in zip(shown, engine.pairs("match", "text", pairs), strict=True):
        for row in rows:
            is_true = row["text"] in one.captions
            right[is_true].append((row["itm_probability"] >= 0.5) == is_true)
    shares = [float(np.mean(decided)) for decided in right.values() if decided]
    return {"itm_right": float(np.mean(shares)), "itm_pairs": float(sum(map(len, right.values())))}


def _written(engine: Engine, shown: Sequence[Shown], rows: list[dict[str, Any]]) -> dict[str, float]:
    """BLEU-4, CIDEr-D, and how much captions share with the nearest of those that people gave: F1 of their words."""
    found = engine.rows("caption", *(one.path for one in shown))
    shares = []
    for one, row in zip(shown, found, strict=True):
        shares.append(max(overlap(clean(row["text"]), caption) for caption in one.captions))
        rows.append({"picture": one.path, "written": row["text"], "captions": one.captions})
    told = scores([Caption(row["text"], one.captions) for one, row in zip(shown, found, strict=True)])
    return {**told, "caption_words_f1": float(np.mean(shares))}


def _answered(engine: Engine, shown: Sequence[Shown], rows: list[dict[str, Any]]) -> dict[str, float]:
    """The accuracy of VQAv2."""
    scores = []
    asked = [{question.text: question for question in one.questions} for one in shown]
    answered = engine.pairs("ask", "question", [(one.path, list(of)) for one, of in zip(shown, asked, strict=True)])
    for one, of, given in zip(shown, asked, answered, strict=True):
        for row in given:
            question = of[row["question"]]
            scores.append(accuracy(row["text"], question.given))
            answers = dict(question.answers)
            rows.append({"picture": one.path, "question": question.text, "written": row["text"], "answers": answers})
    return {"answers_right": float(np.mean(scores)), "questions": float(len(scores))}


def overlap(one: str, other: str) -> float:
    """F1 of the words of two texts, each as often as it stands there."""
    left, right = one.split(), other.split()
    common = sum(min(left.count(word), right.count(word)) for word in set(left))
    return 2 * common / (len(left) + len(right)) if common else 0.0


@contextmanager
def _files(records: Sequence[Record]) -> Iterator[list[Shown]]:
    """Pictures that can be read, as files; captions as they were learnt."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for record in records:
            try:
                data = record.source.read()
                Image.open(io.BytesIO(data)).load()
            except Exception:  # Pillow raises what its decoders raise; training has told of it
                continue
            path = _as_file(record.source, data, Path(folder) / f"{len(found)}")
            captions = [clean(caption) for caption in record.captions]
            found.append(Shown(path, captions, record.questions))
        yield found


def _as_file(source: Source, data: bytes, aside: Path) -> str:
    """Its own file where a line of JSON can name it, a copy elsewhere."""
    if isinstance(source, File):
        with suppress(UnicodeEncodeError):
            str(source.path).encode()
            return str(source.path)
    aside.write_bytes(data)
    return str(aside)
