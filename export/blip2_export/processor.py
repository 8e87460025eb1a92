"""What the checkpoint's processor files say: image preprocessing and the tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from blip2_export.checkpoint import CheckpointError, read_json

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


def image_facts(folder: Path, image_size: int) -> dict[str, Any]:
    """The `image` entry of `bundle.json`, from preprocessor_config.json or a nested processor_config.json."""
    config = _image_processor(folder)
    size = config.get("size", {"height": image_size, "width": image_size})
    side = {size} if isinstance(size, int) else set(size.values())
    if side != {image_size}:
        raise CheckpointError(
            f"{folder}: the processor resizes to {size}, the image encoder takes {image_size}×{image_size}"
        )
    resample = _FILTERS.get(config.get("resample", 3))
    if resample not in ("bicubic", "bilinear", "lanczos"):
        raise CheckpointError(
            f"{folder}: resample filter {config.get('resample')} is not supported; bicubic (3) is usual"
        )
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(step, True):
            raise CheckpointError(f"{folder}: the processor has {step} off, which is not supported")
    return {
        "size": image_size,
        "mean": list(config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        "std": list(config.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        "rescale": config.get("rescale_factor", 1 / 255),
        "resample": resample,
    }


def _image_processor(folder: Path) -> dict[str, Any]:
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        nested = read_json(folder / "processor_config.json").get("image_processor")
        if nested:
            return dict(nested)
    raise CheckpointError(f"{folder}: no preprocessor_config.json, nor image_processor in processor_config.json")


def write_tokenizer(folder: Path, out: Path) -> None:
    """`tokenizer.json`, copied, or made by `transformers` where only the slow tokenizer's files are there."""
    if (folder / "tokenizer.json").is_file():
        shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
        return
    if not (folder / "vocab.json").is_file():
        raise CheckpointError(f"{folder}: no tokenizer.json, nor vocab.json and merges.txt to make it from")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(out / "tokenizer.json"))
