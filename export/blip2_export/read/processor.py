"""What the checkpoint's processor files say: image preprocessing and the tokenizer."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from blip2_export.read.checkpoint import CheckpointError, read_json

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers
_PIECES = ("spiece.model", "tokenizer.model")
_SLOW_FILES = (("vocab.json", "merges.txt"), ("vocab.txt",))
QUESTION_FOLDER = "qformer_tokenizer"
_QUESTION_TOKENIZER = "qformer_tokenizer.json"
_QUESTIONS: dict[str, dict[str, Any]] = {  # as LAVIS' `blip2_t5_instruct.py` and `blip2.py` cut them
    "instructblip": {"max_tokens": 128, "truncation_side": "left", "reads": "prompt"},
    "blip-2": {"max_tokens": 32, "truncation_side": "right", "reads": "question"},
}


def image_facts(folder: Path | None, image_size: int, resized: bool = False) -> dict[str, Any]:
    """The `image` entry of `bundle.json`, from processor_config.json or preprocessor_config.json.

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
        "alpha": "drop" if folder is None else "white",
        "mean": list(config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        "std": list(config.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        "rescale": config.get("rescale_factor", 1 / 255),
        "resample": resample,
    }


def _image_processor(folder: Path) -> dict[str, Any]:
    """As the reference reads it: nested into processor_config.json, or else a file of its own."""
    if (folder / "processor_config.json").is_file():
        nested = read_json(folder / "processor_config.json").get("image_processor")
        if nested:
            return dict(nested)
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    raise CheckpointError(f"{folder}: no preprocessor_config.json, nor image_processor in processor_config.json")


def read_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, or made by `transformers` where only a slow tokenizer's files are there."""
    fast = _has_fast_tokenizer(folder)
    pieces = next((name for name in _PIECES if (folder / name).is_file()), None)
    if not fast and pieces and find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{folder}: no tokenizer.json; to make it from {pieces}, `pip install sentencepiece` beside transformers"
        )
    if not fast and not pieces and not any(all((folder / n).is_file() for n in names) for names in _SLOW_FILES):
        raise CheckpointError(
            f"{folder}: no tokenizer.json, nor vocab.json and merges.txt or vocab.txt to make it from"
        )
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json")) if fast else _converted(folder)
    except Exception as error:  # the tokenizers package raises nothing narrower
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({reason})") from error


def _converted(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer, BertTokenizer

    kind = BertTokenizer if (folder / "vocab.txt").is_file() else AutoTokenizer
    return kind.from_pretrained(folder).backend_tokenizer


def write_tokenizer(folder: Path, path: Path, vocab_size: int) -> None:
    """Writes `path`, without the added tokens that lie behind the `vocab_size` rows of the embedding table."""
    tokenizer = read_tokenizer(folder)
    if max(tokenizer.get_vocab(with_added_tokens=False).values(), default=0) >= vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer writes more tokens than the {vocab_size} that have an embedding"
        )
    if max(tokenizer.get_vocab().values(), default=0) >= vocab_size:
        embedded(tokenizer, vocab_size).save(str(path))
    elif _has_fast_tokenizer(folder):
        shutil.copyfile(folder / "tokenizer.json", path)
    else:
        tokenizer.save(str(path))


def embedded(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Without the added tokens from id `vocab_size` on."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    return Tokenizer.from_str(json.dumps(content))


def image_token(folder: Path) -> int:
    """Id of `<image>`. A tokenizer without it gets it behind its last token, as the reference's processor does."""
    tokenizer = read_tokenizer(folder)
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    return tokenizer.token_to_id("<image>")


def _has_fast_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def question_facts(folder: Path, out: Path, cfg: Any, kind: str) -> dict[str, Any]:
    """The `qformer.text` entry of `bundle.json`, beside the Q-Former's tokenizer in `out`."""
    source, own = folder / QUESTION_FOLDER, {}
    if not source.is_dir():
        raise CheckpointError(
            f"{folder}: the Q-Former reads questions, but its tokenizer folder {QUESTION_FOLDER} is missing"
        )
    write_tokenizer(source, out / _QUESTION_TOKENIZER, cfg.vocab_size)
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
