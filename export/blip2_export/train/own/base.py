"""The models that training starts from: those of any checkpoint that can be converted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
)

from blip2_export.graphs import positions, vision
from blip2_export.read import configuration, processor, tokenizers
from blip2_export.read.adapter import open_folder
from blip2_export.read.checkpoint import Checkpoint, CheckpointError
from blip2_export.read.lavis import LavisCheckpoint, Parts
from blip2_export.reference.load import add_pre_layernorm, load
from blip2_export.train.own.pictures import Look
from blip2_export.train.own.sources import DataError

_FAMILIES = ("opt", "t5")
_FILTERS = {"bilinear": 2, "bicubic": 3, "lanczos": 1}


@dataclass
class Base:
    """A checkpoint's image encoder, and its language model if it has one; neither is trained unless somebody says so."""

    checkpoint: Checkpoint
    config: Any
    model: Any

    @property
    def vision(self) -> nn.Module:
        return self.model.vision_model

    @property
    def family(self) -> str:
        """`opt` or `t5`."""
        return str(self.config.text_config.model_type)

    @property
    def has_language(self) -> bool:
        return not self.checkpoint.is_retrieval

    def eye(self, side: int) -> Blip2VisionModel:
        """A copy of the image encoder that can be trained, for pictures of `side` × `side`: its positions are interpolated."""
        old = self.config.vision_config
        cfg = Blip2VisionConfig.from_dict({**old.to_dict(), "image_size": side})
        made = Blip2VisionModel(cfg)
        made.post_layernorm.eps = vision.post_layernorm_epsilon(old)
        is_clip = vision.has_pre_layernorm(old)
        if is_clip:
            add_pre_layernorm(made)
        state = self.vision.state_dict()
        if side != old.image_size:
            name = "embeddings.position_embedding"
            table = state[name].float().numpy()
            state[name] = torch.from_numpy(positions.resize(table, side // cfg.patch_size, align_corners=is_clip))
        made.load_state_dict(state)
        made.requires_grad_(True)
        # CLIP's patches have no bias; the reference's have one, which stays 0.
        made.embeddings.patch_embedding.bias.requires_grad_(not is_clip)
        return made

    def look(self, side: int) -> Look:
        """How this checkpoint's processor makes pixels, at another size if wanted."""
        where = self.checkpoint.folder
        try:
            resized = side != self.config.vision_config.image_size
            facts = processor.image_facts(self.checkpoint.processor_folder, side, resized)
        except CheckpointError as error:
            raise DataError(str(error)) from error
        if facts.get("center_crop") or "resize" in facts:
            raise DataError(f"{where}: its processor crops pictures or keeps their size; training squashes them")
        if abs(facts["rescale"] - 1 / 255) > 1e-9:
            raise DataError(f"{where}: its processor scales pictures by {facts['rescale']}, not by 1/255")
        return Look(side, tuple(facts["mean"]), tuple(facts["std"]), _FILTERS[facts["resample"]])

    def qformer_config(self, n_words: int) -> Blip2QFormerConfig:
        """Of a Q-Former that reads texts of a vocabulary of `n_words`."""
        shape = self.config.qformer_config.to_dict()
        return Blip2QFormerConfig(**{**shape, "vocab_size": n_words, "use_qformer_text_input": True})

    def tokenizer(self) -> Any:
        """The language model's."""
        return tokenizers.load(self.checkpoint.tokenizer_folder)

    def tensor(self, name: str) -> Tensor:
        """As it is stored, in its own precision."""
        value = self.checkpoint.tensor(name)
        if value.dtype.name == "bfloat16":
            return torch.from_numpy(value.view("int16").copy()).view(torch.bfloat16)
        return torch.from_numpy(value.copy())


def open_base(folder: Path, parts: Parts | None = None) -> Base:
    """Opens a folder of `transformers` or a LAVIS file with its `parts` as the exporter does, in float32."""
    try:
        checkpoint = open_checkpoint(folder, parts)
        _check_family(checkpoint)
        config = configuration.read(checkpoint)
        kind = Blip2ForImageTextRetrieval if checkpoint.is_retrieval else Blip2ForConditionalGeneration
        model = load(checkpoint, kind, config.vision_config.image_size)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    return Base(checkpoint, config, model.requires_grad_(False).eval())


def open_checkpoint(folder: Path, parts: Parts | None = None) -> Checkpoint:
    """A folder, with the adapter that lies in it, or a LAVIS file."""
    if folder.is_file():
        return LavisCheckpoint(folder, parts or Parts())
    return open_folder(folder)


def _check_family(checkpoint: Checkpoint) -> None:
    """Before anything large is read."""
    config, where = checkpoint.config, checkpoint.folder
    if config["model_type"] != "blip-2":
        raise DataError(f"{where}: training goes around BLIP-2, this is {config['model_type']}")
    language = (config.get("text_config") or {}).get("model_type", "opt")
    if not checkpoint.is_retrieval and language not in _FAMILIES:
        raise DataError(f"{where}: training goes around OPT and Flan-T5, its language model is {language}")
