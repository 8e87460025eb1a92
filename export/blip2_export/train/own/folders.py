"""What training leaves: ordinary folders of `transformers`, which the exporter takes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from blip2_export.graphs.vision import has_pre_layernorm
from blip2_export.train.own import lora, start
from blip2_export.train.own.base import Base
from blip2_export.train.own.lora import Adapter
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.stage2 import Stage2
from blip2_export.train.qformer import QFormer

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")
_PATCH_BIAS = "vision_model.embeddings.patch_embedding.bias"
SHARD_BYTES = 4 << 30
_MARK = "training.json"  # training wrote this folder, and may write it anew


def write_stage1(folder: Path, base: Base, model: QFormer, tokenizer: Any) -> None:
    """What `Blip2ForImageTextRetrieval` reads; beside it the head that writes (`cls.*`) and the temperature (`temp`)."""
    config = _config(base, model.cfg, model.n_queries, Blip2ForImageTextRetrieval)
    more = {"query_tokens": model.query_tokens, "cls.predictions.bias": model.head_bias, "temp": model.temperature}
    tensors = _tensors(base, ("vision_model.",), start.parts(model), more)
    _write(folder, base, config, tensors, (tokenizer,))


def write_stage2(folder: Path, base: Base, model: Stage2, question_tokenizer: Any | None = None) -> None:
    """What `Blip2ForConditionalGeneration` reads; with the tokenizer of questions, if its Q-Former reads any."""
    config = _config(base, model.qformer.config, model.query_tokens.shape[1], Blip2ForConditionalGeneration)
    modules: dict[str, nn.Module] = {"qformer": model.qformer, "language_projection": model.language_projection}
    kept = ["language_model."]
    if model.eye is None:
        kept.append("vision_model.")
    else:
        modules["vision_model"] = model.eye
        config.vision_config = model.eye.config
    if model.embeddings is not None:
        modules["embeddings"] = model.embeddings
    tensors = _tensors(base, tuple(kept), modules, {"query_tokens": model.query_tokens})
    _write(folder, base, config, tensors, (base.tokenizer(), question_tokenizer))


def write_adapter(folder: Path, base: Base, adapter: Adapter) -> None:
    """What `PeftModel.from_pretrained` puts on the base, and `convert` merges into it."""
    adapter.config.base_model_name_or_path = str(base.checkpoint.folder.resolve())
    with _aside(folder) as made:
        adapter.config.save_pretrained(made)
        save_file({name: value.contiguous() for name, value in adapter.tensors().items()}, made / lora.WEIGHTS)
        _mark(made, base)


def _config(base: Base, qformer: Any, n_queries: int, kind: type) -> Blip2Config:
    whole = {**base.config.to_dict(), "qformer_config": qformer.to_dict(), "num_query_tokens": n_queries}
    config = Blip2Config.from_dict(whole)
    config.architectures = [kind.__name__]
    return config


def _tensors(
    base: Base, kept: tuple[str, ...], modules: dict[str, Any], more: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """What is trained, of tied tensors only the first, in float32; then what is `kept` of the base, bit for bit as it is stored."""
    trained = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
        if f"{name}.{key}" not in _without(modules)
    } | more
    names = {value.data_ptr(): name for name, value in reversed(trained.items())}
    for name in names.values():
        yield name, trained[name].detach().cpu().contiguous().clone()
    for name in base.checkpoint.names():
        if name.startswith(kept):
            yield name, base.tensor(name)


def _without(modules: dict[str, Any]) -> set[str]:
    """What the reference's image encoder has and CLIP's has not: a bias under the patches, which stayed 0."""
    eye = modules.get("vision_model")
    return {_PATCH_BIAS} if eye is not None and has_pre_layernorm(eye.config) else set()


def check(folder: Path, others: Sequence[Path]) -> None:
    """Refuses a place that holds anything but what training wrote there before, or what training reads."""
    if any(folder.resolve() in (other.resolve(), *other.resolve().parents) for other in others):
        raise DataError(f"{folder}: --out would take the place of what is read; name another folder")
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _MARK).is_file()):
        raise DataError(f"{folder}: it exists, and training did not write it; name another --out, or remove it")


def _write(
    folder: Path, base: Base, config: Blip2Config, tensors: Iterable[tuple[str, Tensor]], tokenizers: Sequence[Any]
) -> None:
    """`tokenizers`: the model's, and that of questions."""
    with _aside(folder) as made:
        config.dtype = torch.float32
        config.save_pretrained(made)
        _write_shards(made, tensors)
        for tokenizer, place in zip(tokenizers, (made, made / "qformer_tokenizer"), strict=False):
            if tokenizer is not None:
                _write_tokenizer(tokenizer, place)
        _write_processor(made, base, config)
        _mark(made, base)


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Without the lengths that training last filled up and cut texts to, which its backend remembers."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder beside it that takes its place in the end, so that there is never half of one."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        # tokenizers has no exception of its own.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise DataError(
            f"{folder}: it cannot be written ({error}); the checkpoints in --work are as they were"
        ) from error


def _mark(folder: Path, base: Base) -> None:
    (folder / _MARK).write_text(json.dumps({"base": str(base.checkpoint.folder)}) + "\n")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """One file of weights, or several with their index; holds one of them in memory."""
    where, waiting, size = list[list[str]](), dict[str, Tensor](), 0

    def write() -> None:
        save_file(waiting, folder / f"part-{len(where)}", {"format": "pt"})
        where.append(list(waiting))

    for name, value in tensors:
        if waiting and size + value.nbytes > SHARD_BYTES:
            write()
            waiting, size = {}, 0
        waiting[name], size = value, size + value.nbytes
    write()
    n = len(where)
    names = [f"model-{i + 1:05}-of-{n:05}.safetensors" if n > 1 else "model.safetensors" for i in range(n)]
    for i, name in enumerate(names):
        os.replace(folder / f"part-{i}", folder / name)
    if n > 1:
        index = {tensor: name for name, tensors in zip(names, where, strict=True) for tensor in tensors}
        said = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(said + "\n")


def _write_processor(folder: Path, base: Base, config: Blip2Config) -> None:
    """The base's, for the size and the number of queries that the model has now. A LAVIS file has none; its pixels are known."""
    side, n_queries, source = config.vision_config.image_size, config.num_query_tokens, base.checkpoint.processor_folder
    if source is None:
        look = base.look(side)
        image = {"image_processor_type": "BlipImageProcessor", "size": {"height": side, "width": side}}
        more = {"resample": look.resample, "image_mean": list(look.mean), "image_std": list(look.std)}
        (folder / _PROCESSOR_FILES[0]).write_text(json.dumps({**image, **more}, indent=2) + "\n")
        return
    for name in _PROCESSOR_FILES:
        if (source / name).is_file():
            said = json.loads((source / name).read_text())
            if "num_query_tokens" in said:
                said["num_query_tokens"] = n_queries
            if side != base.config.vision_config.image_size:
                for part in (said, said.get("image_processor") or {}):
                    if "size" in part:
                        part["size"] = {"height": side, "width": side}
            (folder / name).write_text(json.dumps(said, indent=2) + "\n")
