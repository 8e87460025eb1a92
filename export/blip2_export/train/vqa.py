"""Fine-tuning for questions (Li et al. 2023, section 4.2): the question goes into the Q-Former beside the query tokens, image
encoder and Q-Former are trained at a higher resolution, the language model stays frozen."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel, PreTrainedTokenizerFast

from blip2_export.graphs import positions
from blip2_export.scenes import drawing
from blip2_export.train.frozen import frozen
from blip2_export.train.loop import Evaluation, Phase, Task, fit
from blip2_export.train.qformer import QFormer
from blip2_export.train.speaker import Speaker
from blip2_export.train.stage2 import Stage2
from blip2_export.train.text import Mixture, Text, add_counts, answers_right, question_kinds, shares
from blip2_export.train.vision import pixels

MAX_TOKENS = 32


@dataclass
class Questions:
    """Pictures [n, 3, S, S], and rows that each ask about one of them.

    `picture` [rows]. `ids`, `mask` [rows, length]: what the Q-Former reads. `texts`: what the language model reads and writes.
    """

    pixels: Tensor
    picture: Tensor
    ids: Tensor
    mask: Tensor
    texts: Any


class Vqa(nn.Module):
    """Everything of a BLIP-2 whose Q-Former reads the question. Its text branch comes from stage 1, all else from stage 2."""

    def __init__(self, vision: Blip2VisionModel, stage1: QFormer, second: Stage2, side: int) -> None:
        super().__init__()
        self.vision = at_size(vision, side)
        self.qformer = Blip2QFormerModel(stage1.cfg)
        self.qformer.load_state_dict({**stage1.qformer.state_dict(), **second.qformer.state_dict()})
        self.embeddings = stage1.embeddings
        self.query_tokens = second.query_tokens
        self.language_projection = second.language_projection
        self.texts = second.texts

    def prefix(self, questions: Questions) -> Tensor:
        """Soft prompts [rows, n_queries, width of the language model's embeddings]."""
        seen = self.vision(questions.pixels).last_hidden_state[questions.picture]
        tokens = self.query_tokens.expand(len(questions.ids), -1, -1)
        n = tokens.shape[1]
        hidden = self.qformer(
            query_embeds=self.embeddings(questions.ids, query_embeds=tokens),
            query_length=n,
            attention_mask=torch.cat([questions.mask.new_ones(len(tokens), n), questions.mask], 1),
            encoder_hidden_states=seen,
        ).last_hidden_state
        return self.language_projection(hidden[:, :n])

    def losses(self, questions: Questions) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.texts.losses(self.prefix(questions), questions.texts)
        return losses


def at_size(vision: Blip2VisionModel, side: int) -> Blip2VisionModel:
    """A copy for pictures of `side` × `side`, its position embeddings interpolated."""
    cfg = Blip2VisionConfig.from_dict({**vision.config.to_dict(), "image_size": side})
    copy = Blip2VisionModel(cfg)
    state = vision.state_dict()
    name = "embeddings.position_embedding"
    state[name] = torch.from_numpy(positions.resize(state[name].numpy(), side // cfg.patch_size, align_corners=False))
    copy.load_state_dict(state)
    return copy.requires_grad_(True)


class Asker:
    """Makes batches of drawn scenes: every question of a picture is a row, and its caption is one with an empty question."""

    def __init__(self, speaker: Speaker, tokenizer: PreTrainedTokenizerFast, side: int) -> None:
        self.speaker, self.tokenizer, self.side = speaker, tokenizer, side

    def ask(self, found: list[drawing.Scene], rng: random.Random, n_captions: int, n_questions: int) -> Questions:
        rows: list[tuple[int, str, Text]] = []
        for i, scene in enumerate(found):
            for kind in rng.sample(question_kinds(n_questions), n_questions):
                _, asked, answer = drawing.question(scene, rng, kind)
                rows.append((i, asked, self.speaker.asked(kind, asked, answer)))
            rows += [(i, "", t) for t in self.speaker.texts_of(scene, rng, Mixture(n_captions, 0))]
        batch = self.tokenizer(
            [asked for _, asked, _ in rows], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        drawn = np.stack([pixels(np.asarray(drawing.draw(s, self.side))) for s in found])
        return Questions(
            torch.from_numpy(drawn),
            torch.tensor([i for i, _, _ in rows]),
            batch.input_ids,
            batch.attention_mask,
            self.speaker.pack([[text] for _, _, text in rows]),
        )

    def batches(self, size: int, n_captions: int = 1, n_questions: int = 4) -> Callable[[int], Questions]:
        def make(step: int) -> Questions:
            rng = random.Random(f"vqa {step}")
            return self.ask([drawing.sample_scene(rng) for _ in range(size)], rng, n_captions, n_questions)

        return make


def train(phase: Phase, model: Vqa, asker: Asker, size: int, evaluate: bool) -> None:
    gated = Evaluation(lambda: gate(model, asker), every=200) if evaluate else None
    with frozen(model.texts.model, "language model"):
        fit(phase, Task(model, asker.batches(size), model.losses, model.texts.projection.faster()), gated)


def gate(model: Vqa, asker: Asker, n: int = 200) -> dict[str, float]:
    """Share of right answers per kind on held-out scenes."""
    rng = random.Random("vqa gate")
    counts: dict[str, tuple[int, int]] = {}
    for _ in range(0, n, 25):
        questions = asker.ask([drawing.sample_scene(rng) for _ in range(25)], rng, 0, 6)
        add_counts(counts, asker.speaker.right(model.prefix(questions), questions.texts))
    return {**shares(counts), "answers": round(answers_right(counts) or 0.0, 4)}
