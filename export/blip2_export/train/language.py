"""Pre-training of the demo's OPT-shaped language model, on text alone.

A document is a description of a scene (32 tokens) with texts side by side behind it, each of which sees only the description:
captions, a report, questions with answers. In stage 2 the 32 projected queries take the description's place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from blip2_export.train import speaker as speakers
from blip2_export.train.loop import Phase
from blip2_export.train.speaker import Speaker
from blip2_export.train.text import (
    BOS,
    N_QUERIES,
    PAD,
    Mixture,
    Packed,
    Packer,
    answers_right,
    asked_text,
    right_by_kind,
    texts_of,
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

    projection = speakers.Projection()

    def __init__(self, model: OPTForCausalLM) -> None:
        super().__init__()
        self.model = model

    @property
    def width(self) -> int:
        """Of a query in the soft prompt."""
        return int(self.model.config.word_embed_proj_dim)

    def described(self, ids: Tensor) -> Tensor:
        """Descriptions [batch, 32] as a prefix [batch, 32, width]."""
        prefix: Tensor = self.model.get_input_embeddings()(ids)
        return prefix

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
        out = {"lm": (each * packed.weights).sum() / packed.weights.sum()}
        if (right := answers_right(counts)) is not None:
            out["_answers_right"] = torch.tensor(right)
        return out


def pretrain(phase: Phase, tokenizer: PreTrainedTokenizerFast, batch_size: int = 32) -> OPTForCausalLM:
    """Trains (or goes on training) the language model and returns it."""
    torch.manual_seed(0)
    model = Texts(OPTForCausalLM(config(tokenizer)))
    teacher = speaker(model, Packer(tokenizer, prompt_weight=0.1))
    speakers.pretrain(phase, teacher, batch_size, lambda _: Mixture(2, 9))
    return model.model


def speaker(model: Texts, packer: Packer) -> Speaker:
    return Speaker(
        model,
        packer.description,
        texts_of,
        asked_text,
        packer.pack,
        lambda prefix, packed: right_by_kind(model.logits(prefix, packed), packed),
        lambda prefix: speakers.greedy(model.model, prefix, BOS, packer.tokenizer),
    )
