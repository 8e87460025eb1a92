"""Stage 2: projected queries in front of a frozen language model, LM loss (Li et al. 2023, section 3.3)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Blip2QFormerModel

from blip2_export.train.features import SceneFeatures
from blip2_export.train.frozen import frozen
from blip2_export.train.loop import Evaluation, Phase, Task, fit
from blip2_export.train.qformer import QFormer
from blip2_export.train.speaker import Speaker, true_captions
from blip2_export.train.text import Mixture, add_counts, answers_right, shares


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
        nn.init.normal_(self.language_projection.weight, 0, texts.projection.spread)
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


def scene_batches(data: SceneFeatures, speaker: Speaker, size: int, mixture: Mixture) -> Callable[[int], Any]:
    """Texts about `size` scenes a step."""

    def make(step: int) -> tuple[Tensor, Any]:
        rng = random.Random(f"stage 2 {step}")
        indices = [rng.randrange(data.count) for _ in range(size)]
        texts = [speaker.texts_of(data.scene(i), rng, mixture) for i in indices]
        return data.features(indices), speaker.pack(texts)

    return make


def train(
    phase: Phase, model: Stage2, batches: Callable[[int], Any], evaluate: Callable[[], dict[str, float]] | None
) -> None:
    with frozen(model.texts.model, "language model"):
        task = Task(model, batches, model.losses, model.texts.projection.faster())
        fit(phase, task, evaluate and Evaluation(evaluate, every=250))


def gate(model: Stage2, speaker: Speaker, held_out: SceneFeatures, n: int = 400) -> dict[str, float]:
    """Share of right texts per kind on held-out pictures (captions: of greedy ones that are true)."""
    rng = random.Random("stage 2 gate")
    counts: dict[str, tuple[int, int]] = {}
    for start in range(0, n, 50):
        indices = list(range(start, start + 50))
        found = [held_out.scene(i) for i in indices]
        prefix = model.prefix(held_out.features(indices))
        batch = speaker.pack([speaker.texts_of(s, rng, Mixture(0, 6, report=True)) for s in found])
        add_counts(counts, speaker.right(prefix, batch))
        add_counts(counts, {"captions_true": true_captions(speaker, prefix, found)})
    return {**shares(counts), "answers": round(answers_right(counts) or 0.0, 4)}
