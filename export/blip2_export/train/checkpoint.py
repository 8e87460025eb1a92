"""Writes a trained model as an ordinary Hugging Face BLIP-2 folder, in float16, or small with matrices of 8 bits (`grid`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2VisionModel,
    PreTrainedTokenizerFast,
)

from blip2_export.graphs.grid import round_to_grid
from blip2_export.train.qformer import QFormer
from blip2_export.train.stage2 import Stage2
from blip2_export.train.vision import MEAN, STD
from blip2_export.train.vqa import Vqa

_STAGE1_PARTS = ("qformer", "embeddings", "vision_projection", "text_projection", "itm_head")


@dataclass(frozen=True)
class _Weights:
    """Modules by the start of their names, and further tensors. `small`: with matrices of 8 bits."""

    parts: dict[str, nn.Module]
    more: dict[str, Tensor]
    small: bool


def write_stage2(
    folder: Path,
    vision: Blip2VisionModel,
    model: Stage2,
    tokenizer: PreTrainedTokenizerFast,
    small: bool = False,
) -> None:
    """What `Blip2ForConditionalGeneration` and `Blip2Processor` read."""
    _write(folder, _language_config(vision, model, tokenizer), _language_weights(vision, model, small), tokenizer)


def write_vqa(
    folder: Path, model: Vqa, tokenizer: PreTrainedTokenizerFast, question_tokenizer: PreTrainedTokenizerFast
) -> None:
    """As a small `write_stage2`, with the embeddings and the tokenizer of the question that the Q-Former reads."""
    weights = _language_weights(model.vision, model, small=True)
    weights.parts["embeddings"] = model.embeddings
    _write(folder, _language_config(model.vision, model, tokenizer), weights, tokenizer)
    question_tokenizer.save_pretrained(folder / "qformer_tokenizer")


def write_stage1(folder: Path, vision: Blip2VisionModel, stage1: QFormer, tokenizer: PreTrainedTokenizerFast) -> None:
    """What `Blip2ForImageTextRetrieval` reads, and beside it what that class has no place for: the head that writes (`cls.*`)
    and the temperature (`temp`)."""
    config = Blip2Config(
        vision_config=vision.config.to_dict(),
        qformer_config=stage1.cfg.to_dict(),
        num_query_tokens=stage1.n_queries,
        image_text_hidden_size=stage1.vision_projection.out_features,
    )
    config.architectures = [Blip2ForImageTextRetrieval.__name__]
    dense, norm, head = stage1.transform[0], stage1.transform[2], "cls.predictions."
    parts = {
        "vision_model": vision,
        **{name: getattr(stage1, name) for name in _STAGE1_PARTS},
        f"{head}transform.dense": dense,
        f"{head}transform.LayerNorm": norm,
    }
    more = {"query_tokens": stage1.query_tokens, f"{head}bias": stage1.head_bias, "temp": stage1.temperature}
    _write(folder, config, _Weights(parts, more, small=True), tokenizer)


def _language_weights(vision: Blip2VisionModel, model: Stage2 | Vqa, small: bool) -> _Weights:
    parts = {
        "vision_model": vision,
        "qformer": model.qformer,
        "language_projection": model.language_projection,
        "language_model": model.texts.model,
    }
    return _Weights(parts, {"query_tokens": model.query_tokens}, small)


def _language_config(vision: Blip2VisionModel, model: Stage2 | Vqa, tokenizer: PreTrainedTokenizerFast) -> Blip2Config:
    config = Blip2Config(
        vision_config=vision.config.to_dict(),
        qformer_config=model.qformer.config.to_dict(),
        text_config=model.texts.model.config.to_dict(),
        num_query_tokens=model.query_tokens.shape[1],
        image_text_hidden_size=64,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    config.architectures = [Blip2ForConditionalGeneration.__name__]
    return config


def _write(folder: Path, config: Blip2Config, weights: _Weights, tokenizer: PreTrainedTokenizerFast) -> None:
    """config.json, model.safetensors, tokenizer and processor configs."""
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = torch.float32 if weights.small else torch.float16
    config.save_pretrained(folder)
    save_file(_stored(weights), folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    _write_processor(folder, config.vision_config.image_size, config.num_query_tokens)


def _stored(weights: _Weights) -> dict[str, Tensor]:
    """In float16, but if `small`, matrices that are no tables in float32 on the grid. Of tied tensors only the first is stored."""
    parts = weights.parts
    tensors = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()} | weights.more
    names = {value.data_ptr(): name for name, value in reversed(tensors.items())}
    modules = [module for part in parts.values() for module in part.modules()]
    matrices = {m.weight.data_ptr() for m in modules if isinstance(m, (nn.Linear, nn.Conv2d))}
    matrices -= {m.weight.data_ptr() for m in modules if isinstance(m, nn.Embedding)}

    def rounded(value: Tensor) -> Tensor:
        if weights.small and value.data_ptr() in matrices:
            return torch.from_numpy(round_to_grid(value.detach().numpy()))
        return value.detach().to(torch.float16)

    return {name: rounded(tensors[name]).clone() for name in names.values()}


def _write_processor(folder: Path, side: int, n_queries: int) -> None:
    image_processor = {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**image_processor, "processor_class": "Blip2Processor"}, indent=2)
    )
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Blip2Processor", "num_query_tokens": n_queries}, indent=2)
    )
