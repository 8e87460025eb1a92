"""What the checkpoint's image processor does to a picture: asked of the reference's own class, not read from its settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip2_export.read.checkpoint import CheckpointError, read_json
from blip2_export.read.guarded import in_one_sentence

_FILTERS = ("bicubic", "bilinear", "lanczos")
_FILES = ("processor_config.json", "preprocessor_config.json")
_LARGEST = 4096  # the engine's
_TRANSFORMERS = "5.23"  # as requirements.txt has it: others may make other pixels
_LAVIS = {  # of its `BlipImageEvalProcessor`
    "alpha": "drop",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "rescale": 1 / 255,
    "resample": "bicubic",
}


def image_facts(folder: Path | None, image_size: int, resized: bool = False) -> dict[str, Any]:
    """The `image` entry of `bundle.json`; without a `folder` the preprocessing of LAVIS.

    `resized`: `image_size` is chosen by the caller, whatever the processor says.
    """
    if not 1 <= image_size <= _LARGEST:
        raise CheckpointError(f"image size {image_size}: sizes from 1 to {_LARGEST} are possible")
    if folder is None:
        return {"size": image_size, **_LAVIS}
    made = load(folder, image_size if resized else None)
    facts = _Settings(folder, made, image_size).facts()
    with in_one_sentence(f"{folder}: the reference's image processor fails on a picture{_unpinned()}"):
        same = all(_equal(pixels(made, picture), _told(picture, facts)) for picture in _probes(made, facts))
    if not same:
        kind = type(made).__name__
        raise CheckpointError(
            f"{folder}: its image processor ({kind}) makes other pixels than resizing, cropping and normalising would; "
            f"it is not supported{_unpinned()}"
        )
    return facts


def _unpinned() -> str:
    """What may be to blame instead of the checkpoint."""
    found = version("transformers")
    if found.split(".")[:2] == _TRANSFORMERS.split("."):
        return ""
    return f"; transformers {found} is installed, export/requirements.txt pins {_TRANSFORMERS}"


def check_queries(folder: Path | None, n_queries: int) -> None:
    """The reference's processor, where it knows their number, puts as many image tokens before a text."""
    path = folder / _FILES[0] if folder else None
    said = read_json(path).get("num_query_tokens") if path and path.is_file() else None
    if said is not None and said != n_queries:
        raise CheckpointError(f"{path}: num_query_tokens is {str(said)[:40]}, config.json says {n_queries}")


def load(folder: Path, side: int | None = None) -> Any:
    """The image processor as the reference loads it, on Pillow. `side`: it makes squares of that size instead of its own."""
    there = [name for name in _FILES if (folder / name).is_file()]
    if not any(name == _FILES[1] or read_json(folder / name).get("image_processor") for name in there):
        raise CheckpointError(f"{folder}: no preprocessor_config.json, nor image_processor in processor_config.json")
    for name in there:
        read_json(folder / name)
    with in_one_sentence(f"{folder}: the reference makes no image processor of {' and '.join(there)}{_unpinned()}"):
        from transformers import AutoImageProcessor
        from transformers.image_processing_backends import PilBackend
        from transformers.image_utils import SizeDict

        made = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, local_files_only=True)
    if not isinstance(made, PilBackend):
        raise CheckpointError(f"{folder}: {type(made).__name__} is no image processor that runs on Pillow")
    if side is not None:
        if not made.do_resize or made.do_center_crop:
            raise CheckpointError(
                f"{folder}: its pictures are cropped or not resized, so --image-size cannot choose a size"
            )
        made.size = SizeDict(height=side, width=side)
    return made


def pixels(made: Any, picture: Image.Image) -> np.ndarray:
    """[channels, height, width] of one picture."""
    return np.asarray(made(images=picture, return_tensors="np")["pixel_values"][0], np.float32)


class _Settings:
    """The attributes of an image processor, checked."""

    def __init__(self, folder: Path, made: Any, side: int) -> None:
        self.folder, self.made, self.side = folder, made, side

    def facts(self) -> dict[str, Any]:
        made = self.made
        resize, crop = self._resize(), bool(made.do_center_crop)
        if crop:
            self._check_square("crops to", made.crop_size)
        elif resize not in ("square", "keep", {"shortest_edge": self.side}):
            raise self._refusal(f"resizes to {dict(made.size)}, the image encoder takes {self.side}×{self.side}")
        if made.do_pad and made.pad_size is not None:
            self._check_square("pads to", made.pad_size)
        usual = {"resize": resize} if resize != "square" else {}
        return {
            "size": self.side,
            "alpha": "white",
            **usual,
            **({"center_crop": True} if crop else {}),
            "mean": self._channels("image_mean", made.image_mean) if made.do_normalize else [0.0] * 3,
            "std": self._channels("image_std", made.image_std) if made.do_normalize else [1.0] * 3,
            "rescale": self._number("rescale_factor", made.rescale_factor) if made.do_rescale else 1.0,
            "resample": self._filter() if made.do_resize else _FILTERS[0],
        }

    def _resize(self) -> Any:
        """In the order of precedence of the reference's `resize`."""
        if not self.made.do_resize:
            return "keep"
        size = {name: value for name, value in dict(self.made.size or {}).items() if value}
        if size.keys() not in ({"height", "width"}, {"shortest_edge"}):
            raise self._refusal(f"resizes to {size}; height and width, or shortest_edge, are supported")
        for name, value in size.items():
            if type(value) is not int or not 1 <= value <= _LARGEST:
                raise self._refusal(f"resizes to {name} {value}; whole numbers from 1 to {_LARGEST} are possible")
        if "shortest_edge" in size:
            return {"shortest_edge": size["shortest_edge"]}
        square = size["height"] == size["width"] == self.side
        return "square" if square else {"exact": {"width": size["width"], "height": size["height"]}}

    def _check_square(self, does: str, size: Any) -> None:
        size = dict(size or {})
        if (size.get("height"), size.get("width")) != (self.side, self.side):
            raise self._refusal(f"{does} {size}, the image encoder takes {self.side}×{self.side}")

    def _filter(self) -> str:
        number = self.made.resample
        name = Image.Resampling(number).name.lower() if number in range(len(Image.Resampling)) else ""
        if type(number) is bool or isinstance(number, float) or name not in _FILTERS:
            raise self._refusal(
                f"resamples with {name or number}; bicubic (3), bilinear (2) and lanczos (1) are supported"
            )
        return name

    def _channels(self, name: str, value: Any) -> list[float]:
        found = [self._number(name, v) for v in (value if isinstance(value, tuple | list) else [value] * 3)]
        if len(found) != 3 or (name == "image_std" and min(found) <= 0):
            raise self._refusal(f"has {name} {value}; three numbers{' above 0' * (name == 'image_std')} are needed")
        return found

    def _number(self, name: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < np.finfo(np.float32).max or math.isnan(value):
            raise self._refusal(f"has {value} in {name}, which is no number that pixels can be computed with")
        return value

    def _refusal(self, said: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: the processor {said}")


def _probes(made: Any, facts: dict[str, Any]) -> Iterable[Image.Image]:
    """Noise in every shape and mode that the processor takes."""
    side = facts["size"]
    any_shape = facts.get("resize", "square") == "square" or "center_crop" in facts
    sizes = ((side // 2 + 7, side // 3 + 5), (61, 97), (side + 31, side // 2 + 3)) if any_shape else ()
    rng = np.random.default_rng(0)
    for width, height in ((side, side), *sizes):
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8))
        yield from (noise.convert("RGB"), *((noise, noise.convert("L")) if made.do_convert_rgb else ()))


def _told(picture: Image.Image, facts: dict[str, Any]) -> np.ndarray:
    """What the engine makes of a picture that it is told of by `facts`."""
    side, picture = facts["size"], over_white(picture)
    match facts.get("resize", "square"):
        case "square":
            size = (side, side)
        case {"exact": {"width": width, "height": height}}:
            size = (width, height)
        case {"shortest_edge": edge}:
            width, height = picture.size
            size = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
        case _:
            size = picture.size
    picture = picture.resize(size, Image.Resampling[facts["resample"].upper()]) if size != picture.size else picture
    if facts.get("center_crop"):
        left, top = ((length - side) // 2 for length in size)
        picture = picture.crop((left, top, left + side, top + side))
    scaled = (np.asarray(picture, np.float64) * facts["rescale"]).astype(np.float32)
    return ((scaled - np.float32(facts["mean"])) / np.float32(facts["std"])).transpose(2, 0, 1)


def over_white(picture: Image.Image) -> Image.Image:
    """In RGB, what is transparent over white."""
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _equal(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.shape == wanted.shape and bool(np.isfinite(found).all()) and np.allclose(found, wanted, 1e-6, 1e-6)
