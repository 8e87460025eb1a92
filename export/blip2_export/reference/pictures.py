"""The pictures that goldens are recorded of, and what the reference's image processor makes of a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw


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


def preprocess(picture: Any, image: dict[str, Any]) -> np.ndarray:
    """[3, S, S] by `transformers`' own image processor on PIL."""
    from transformers import BlipImageProcessorPil

    side = {"height": image["size"], "width": image["size"]}
    prepare = BlipImageProcessorPil(
        size=side,
        resample=getattr(Image.Resampling, image["resample"].upper()),
        image_mean=image["mean"],
        image_std=image["std"],
        rescale_factor=image["rescale"],
    )
    return np.asarray(prepare(images=picture, return_tensors="np")["pixel_values"][0], np.float32)
