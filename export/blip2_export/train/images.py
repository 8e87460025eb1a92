"""Image–caption pairs of real data: a folder or a JSON file in COCO form, read lazily."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from blip2_export.train.vision import pixels


class DataError(ValueError):
    """The data cannot be used; the message says what to mend."""


@dataclass
class PixelPairs:
    """Pixels [batch, 3, side, side], one caption each, and which captions belong to which pictures."""

    pixels: Tensor
    captions: list[str]
    true: Tensor


class CaptionedImages:
    """Pictures with their captions.

    `source` is one of: a COCO captions file (`images` and `annotations`), a Karpathy-style list of `{"image", "caption"}`
    rows (`caption` a string or a list), or a folder that holds `annotations.json` or `captions.json` of either form.
    Paths are relative to `root`, by default the JSON file's folder.
    """

    def __init__(self, source: Path, root: Path | None = None) -> None:
        file = _annotations(source)
        rows = _rows(file)
        self.root = root or file.parent
        self.items = [(self.root / name, captions) for name, captions in sorted(rows.items()) if captions]
        if not self.items:
            raise DataError(f"{file}: no picture with a caption")
        missing = [p for p, _ in self.items if not p.exists()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self.items)} pictures are not there, the first is {missing[0]}; set --images"
            )

    def batch(self, step: int, size: int, side: int) -> PixelPairs:
        """The batch of a step: a pure function of it."""
        rng = random.Random(f"pairs {step}")
        chosen = [rng.randrange(len(self.items)) for _ in range(size)]
        picture = np.stack([load(self.items[i][0], side) for i in chosen])
        captions = [clean(rng.choice(self.items[i][1])) for i in chosen]
        same = torch.tensor(chosen)[:, None] == torch.tensor(chosen)[None]
        return PixelPairs(torch.from_numpy(picture), captions, same)


def load(path: Path, side: int) -> np.ndarray:
    """A picture file as the processor sees it: [3, side, side], normalised."""
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return pixels(np.asarray(picture))


def clean(caption: str) -> str:
    """LAVIS' caption form: lower case, punctuation to spaces, at most 50 words."""
    table = str.maketrans({c: " " for c in '.!"()*#:;~'})
    return " ".join(caption.lower().translate(table).split()[:50])


def _annotations(source: Path) -> Path:
    if source.is_file():
        return source
    for name in ("annotations.json", "captions.json"):
        if (source / name).is_file():
            return source / name
    raise DataError(f"{source}: expected a JSON file, or a folder with annotations.json or captions.json")


def _rows(file: Path) -> dict[str, list[str]]:
    try:
        data = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error
    rows: dict[str, list[str]] = {}
    try:
        if isinstance(data, dict):
            names = {image["id"]: image["file_name"] for image in data["images"]}
            for note in data["annotations"]:
                rows.setdefault(names[note["image_id"]], []).append(note["caption"])
        else:
            for row in data:
                said = row["caption"]
                rows.setdefault(row["image"], []).extend([said] if isinstance(said, str) else said)
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: neither COCO captions nor a list of image–caption rows ({error!r})") from error
    return rows
