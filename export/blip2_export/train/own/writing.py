"""What the models in training say, word by word the likeliest: nothing is drawn, so nothing of the random state is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_export.train.own.language import Language
from blip2_export.train.own.stage1 import Stage1

LONGEST = 30  # tokens, as in the paper's evaluation


def texts(language: Language, prefix: Tensor, reads: Sequence[str], longest: int = LONGEST) -> list[str]:
    """What the language model writes behind soft prompts [rows, queries, width] and what each row has to read."""
    written: list[list[int]] = [[] for _ in reads]
    alive = list(range(len(reads)))
    for _ in range(longest):
        so_far = language.so_far([reads[row] for row in alive], [written[row] for row in alive])
        logits = language.logits(prefix[alive], so_far.texts.to(prefix.device))
        chosen = logits[torch.arange(len(alive)), so_far.places].argmax(-1).tolist()
        for row, token in zip(alive, chosen, strict=True):
            written[row].append(token)
        alive = [row for row, token in zip(alive, chosen, strict=True) if token not in language.ends]
        if not alive:
            break
    return [language.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]


def captions(model: Stage1, features: Tensor) -> list[str]:
    """What the Q-Former itself writes of pictures, by its head of ITG."""
    tokenizer, device = model.tokenizer, features.device
    ids = torch.full((len(features), 1), tokenizer.bos_token_id, device=device)
    for _ in range(min(LONGEST, model.max_length - 1)):
        logits = model.qformer.captioning(features, ids, torch.ones_like(ids))[1]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if (ids == tokenizer.sep_token_id).any(1).all():
            break
    return [
        tokenizer.decode(_until(row, tokenizer.sep_token_id), skip_special_tokens=True).strip() for row in ids.tolist()
    ]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
