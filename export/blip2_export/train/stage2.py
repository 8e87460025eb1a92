"""Stage 2: projected queries in front of a frozen language model, LM loss (Li et al. 2023, section 3.3)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Blip2QFormerModel

from blip2_export import scenes
from blip2_export.train.features import SceneFeatures
from blip2_export.train.loop import Phase, fit
from blip2_export.train.qformer import QFormer
from blip2_export.train.speaker import Speaker


class Stage2(nn.Module):
    """What stage 2 trains (query-only Q-Former, query tokens, projection) around the frozen language model.

    `texts`: the language model with its loss, `language.Texts` or `seq2seq.Texts`.
    """

    def __init__(self, stage1: QFormer, texts: Any) -> None:
        super().__init__()
        self.qformer = query_only(stage1.qformer)
        self.query_tokens = nn.Parameter(stage1.query_tokens.detach().clone())
        self.language_projection = nn.Linear(stage1.cfg.hidden_size, texts.width)
        self.texts = texts.requires_grad_(False)
        nn.init.normal_(self.language_projection.weight, 0, 0.02)
        nn.init.zeros_(self.language_projection.bias)

    def prefix(self, features: Tensor) -> Tensor:
        """Soft prompt [batch, n_queries, width of the language model's embeddings]."""
        tokens = self.query_tokens.expand(len(features), -1, -1)
        hidden = self.qformer(query_embeds=tokens, encoder_hidden_states=features).last_hidden_state
        return self.language_projection(hidden)

    def losses(self, batch: tuple[Tensor, Any]) -> dict[str, Tensor]:
        features, texts = batch
        losses: dict[str, Tensor] = self.texts.losses(self.prefix(features), texts)
        return losses


def query_only(qformer: Blip2QFormerModel) -> Blip2QFormerModel:
    """A copy without the text feed-forward layers: stage 2 gives the Q-Former no text."""
    cfg = type(qformer.config).from_dict({**qformer.config.to_dict(), "use_qformer_text_input": False})
    copy = Blip2QFormerModel(cfg)
    copy.load_state_dict({k: v for k, v in qformer.state_dict().items() if k in copy.state_dict()})
    return copy


def scene_batches(
    data: SceneFeatures, speaker: Speaker, size: int, n_captions: int, n_questions: int
) -> Callable[[int], Any]:
    """Captions, a report and questions of `size` scenes a step."""

    def make(step: int) -> tuple[Tensor, Any]:
        rng = random.Random(f"stage 2 {step}")
        indices = [rng.randrange(data.count) for _ in range(size)]
        texts = [speaker.texts_of(data.scene(i), rng, n_captions, n_questions, True) for i in indices]
        return data.features(indices), speaker.pack(texts)

    return make


def train(
    phase: Phase, model: Stage2, batches: Callable[[int], Any], evaluate: Callable[[], dict[str, float]] | None
) -> None:
    before = fingerprint(model.texts.model)
    fit(phase, model, batches, model.losses, evaluate=evaluate, evaluate_every=250)
    if fingerprint(model.texts.model) != before:
        raise AssertionError("the frozen language model changed during stage 2")


def fingerprint(module: nn.Module) -> str:
    """Hash over all weights, to prove that a frozen module stayed as it was."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def gate(model: Stage2, speaker: Speaker, held_out: SceneFeatures, n: int = 400) -> dict[str, float]:
    """Share of right texts per kind on held-out pictures (captions: of greedy ones that are true)."""
    rng = random.Random("stage 2 gate")
    counts: dict[str, tuple[int, int]] = {}
    true = 0
    for start in range(0, n, 50):
        indices = list(range(start, start + 50))
        found = [held_out.scene(i) for i in indices]
        prefix = model.prefix(held_out.features(indices))
        batch = speaker.pack([speaker.texts_of(s, rng, 0, 6, True) for s in found])
        add(counts, speaker.right(prefix, batch))
        true += sum(scenes.is_true(w, s) for w, s in zip(speaker.captions(prefix), found, strict=True))
    return {**shares(counts), "captions_true": true / n}


def add(counts: dict[str, tuple[int, int]], more: dict[str, tuple[int, int]]) -> None:
    for kind, (right, total) in more.items():
        before = counts.get(kind, (0, 0))
        counts[kind] = (before[0] + right, before[1] + total)


def shares(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Of right texts per kind, and of right answers over all kinds of questions."""
    asked = [v for k, v in counts.items() if k in scenes.QUESTION_KINDS]
    every = {"answers": (sum(r for r, _ in asked), sum(t for _, t in asked))} if asked else {}
    return {k: round(r / t, 4) for k, (r, t) in [*sorted(counts.items()), *every.items()]}
