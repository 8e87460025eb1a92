"""Pre-training of the demo's OPT-shaped language model, on text alone.

A document is a description of a scene (32 tokens) with texts side by side behind it, each of which sees only the description:
captions, a report, questions with answers. In stage 2 the 32 projected queries take the description's place.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from blip2_export import scenes
from blip2_export.train.loop import Phase, fit
from blip2_export.train.speaker import Speaker
from blip2_export.train.text import (
    ASK_PROMPT,
    BOS,
    N_QUERIES,
    PAD,
    Packed,
    Packer,
    Text,
    asked_text,
    caption_text,
    question_text,
    report_text,
    right_by_kind,
)


def config(tokenizer: PreTrainedTokenizerFast) -> OPTConfig:
    """The demo's decoder: 4 layers of width 128; a line break ends a text, as in BLIP-2."""
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        ffn_dim=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=128,
        dropout=0.0,
        init_std=0.04,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=newline,
    )


class Texts(nn.Module):
    """A language model with the loss over packed texts."""

    def __init__(self, model: OPTForCausalLM) -> None:
        super().__init__()
        self.model = model

    @property
    def width(self) -> int:
        """Of a query in the soft prompt."""
        return int(self.model.config.word_embed_proj_dim)

    def logits(self, prefix: Tensor, packed: Packed) -> Tensor:
        """Logits of the packed texts [batch, length, vocab] behind `prefix` [batch, 32, hidden]."""
        embeds = torch.cat([prefix, self.model.get_input_embeddings()(packed.ids)], 1)
        hidden = self.model.model(
            inputs_embeds=embeds, attention_mask=packed.mask(), position_ids=packed.all_positions(), use_cache=False
        ).last_hidden_state
        return self.model.lm_head(hidden[:, N_QUERIES:])

    def losses(self, prefix: Tensor, packed: Packed) -> dict[str, Tensor]:
        logits = self.logits(prefix, packed)
        each = F.cross_entropy(logits.transpose(1, 2), packed.labels, reduction="none", ignore_index=-100)
        counts = right_by_kind(logits.detach(), packed)
        asked = [v for k, v in counts.items() if k in scenes.QUESTION_KINDS]
        out = {"lm": (each * packed.weights).sum() / packed.weights.sum()}
        if asked:
            out["_answers_right"] = torch.tensor(sum(r for r, _ in asked) / sum(n for _, n in asked))
        return out


def texts_of(
    scene: scenes.Scene,
    rng: random.Random,
    n_captions: int,
    n_questions: int,
    report: bool,
    ask_prompt: str = ASK_PROMPT,
) -> list[Text]:
    """Texts about one scene; one question of each kind, and yes or no, the slowest to learn, fills up."""
    kinds = [*scenes.QUESTION_KINDS, *["yes/no"] * n_questions][:n_questions]
    texts = [question_text(scene, rng, kind, ask_prompt) for kind in kinds]
    texts += [caption_text(scene, rng) for _ in range(n_captions)]
    return texts + [report_text(scene)] * report


def pretrain(phase: Phase, tokenizer: PreTrainedTokenizerFast, batch_size: int = 32) -> OPTForCausalLM:
    """Trains (or goes on training) the language model and returns it."""
    torch.manual_seed(0)
    model = Texts(OPTForCausalLM(config(tokenizer)))
    packer = Packer(tokenizer, prompt_weight=0.1)

    def make_batch(step: int) -> Any:
        rng = random.Random(f"text {step}")
        found = [scene_to_read(rng, step / phase.schedule.steps) for _ in range(batch_size)]
        rows = [texts_of(s, rng, 2, 9, rng.random() < 0.2) for s in found]
        return torch.tensor([packer.description(s) for s in found]), packer.pack(rows)

    def losses(batch: tuple[Tensor, Packed]) -> dict[str, Tensor]:
        ids, packed = batch
        return model.losses(model.model.get_input_embeddings()(ids), packed)

    def evaluate() -> dict[str, float]:
        return gate(model, packer)

    fit(phase, model, make_batch, losses, evaluate=evaluate, evaluate_every=500)
    return model.model


def scene_to_read(rng: random.Random, share: float) -> scenes.Scene:
    """A scene for this share of the training: lookup is learned on few objects first."""
    most = 1 if share < 0.04 else 2 if share < 0.25 else scenes.MAX_OBJECTS
    return scenes.sample_scene(rng, None if most == scenes.MAX_OBJECTS else rng.randint(1, most))


def gate(model: Texts, packer: Packer, unseen: bool = False) -> dict[str, float]:
    """Share of right texts per kind on held-out scenes, from their true description."""
    rng = random.Random(f"text gate {unseen}")
    counts: dict[str, tuple[int, int]] = {}
    for _ in range(6):
        found = [scenes.sample_scene(rng, unseen=unseen) for _ in range(50)]
        packed = packer.pack([texts_of(s, rng, 1, 6, False) for s in found])
        prefix = model.model.get_input_embeddings()(torch.tensor([packer.description(s) for s in found]))
        for kind, (right, n) in right_by_kind(model.logits(prefix, packed), packed).items():
            before = counts.get(kind, (0, 0))
            counts[kind] = (before[0] + right, before[1] + n)
    return {k: round(r / n, 4) for k, (r, n) in sorted(counts.items())}


def speaker(model: Texts, packer: Packer) -> Speaker:
    return Speaker(
        model,
        texts_of,
        asked_text,
        packer.pack,
        lambda prefix, packed: right_by_kind(model.logits(prefix, packed), packed),
        lambda prefix: greedy(model.model, prefix, packer.tokenizer),
    )


def greedy(
    language: OPTForCausalLM, prefix: Tensor, tokenizer: PreTrainedTokenizerFast, max_new_tokens: int = 30
) -> list[str]:
    """Captions of a soft prompt."""
    start = language.get_input_embeddings()(torch.full((len(prefix), 1), tokenizer.bos_token_id))
    embeds = torch.cat([prefix, start], 1)
    ids = language.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
