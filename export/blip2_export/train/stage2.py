"""Stage 2: projected queries in front of a frozen decoder-only language model, LM loss (Li et al. 2023, section 3.3)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel, OPTForCausalLM, PreTrainedTokenizerFast

from blip2_export import scenes
from blip2_export.train.features import SceneFeatures
from blip2_export.train.language import Texts, texts_of
from blip2_export.train.loop import Phase, fit
from blip2_export.train.qformer import QFormer
from blip2_export.train.text import Packed, Packer, right_by_kind


class Stage2(nn.Module):
    """What stage 2 trains (query-only Q-Former, query tokens, projection) around the frozen language model."""

    def __init__(self, stage1: QFormer, language: OPTForCausalLM) -> None:
        super().__init__()
        self.qformer = query_only(stage1.qformer)
        self.query_tokens = nn.Parameter(stage1.query_tokens.detach().clone())
        self.language_projection = nn.Linear(stage1.cfg.hidden_size, language.config.word_embed_proj_dim)
        self.texts = Texts(language.requires_grad_(False))
        nn.init.normal_(self.language_projection.weight, 0, 0.02)
        nn.init.zeros_(self.language_projection.bias)

    def prefix(self, features: Tensor) -> Tensor:
        """Soft prompt [batch, n_queries, hidden]."""
        tokens = self.query_tokens.expand(len(features), -1, -1)
        hidden = self.qformer(query_embeds=tokens, encoder_hidden_states=features).last_hidden_state
        return self.language_projection(hidden)

    def losses(self, batch: tuple[Tensor, Packed]) -> dict[str, Tensor]:
        features, packed = batch
        return self.texts.losses(self.prefix(features), packed)


def query_only(qformer: Blip2QFormerModel) -> Blip2QFormerModel:
    """A copy without the text feed-forward layers: stage 2 gives the Q-Former no text."""
    cfg = type(qformer.config).from_dict({**qformer.config.to_dict(), "use_qformer_text_input": False})
    copy = Blip2QFormerModel(cfg)
    copy.load_state_dict({k: v for k, v in qformer.state_dict().items() if k in copy.state_dict()})
    return copy


def scene_batches(data: SceneFeatures, packer: Packer, size: int) -> Callable[[int], Any]:
    """Captions, a report and questions of `size` scenes a step."""

    def make(step: int) -> tuple[Tensor, Packed]:
        rng = random.Random(f"stage 2 {step}")
        indices = [rng.randrange(data.count) for _ in range(size)]
        return data.features(indices), packer.pack([texts_of(data.scene(i), rng, 4, 6, True) for i in indices])

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


def gate(model: Stage2, packer: Packer, held_out: SceneFeatures, n: int = 400) -> dict[str, float]:
    """Share of right texts per kind on held-out pictures (captions: of greedy ones that are true)."""
    rng = random.Random("stage 2 gate")
    counts: dict[str, tuple[int, int]] = {}
    true = 0
    for start in range(0, n, 50):
        indices = list(range(start, start + 50))
        found = [held_out.scene(i) for i in indices]
        prefix = model.prefix(held_out.features(indices))
        packed = packer.pack([texts_of(s, rng, 0, 6, True) for s in found])
        for kind, (right, total) in right_by_kind(model.texts.logits(prefix, packed), packed).items():
            before = counts.get(kind, (0, 0))
            counts[kind] = (before[0] + right, before[1] + total)
        written = greedy(model.texts.model, prefix, packer.tokenizer)
        true += sum(scenes.is_true(w, s) for w, s in zip(written, found, strict=True))
    out = {k: round(r / t, 4) for k, (r, t) in sorted(counts.items())}
    asked = [v for k, v in counts.items() if k in scenes.QUESTION_KINDS]
    return {**out, "answers": round(sum(r for r, _ in asked) / sum(t for _, t in asked), 4), "captions_true": true / n}


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
