"""Pictures, each with a text and a question: those that precisions are calibrated on, and others that their loss is measured on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blip2_export.read.checkpoint import CheckpointError
from blip2_export.read.processor import over_white
from blip2_export.scenes import drawing

N_DRAWN = 16
_SEEDS = {False: "calibration", True: "held out"}
_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_TEXTS = "captions.txt"  # lines of `NAME: text`
_HELD_OUT = 4  # of given pictures in the order of their names, every fourth is kept for measuring
_SIDE = 256


@dataclass(frozen=True)
class Sample:
    """`text` may be said of the picture, `question` asked about it."""

    picture: Image.Image
    text: str
    question: str


def samples(folder: Path | None, held_out: bool) -> list[Sample]:
    """Of a folder, or drawn. Whether or not they are `held_out`, the others are never among them."""
    if folder is None:
        return _drawn(held_out)
    given = _given(folder)
    kept = [sample for i, sample in enumerate(given) if (i % _HELD_OUT == _HELD_OUT - 1) == held_out]
    return kept or _drawn(held_out)


def _drawn(held_out: bool) -> list[Sample]:
    rng = random.Random(_SEEDS[held_out])
    scenes = [drawing.sample_scene(rng) for _ in range(N_DRAWN)]
    return [Sample(drawing.draw(s, _SIDE), drawing.caption(s, rng), drawing.question(s, rng)[1]) for s in scenes]


def _given(folder: Path) -> list[Sample]:
    """Pictures without a text of their own get that of a drawn scene, and so do all questions."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; --calibration takes one with pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    if not paths:
        raise CheckpointError(f"{folder}: no pictures ({', '.join(_ENDINGS)}) to calibrate on")
    texts, others = _texts(folder), _drawn(held_out=False)
    found = []
    for i, path in enumerate(paths):
        other = others[i % len(others)]
        found.append(Sample(_open(path), _text(path) or texts.get(path.name, other.text), other.question))
    return found


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return over_white(picture)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise CheckpointError(f"{path}: not a picture that can be read ({error}); remove it from the folder") from error


def _text(path: Path) -> str:
    own = path.with_suffix(".txt")
    return _read(own).strip() if own.is_file() else ""


def _texts(folder: Path) -> dict[str, str]:
    path = folder / _TEXTS
    lines = _read(path).splitlines() if path.is_file() else []
    parts = (line.partition(":") for line in lines)
    return {name.strip(): text.strip() for name, _, text in parts if text.strip()}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error.reason})") from error
