"""`transformers` timed stage by stage, as its users run it: image processor, tokenizer, `generate()`.

Hooks note when the vision model, the projection behind the Q-Former and each run of the language model return inside an ordinary
`generate()`. A stage ends there; what `generate()` does in between counts to the stage that follows, so that the stages add up to
the whole. Prefill thus begins with what prepares it and holds T5's encoder; a step is from logits to logits.
The image processor is the checkpoint's own class on Pillow, the one whose pixels the engine's equal.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
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

_SETS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512_f", "avx2")


@dataclass(frozen=True)
class Written:
    """Texts that were written in one batch. Times are milliseconds; stages add up to `total`, gaps lie between tokens."""

    texts: list[str]
    tokens: list[list[int]]
    stages: dict[str, float]
    gaps: list[float]  # none of beams, whose tokens settle together
    total: float

    @property
    def first_token(self) -> float:
        """From the beginning; of beams it is the end."""
        return sum(time for stage, time in self.stages.items() if stage != "decode") if self.gaps else self.total


class Peer:
    """One checkpoint in one precision on one device."""

    def __init__(self, folder: Path, dtype: str, n_threads: int, device: str = "cpu") -> None:
        began = time.perf_counter()
        torch.set_num_threads(n_threads)
        checkpoint = Checkpoint(folder)
        if checkpoint.config["model_type"] != "blip-2" or checkpoint.is_retrieval:
            raise CheckpointError(f"{folder}: BLIP-2 with a language model can be measured, this is another model")
        cfg = configuration.read(checkpoint)
        image = processor.image_facts(checkpoint.processor_folder, cfg.vision_config.image_size)
        self._prepare = pictures.preparation(checkpoint.processor_folder, image)
        self._tokenizer = tokenizers.load(checkpoint.tokenizer_folder)
        self._model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self._device = torch.device(device)
        self._model.to(self._device)
        self._images = [cfg.image_token_index] * cfg.num_query_tokens
        self._prompts = bundle.usual_prompts("blip-2", cfg.text_config.model_type)
        self._is_compiled, self._search = False, {"do_sample": False}
        self._returned: list[float] = []
        for module in (self._model.vision_model, self._model.language_projection, self._model.language_model):
            module.register_forward_hook(lambda *_: self._returned.append(self._now()))
        self._name, self._dtype, self._n_threads = folder.name, dtype, n_threads
        self._loading = time.perf_counter() - began

    @property
    def subject(self) -> dict[str, Any]:
        """As a report describes it, with what torch's own kernels are chosen for and what it sees that oneDNN may use."""
        seen = torch.cpu.get_capabilities()
        sets = " ".join(name for name in _SETS if seen.get(name))
        kernels = f" {torch.backends.cpu.get_cpu_capability()}{sets and f' ({sets})'}" * (self._device.type == "cpu")
        how = "compiled" if self._is_compiled else "eager"
        return {
            "engine": f"transformers {version('transformers')}",
            "model": self._name,
            "precisions": [(graph, self._dtype) for graph in ("vision", "qformer", "language")],
            "provider": f"{self._device}{kernels}, {how}",
            "runtime": f"torch {torch.__version__}",
            "threads": self._n_threads,
            "loading_s": self._loading,
        }

    def _now(self) -> float:
        """When the device is through with what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def compile(self) -> None:
        """`torch.compile` of what the hooks watch; the cache gets a fixed size, as without one every step has other shapes."""
        torch._dynamo.config.recompile_limit = 64  # a prefill and a step for every size of a batch
        for module in (self._model.vision_model, self._model.qformer, self._model.language_model):
            module.forward = torch.compile(module.forward)
        self._is_compiled, self._search = True, {"do_sample": False, "cache_implementation": "static"}

    def prompt(self, question: str | None) -> str:
        """As a bundle of this checkpoint has it."""
        return self._prompts["caption"] if question is None else self._prompts["ask"].format(question)

    def n_prompt_tokens(self, prompt: str) -> int:
        return len(self._tokenizer(prompt).input_ids)

    def first_past(self, prompt: str) -> int:
        """Positions before the first step: those of the prefill, of which an encoder leaves the decoder its start token."""
        is_encoder_decoder = self._model.config.text_config.is_encoder_decoder
        return 1 if is_encoder_decoder else len(self._images) + self.n_prompt_tokens(prompt)

    @property
    def most_positions(self) -> int | None:
        """Of the language model; none where positions are relative."""
        return getattr(self._model.config.text_config, "max_position_embeddings", None)

    @torch.inference_mode()
    def write(self, images: Sequence[bytes], prompts: Sequence[str], n_tokens: int, n_beams: int = 1) -> Written:
        """One text of exactly `n_tokens` for each encoded image, behind prompts of the same length."""
        began = time.perf_counter()
        decoded = [_decoded(image) for image in images]
        seen = time.perf_counter()
        pixels = torch.from_numpy(np.stack([self._prepare(picture) for picture in decoded])).to(self._device)
        ids = torch.tensor([self._images + self._tokenizer(prompt).input_ids for prompt in prompts]).to(self._device)
        prepared = time.perf_counter()
        self._returned.clear()
        rows = self._model.generate(
            pixel_values=pixels.to(self._model.dtype),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            num_beams=n_beams,
            **self._search,
        )
        tokens = rows[:, -n_tokens:].tolist()
        texts = [text.strip() for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        end = time.perf_counter()
        if len(self._returned) != 2 + n_tokens:
            raise RuntimeError(
                f"generate() ran the language model {len(self._returned) - 2} times for {n_tokens} tokens"
            )
        vision, projected, first, *_ = self._returned
        parts = _milliseconds([began, seen, prepared, vision, projected, first, end])
        names = ("decode_image", "preprocess", "vision", "qformer", "prefill", "decode")
        gaps = _milliseconds(self._returned[2:]) if n_beams == 1 else []
        return Written(texts, tokens, dict(zip(names, parts, strict=True)), gaps, (end - began) * 1e3)


def _decoded(image: bytes) -> Image.Image:
    """Opening alone decodes nothing."""
    picture = Image.open(io.BytesIO(image))
    picture.load()
    return picture


def _milliseconds(times: Sequence[float]) -> list[float]:
    return [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
