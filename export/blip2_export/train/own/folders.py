"""What training leaves: ordinary folders of `transformers`, which the exporter takes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from blip2_export.train.own import start
from blip2_export.train.own.base import Base
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.stage2 import Stage2
from blip2_export.train.qformer import QFormer

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")
_MARK = "training.json"  # training wrote this folder, and may write it anew


def write_stage1(folder: Path, base: Base, model: QFormer, tokenizer: Any) -> None:
    """What `Blip2ForImageTextRetrieval` reads; beside it the head that writes (`cls.*`) and the temperature (`temp`)."""
    config = _config(base, model.cfg, model.n_queries, Blip2ForImageTextRetrieval)
    more = {"query_tokens": model.query_tokens, "cls.predictions.bias": model.head_bias, "temp": model.temperature}
    _write(folder, base, config, _tensors({"vision_model": base.vision, **start.parts(model)}, more), (tokenizer,))


def write_stage2(folder: Path, base: Base, model: Stage2, question_tokenizer: Any | None = None) -> None:
    """What `Blip2ForConditionalGeneration` reads; with the tokenizer of questions, if its Q-Former reads any."""
    config = _config(base, model.qformer.config, model.query_tokens.shape[1], Blip2ForConditionalGeneration)
    modules: dict[str, nn.Module] = {
        "vision_model": model.eye if model.eye is not None else base.vision,
        "qformer": model.qformer,
        "language_projection": model.language_projection,
        "language_model": model.language.model,
    }
    if model.embeddings is not None:
        modules["embeddings"] = model.embeddings
    config.vision_config = modules["vision_model"].config
    tokenizers = (base.tokenizer(), question_tokenizer)
    _write(folder, base, config, _tensors(modules, {"query_tokens": model.query_tokens}), tokenizers)


def _config(base: Base, qformer: Any, n_queries: int, kind: type) -> Blip2Config:
    whole = {**base.config.to_dict(), "qformer_config": qformer.to_dict(), "num_query_tokens": n_queries}
    config = Blip2Config.from_dict(whole)
    config.architectures = [kind.__name__]
    return config


def _tensors(modules: dict[str, nn.Module], more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of tied tensors only the first."""
    named = {
        f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()
    } | more
    names = {value.data_ptr(): name for name, value in reversed(named.items())}
    return {name: named[name].detach().cpu().contiguous().clone() for name in names.values()}


def check(folder: Path, others: Sequence[Path]) -> None:
    """Refuses a place that holds anything but what training wrote there before, or what training reads."""
    if any(folder.resolve() in (other.resolve(), *other.resolve().parents) for other in others):
        raise DataError(f"{folder}: --out would take the place of what is read; name another folder")
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _MARK).is_file()):
        raise DataError(f"{folder}: it exists, and training did not write it; name another --out, or remove it")


def _write(
    folder: Path, base: Base, config: Blip2Config, tensors: dict[str, Tensor], tokenizers: Sequence[Any]
) -> None:
    """Beside the folder first, so that there is never half of one. `tokenizers`: the model's, and that of questions."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        config.dtype = torch.float32
        config.save_pretrained(aside)
        save_file(tensors, aside / "model.safetensors", {"format": "pt"})
        tokenizers[0].save_pretrained(aside)
        for questions in tokenizers[1:]:
            if questions is not None:
                questions.save_pretrained(aside / "qformer_tokenizer")
        _write_processor(aside, base, config)
        (aside / _MARK).write_text(json.dumps({"base": str(base.checkpoint.folder)}) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(
            f"{folder}: it cannot be written ({error}); the checkpoints in --work are as they were"
        ) from error


def _write_processor(folder: Path, base: Base, config: Blip2Config) -> None:
    """The base's, for the size and the number of queries that the model has now."""
    side, n_queries = config.vision_config.image_size, config.num_query_tokens
    for name in _PROCESSOR_FILES:
        file = base.checkpoint.folder / name
        if file.is_file():
            said = json.loads(file.read_text())
            if "num_query_tokens" in said:
                said["num_query_tokens"] = n_queries
            if side != base.config.vision_config.image_size:
                for part in (said, said.get("image_processor") or {}):
                    if "size" in part:
                        part["size"] = {"height": side, "width": side}
            (folder / name).write_text(json.dumps(said, indent=2) + "\n")
