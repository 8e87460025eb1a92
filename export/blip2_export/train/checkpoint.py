"""Writes a trained model as an ordinary Hugging Face BLIP-2 folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2VisionModel,
    PreTrainedTokenizerFast,
)

from blip2_export.train.qformer import QFormer
from blip2_export.train.stage2 import Stage2
from blip2_export.train.vision import MEAN, STD


def write_opt(folder: Path, vision: Blip2VisionModel, stage2: Stage2, tokenizer: PreTrainedTokenizerFast) -> None:
    """config.json, model.safetensors (float16), tokenizer and processor configs, as `Blip2Processor` reads them."""
    language = stage2.texts.model
    config = Blip2Config(
        vision_config=vision.config.to_dict(),
        qformer_config=stage2.qformer.config.to_dict(),
        text_config=language.config.to_dict(),
        num_query_tokens=stage2.query_tokens.shape[1],
        image_text_hidden_size=64,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    model.vision_model.load_state_dict(vision.state_dict())
    model.qformer.load_state_dict(stage2.qformer.state_dict())
    model.language_projection.load_state_dict(stage2.language_projection.state_dict())
    model.language_model.load_state_dict(language.state_dict())
    with torch.no_grad():
        model.query_tokens.copy_(stage2.query_tokens)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_processor(folder, vision.config.image_size, stage2.query_tokens.shape[1])


def write_stage1(folder: Path, vision: Blip2VisionModel, stage1: QFormer, tokenizer: PreTrainedTokenizerFast) -> None:
    """What `Blip2ForImageTextRetrieval` reads, and beside it what that class has no place for: the head that writes (`cls.*`)
    and the temperature (`temp`)."""
    config = Blip2Config(
        vision_config=vision.config.to_dict(),
        qformer_config=stage1.cfg.to_dict(),
        num_query_tokens=stage1.n_queries,
        image_text_hidden_size=stage1.vision_projection.out_features,
    )
    model = Blip2ForImageTextRetrieval(config)
    model.vision_model.load_state_dict(vision.state_dict())
    for name in ("qformer", "embeddings", "vision_projection", "text_projection", "itm_head"):
        getattr(model, name).load_state_dict(getattr(stage1, name).state_dict())
    with torch.no_grad():
        model.query_tokens.copy_(stage1.query_tokens)
    dense, norm, head = stage1.transform[0], stage1.transform[2], "cls.predictions."
    extra = {
        **{f"{head}transform.dense.{k}": v for k, v in dense.state_dict().items()},
        **{f"{head}transform.LayerNorm.{k}": v for k, v in norm.state_dict().items()},
        f"{head}bias": stage1.head_bias,
        "temp": stage1.temperature,
    }
    model.to(torch.float16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: value.detach().to(torch.float16).contiguous() for name, value in extra.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    _write_processor(folder, vision.config.image_size, stage1.n_queries)


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
