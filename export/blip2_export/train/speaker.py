"""What the phases need of a language model, whichever family it is of: its pre-training on text alone, and its part in a stage.

A document of the pre-training is a description of a scene (32 tokens) with texts behind it, each of which sees only the
description. In stage 2 the 32 projected queries take the description's place.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blip2_export.scenes import drawing
from blip2_export.train.loop import Evaluation, Phase, Task, fit
from blip2_export.train.text import Mixture, Text, add_counts, shares


@dataclass(frozen=True)
class Projection:
    """How the projection into a language model starts and learns. `spread`: the deviation of its weights. `rate`: a factor to the
    learning rate."""

    spread: float = 0.02
    rate: float = 1.0

    def faster(self) -> dict[str, float]:
        """As in `Task`."""
        return {f"language_projection.{part}": self.rate for part in ("weight", "bias")}


@dataclass(frozen=True)
class Speaker:
    """`texts`: the model with `losses(prefix, batch)`, with `described(ids)`, which turns descriptions [batch, 32] into a prefix,
    and with the `width` of a query in its soft prompt and the `projection` into it.

    `description` gives the token ids of a scene's description, `texts_of` a mixture of texts about it. `asked` is the text of
    a question of some kind with its answer. `pack` makes a batch of the texts of each prefix. `right` counts (right, all)
    texts per kind of such a batch, right when every token of the target is the most probable one after the true tokens.
    `captions` writes greedy ones.
    """

    texts: Any
    description: Callable[[drawing.Scene], list[int]]
    texts_of: Callable[[drawing.Scene, random.Random, Mixture], list[Text]]
    asked: Callable[[str, str, str], Text]
    pack: Callable[[list[list[Text]]], Any]
    right: Callable[[Tensor, Any], dict[str, tuple[int, int]]]
    captions: Callable[[Tensor], list[str]]


def pretrain(
    phase: Phase,
    speaker: Speaker,
    batch_size: int,
    mixture: Callable[[float], Mixture],
    faster: dict[str, float] | None = None,
) -> None:
    """Trains (or goes on training) the language model on text alone.

    `mixture`: of a scene's texts at this share of the training; a fifth of the scenes has a report too. `faster`: as in `Task`.
    """

    def make_batch(step: int) -> tuple[Tensor, Any]:
        rng = random.Random(f"text {step}")
        share = step / phase.schedule.steps
        found = [_scene_to_read(rng, share) for _ in range(batch_size)]
        rows = [speaker.texts_of(s, rng, replace(mixture(share), report=rng.random() < 0.2)) for s in found]
        return _descriptions(speaker, found), speaker.pack(rows)

    def losses(batch: tuple[Tensor, Any]) -> dict[str, Tensor]:
        ids, texts = batch
        parts: dict[str, Tensor] = speaker.texts.losses(speaker.texts.described(ids), texts)
        return parts

    fit(phase, Task(speaker.texts, make_batch, losses, faster or {}), Evaluation(lambda: gate(speaker), every=500))


def _scene_to_read(rng: random.Random, share: float) -> drawing.Scene:
    """A scene for this share of the training: lookup is learned on few objects first."""
    most = 1 if share < 0.04 else 2 if share < 0.25 else drawing.MAX_OBJECTS
    return drawing.sample_scene(rng, None if most == drawing.MAX_OBJECTS else rng.randint(1, most))


def _descriptions(speaker: Speaker, found: list[drawing.Scene]) -> Tensor:
    return torch.tensor([speaker.description(s) for s in found])


def gate(speaker: Speaker) -> dict[str, float]:
    """Share of right texts per kind on held-out scenes, from their true description, and of greedy captions that are true."""
    rng = random.Random("text gate False")
    counts: dict[str, tuple[int, int]] = {}
    for _ in range(6):
        found = [drawing.sample_scene(rng) for _ in range(50)]
        prefix = speaker.texts.described(_descriptions(speaker, found))
        texts = speaker.pack([speaker.texts_of(s, rng, Mixture(1, 6)) for s in found])
        add_counts(counts, speaker.right(prefix, texts))
        add_counts(counts, {"captions_true": true_captions(speaker, prefix, found)})
    return shares(counts)


def true_captions(speaker: Speaker, prefix: Tensor, found: list[drawing.Scene]) -> tuple[int, int]:
    """(true, all) greedy captions of these scenes."""
    return sum(drawing.is_true(w, s) for w, s in zip(speaker.captions(prefix), found, strict=True)), len(found)


def greedy(model: Any, prefix: Tensor, first: int, tokenizer: Any, max_new_tokens: int = 30) -> list[str]:
    """Captions of a soft prompt, behind which the model reads the token `first`."""
    embeds = torch.cat([prefix, model.get_input_embeddings()(torch.full((len(prefix), 1), first))], 1)
    ids = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
