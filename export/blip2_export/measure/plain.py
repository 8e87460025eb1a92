"""A checkpoint in `transformers` as its users run it: image processor and tokenizer before `generate()`, the tokenizer behind it.

The image processor is the checkpoint's own class on Pillow, the one whose pixels the engine's equal.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration

from blip2_export import bundle
from blip2_export.read import configuration, processor, tokenizers
from blip2_export.read.checkpoint import Checkpoint, CheckpointError
from blip2_export.reference import pictures


class Plain:
    """One checkpoint in one precision on one device."""

    def __init__(self, folder: Path, dtype: str, device: str = "cpu") -> None:
        checkpoint = opened(folder)
        cfg = configuration.read(checkpoint)
        image = processor.image_facts(checkpoint.processor_folder, cfg.vision_config.image_size)
        self._prepare = pictures.preparation(checkpoint.processor_folder, image)
        self.tokenizer = tokenizers.load(checkpoint.tokenizer_folder)
        self.model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.device = torch.device(device)
        self.model.to(self.device)
        self._images = [cfg.image_token_index] * cfg.num_query_tokens
        self._prompts = bundle.usual_prompts("blip-2", cfg.text_config.model_type)

    def prompt(self, question: str | None) -> str:
        """As a bundle of this checkpoint has it."""
        return self._prompts["caption"] if question is None else self._prompts["ask"].format(question)

    def n_prompt_tokens(self, prompt: str) -> int:
        return len(self.tokenizer(prompt).input_ids)

    @property
    def n_image_tokens(self) -> int:
        return len(self._images)

    def first_past(self, prompt: str) -> int:
        """Positions before the first step: those of the prefill, of which an encoder leaves the decoder its start token."""
        is_encoder_decoder = self.model.config.text_config.is_encoder_decoder
        return 1 if is_encoder_decoder else len(self._images) + self.n_prompt_tokens(prompt)

    @property
    def most_positions(self) -> int | None:
        """Of the language model; none where positions are relative."""
        return getattr(self.model.config.text_config, "max_position_embeddings", None)

    def inputs(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, Any]:
        """Those of `generate()`, of prompts of the same length."""
        pixels = torch.from_numpy(np.stack([self._prepare(image) for image in images])).to(self.device)
        ids = torch.tensor([self._images + self.tokenizer(prompt).input_ids for prompt in prompts]).to(self.device)
        return {
            "pixel_values": pixels.to(self.model.dtype),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }

    def texts(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def opened(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    if checkpoint.config["model_type"] != "blip-2" or checkpoint.is_retrieval:
        raise CheckpointError(f"{folder}: BLIP-2 with a language model can be measured, this is another model")
    return checkpoint


def decoded(image: bytes) -> Image.Image:
    """Opening alone decodes nothing."""
    picture = Image.open(io.BytesIO(image))
    picture.load()
    return picture
