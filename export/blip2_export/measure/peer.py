"""`transformers` timed stage by stage, as its users run it: image processor, tokenizer, `generate()`.

Hooks note when the vision model, the projection behind the Q-Former and each run of the language model return inside an ordinary
`generate()`. A stage ends there; what `generate()` does in between counts to the stage that follows, so that the stages add up to
the whole. Prefill thus begins with what prepares it and holds T5's encoder; a step is from logits to logits.
The image processor is the checkpoint's own class on Pillow, the one whose pixels the engine's equal.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration

from blip2_export.measure.samples import Samples
from blip2_export.measure.work import Work
from blip2_export.read import configuration, processor, tokenizers
from blip2_export.read.checkpoint import Checkpoint, CheckpointError
from blip2_export.reference import pictures

_SETS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512_f", "avx2")


@dataclass(frozen=True)
class Written:
    """Texts that were written in one batch, and the milliseconds of each part."""

    tokens: list[list[int]]
    preprocess: float
    vision: float
    qformer: float
    prefill: float
    steps: list[float]
    total: float  # from files to texts

    @property
    def tokens_per_second(self) -> float:
        """Of the language model alone."""
        return sum(map(len, self.tokens)) * 1e3 / (self.prefill + sum(self.steps))


class Peer:
    """One checkpoint. `written`: the tokens of every caption, by picture and search."""

    def __init__(self, folder: Path, dtype: str, n_threads: int, device: str = "cpu") -> None:
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
        self._search: dict[str, Any] = {"do_sample": False}
        self._returned: list[float] = []
        for module in (self._model.vision_model, self._model.language_projection, self._model.language_model):
            module.register_forward_hook(lambda *_: self._returned.append(self._now()))
        self.written: dict[str, list[int]] = {}

    def describe(self) -> dict[str, str]:
        """What torch's own kernels are chosen for, and what it sees that oneDNN may use."""
        seen = torch.cpu.get_capabilities()
        sets = " ".join(name for name in _SETS if seen.get(name))
        return {"instruction set, transformers": f"{torch.backends.cpu.get_cpu_capability()}{sets and f' ({sets})'}"}

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
        self._search["cache_implementation"] = "static"

    def n_prompt_tokens(self, prompt: str) -> int:
        return len(self._tokenizer(prompt).input_ids)

    def warm_up(self, work: Work) -> float:
        """Runs everything of a round once; gives the seconds that this takes, compiling included."""
        start = time.perf_counter()
        few = Work(work.images[:1], work.questions, work.n_tokens, work.n_beams, work.n_pictures)
        self.measure(few, 0)
        return time.perf_counter() - start

    def measure(self, work: Work, i: int) -> Samples:
        """The i-th round: every caption greedily, and of the i-th picture what takes longer."""
        image = work.images[i % len(work.images)]
        captions = [self._caption(work, path, 1) for path in work.images]
        beams = self._caption(work, image, work.n_beams)
        alone = [self.write([image], [prompt], work.n_tokens) for prompt in work.prompts[:2]]
        many = list(itertools.islice(itertools.cycle(work.images), len(work.prompts)))
        batch = self.write(work.batch, [""] * work.n_pictures, work.n_tokens)
        together = self.write(many, work.prompts, work.n_tokens)
        return {
            **{
                name: [getattr(one, name) for one in captions]
                for name in ("preprocess", "vision", "qformer", "prefill")
            },
            "step": [step for one in captions for step in one.steps],
            "caption": [one.total for one in captions],
            "beams": [beams.total],
            "batch": [batch.total],
            "alone": [one.tokens_per_second for one in alone],
            "together": [together.tokens_per_second],
        }

    def _caption(self, work: Work, image: Path, n_beams: int) -> Written:
        found = self.write([image], [""], work.n_tokens, n_beams)
        [self.written[f"{image}, {n_beams} beams"]] = found.tokens
        return found

    @torch.inference_mode()
    def write(self, images: Sequence[Path], prompts: Sequence[str], n_tokens: int, n_beams: int = 1) -> Written:
        """One text of exactly `n_tokens` for each image, behind prompts of the same length."""
        start = time.perf_counter()
        pixels = torch.from_numpy(np.stack([self._prepare(Image.open(path)) for path in images])).to(self._device)
        ids = torch.tensor([self._images + self._tokenizer(prompt).input_ids for prompt in prompts]).to(self._device)
        prepared = time.perf_counter()
        self._returned.clear()
        rows = self._model.generate(
            pixel_values=pixels,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            num_beams=n_beams,
            **self._search,
        )
        tokens = rows[:, -n_tokens:].tolist()
        self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        end = time.perf_counter()
        if len(self._returned) != 2 + n_tokens:
            raise RuntimeError(
                f"generate() ran the language model {len(self._returned) - 2} times for {n_tokens} tokens"
            )
        vision, qformer, prefill, *steps = _milliseconds([prepared, *self._returned])
        return Written(tokens, (prepared - start) * 1e3, vision, qformer, prefill, steps, (end - start) * 1e3)


def _milliseconds(times: Sequence[float]) -> list[float]:
    return [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
