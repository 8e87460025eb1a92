"""`transformers` timed stage by stage, as its users run it: image processor, tokenizer, `generate()`.

Hooks note when the vision model, the projection behind the Q-Former and each run of the language model return inside an ordinary
`generate()`. A stage ends there; what `generate()` does in between counts to the stage that follows, so that the stages add up to
the whole. Prefill thus begins with what prepares it and holds T5's encoder; a step is from logits to logits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from blip2_export.measure.plain import Plain, decoded

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


class Peer(Plain):
    """Told what its time goes into."""

    def __init__(self, folder: Path, dtype: str, n_threads: int, device: str = "cpu") -> None:
        began = time.perf_counter()
        torch.set_num_threads(n_threads)
        super().__init__(folder, dtype, device)
        self._is_compiled, self._search = False, {"do_sample": False}
        self._returned: list[float] = []
        for module in (self.model.vision_model, self.model.language_projection, self.model.language_model):
            module.register_forward_hook(lambda *_: self._returned.append(self._now()))
        self._name, self._dtype, self._n_threads = folder.name, dtype, n_threads
        self._loading = time.perf_counter() - began

    @property
    def subject(self) -> dict[str, Any]:
        """As a report describes it, with what torch's own kernels are chosen for and what it sees that oneDNN may use."""
        seen = torch.cpu.get_capabilities()
        sets = " ".join(name for name in _SETS if seen.get(name))
        kernels = f" {torch.backends.cpu.get_cpu_capability()}{sets and f' ({sets})'}" * (self.device.type == "cpu")
        how = "compiled" if self._is_compiled else "eager"
        return {
            "engine": f"transformers {version('transformers')}",
            "model": self._name,
            "precisions": [(graph, self._dtype) for graph in ("vision", "qformer", "language")],
            "provider": f"{self.device}{kernels}, {how}",
            "runtime": f"torch {torch.__version__}",
            "threads": self._n_threads,
            "loading_s": self._loading,
        }

    def _now(self) -> float:
        """When the device is through with what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def compile(self) -> None:
        """`torch.compile` of what the hooks watch; the cache gets a fixed size, as without one every step has other shapes."""
        torch._dynamo.config.recompile_limit = 64  # a prefill and a step for every size of a batch
        for module in (self.model.vision_model, self.model.qformer, self.model.language_model):
            module.forward = torch.compile(module.forward)
        self._is_compiled, self._search = True, {"do_sample": False, "cache_implementation": "static"}

    @torch.inference_mode()
    def write(self, images: Sequence[bytes], prompts: Sequence[str], n_tokens: int, n_beams: int = 1) -> Written:
        """One text of exactly `n_tokens` for each encoded image, behind prompts of the same length."""
        began = time.perf_counter()
        pictures = [decoded(image) for image in images]
        seen = time.perf_counter()
        inputs = self.inputs(pictures, prompts)
        prepared = time.perf_counter()
        self._returned.clear()
        rows = self.model.generate(
            **inputs,
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            num_beams=n_beams,
            **self._search,
        )
        tokens = rows[:, -n_tokens:].tolist()
        texts = self.texts(tokens)
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


def _milliseconds(times: Sequence[float]) -> list[float]:
    return [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
