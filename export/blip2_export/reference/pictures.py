"""The pictures that goldens are recorded of, and what the reference's image processor makes of a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from blip2_export.read import processor
from blip2_export.read.checkpoint import CheckpointError

Prepare = Callable[[Image.Image], np.ndarray]


def drawn() -> list[Image.Image]:
    """One that is wider than high, one with transparency, one grey and higher than wide."""
    return [_drawn((256, 176), 1), _see_through(_drawn((200, 208), 2)), _drawn((150, 224), 3).convert("L")]


def _drawn(size: tuple[int, int], seed: int) -> Image.Image:
    """Slow waves under hard edges: resampling and every patch show in what a model makes of it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    waves = [128 + 100 * np.sin(x / rng.uniform(20, 60) + y / rng.uniform(20, 60) + phase) for phase in range(3)]
    picture = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for draw in (pen.ellipse, pen.rectangle, pen.ellipse):
        left, top, side = (int(rng.uniform(a, b) * min(size)) for a, b in ((0, 0.7), (0, 0.7), (0.2, 0.4)))
        draw((left, top, left + side, top + side), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return picture


def _see_through(picture: Image.Image) -> Image.Image:
    """Opaque at the bottom, vanishing towards the top."""
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


def preparation(folder: Path | None, image: dict[str, Any]) -> Prepare:
    """What makes [3, S, S] of a picture: the image processor of a folder, on Pillow; without one that of LAVIS."""
    if folder is None:
        return _lavis(image["size"])
    chosen = image["size"] if image.get("resize", "square") == "square" and not image.get("center_crop") else None
    made = processor.load(folder, chosen)
    return lambda picture: processor.pixels(made, picture)


def _lavis(side: int) -> Prepare:
    """Its `BlipImageEvalProcessor`, and the `convert("RGB")` that its examples open pictures with."""
    from torchvision import transforms

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    square = transforms.Resize((side, side), interpolation=transforms.InterpolationMode.BICUBIC)
    steps = transforms.Compose([square, transforms.ToTensor(), transforms.Normalize(mean, std)])
    return lambda picture: steps(picture.convert("RGB")).numpy()


def shown(prepare: Prepare, side: int) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """The drawn pictures with their pixels."""
    return (shown_as(prepare, picture, side) for picture in drawn())


def shown_as(prepare: Prepare, picture: Image.Image, side: int) -> tuple[Image.Image, np.ndarray]:
    """A picture in a mode and a shape that the reference's processor makes [3, S, S] of, and those pixels."""
    rgb = processor.over_white(picture)
    for form in (picture, rgb, rgb.resize((side, side))):
        try:
            pixels = prepare(form)
        except ValueError:  # it converts nothing to RGB
            continue
        if pixels.shape == (3, side, side):
            return form, pixels
    raise CheckpointError("the reference's image processor takes a picture in no form that pictures are shown to it in")
