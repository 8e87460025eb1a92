"""What the checkpoint's processor files say: image preprocessing and the tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from blip2_export.checkpoint import CheckpointError, read_json

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers
_SLOW_FILES = ("vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")
QUESTION_FOLDER = "qformer_tokenizer"
_QUESTION_TOKENIZER = "qformer_tokenizer.json"
_QUESTIONS: dict[str, dict[str, Any]] = {  # as LAVIS' `blip2_t5_instruct.py` and `blip2.py` cut them
    "instructblip": {"max_tokens": 128, "truncation_side": "left", "reads": "prompt"},
    "blip-2": {"max_tokens": 32, "truncation_side": "right", "reads": "question"},
}


def image_facts(folder: Path | None, image_size: int, resized: bool = False) -> dict[str, Any]:
    """The `image` entry of `bundle.json`, from preprocessor_config.json or a nested processor_config.json.

    No `folder`: the preprocessing of the reference. `resized`: `image_size` is chosen, whatever those files say.
    """
    config = _image_processor(folder) if folder else {}
    size = {"height": image_size, "width": image_size} if resized else config.get("size", image_size)
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


def write_tokenizer(folder: Path, path: Path) -> None:
    """Copies tokenizer.json to `path`; `transformers` makes it where only the slow tokenizer's files are there."""
    if (folder / "tokenizer.json").is_file():
        shutil.copyfile(folder / "tokenizer.json", path)
        return
    tokenizer(folder).save(str(path))


def tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, or from the slow tokenizer's files by `transformers`."""
    if (folder / "tokenizer.json").is_file():
        try:
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more precise
            raise CheckpointError(f"{folder / 'tokenizer.json'}: not a tokenizer ({error})") from error
    if not any((folder / name).is_file() for name in _SLOW_FILES):
        raise CheckpointError(f"{folder}: no tokenizer.json, nor {', '.join(_SLOW_FILES)} to make it from")
    from transformers import AutoTokenizer, BertTokenizer

    kind = BertTokenizer if (folder / "vocab.txt").is_file() else AutoTokenizer
    return kind.from_pretrained(folder).backend_tokenizer


def question_facts(folder: Path, out: Path, cfg: Any, kind: str) -> dict[str, Any]:
    """The `qformer.text` entry of `bundle.json`, beside the Q-Former's tokenizer in `out`."""
    source, own = folder / QUESTION_FOLDER, {}
    if not source.is_dir():
        raise CheckpointError(
            f"{folder}: the Q-Former reads questions, but its tokenizer folder {QUESTION_FOLDER} is missing"
        )
    write_tokenizer(source, out / _QUESTION_TOKENIZER)
    if (source / "tokenizer_config.json").is_file():
        own = read_json(source / "tokenizer_config.json")
    usual = _QUESTIONS[kind]
    return {
        "tokenizer": _QUESTION_TOKENIZER,
        "max_tokens": min(usual["max_tokens"], cfg.max_position_embeddings),
        "max_positions": cfg.max_position_embeddings,
        "pad": cfg.pad_token_id,
        "truncation_side": own.get("truncation_side", usual["truncation_side"]),
        "reads": usual["reads"],
    }
