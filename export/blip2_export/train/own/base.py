"""The models that training starts from: those of any checkpoint that can be converted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, Blip2QFormerConfig

from blip2_export.read import configuration, processor, tokenizers
from blip2_export.read.adapter import open_folder
from blip2_export.read.checkpoint import Checkpoint, CheckpointError
from blip2_export.reference.load import load
from blip2_export.train.own.pictures import Look
from blip2_export.train.own.sources import DataError

_FAMILIES = ("opt", "t5")


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

    def look(self, side: int) -> Look:
        """How this checkpoint's processor makes pixels, at another size if wanted."""
        facts = processor.image_facts(self.checkpoint.folder, side, side != self.config.vision_config.image_size)
        if facts.get("crop"):
            raise DataError(f"{self.checkpoint.folder}: its processor crops pictures; training squashes them")
        if abs(facts["rescale"] - 1 / 255) > 1e-9:
            raise DataError(
                f"{self.checkpoint.folder}: its processor scales pictures by {facts['rescale']}, not by 1/255"
            )
        filters = {"bilinear": 2, "bicubic": 3, "lanczos": 1}
        return Look(side, tuple(facts["mean"]), tuple(facts["std"]), filters[facts["resample"]])

    def qformer_config(self, n_words: int) -> Blip2QFormerConfig:
        """Of a Q-Former that reads texts of a vocabulary of `n_words`."""
        shape = self.config.qformer_config.to_dict()
        return Blip2QFormerConfig(**{**shape, "vocab_size": n_words, "use_qformer_text_input": True})

    def tokenizer(self) -> Any:
        """The language model's."""
        return tokenizers.load(self.checkpoint.folder)


def open_base(folder: Path) -> Base:
    """Opens a folder of `transformers` or a LAVIS file as the exporter does, in float32."""
    try:
        checkpoint = open_folder(folder)
        config = configuration.read(checkpoint)
        kind = Blip2ForImageTextRetrieval if checkpoint.is_retrieval else Blip2ForConditionalGeneration
        model = load(checkpoint, kind, config.vision_config.image_size)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    if not checkpoint.is_retrieval and config.text_config.model_type not in _FAMILIES:
        raise DataError(
            f"{folder}: training goes around OPT and Flan-T5, its language model is {config.text_config.model_type}"
        )
    return Base(checkpoint, config, model.requires_grad_(False).eval())
