"""Stage 1: ITC + ITM + ITG over features of the frozen image encoder (Li et al. 2023, section 3.2; equal weights).

Processes contrast the pictures and texts of all, so two of them learn what one does with twice the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2_export.train.own import together
from blip2_export.train.own.hardware import lifted
from blip2_export.train.qformer import QFormer

SMOOTHING = 0.1  # LAVIS, of ITC and ITG
_FAR = -1e4
_IGNORED = -100


@dataclass
class Captions:
    """Features [rows, positions, width] of pictures with one caption each. `ids`, `mask` [rows, length].

    `picture` [rows] is the same number where the picture is. `chances` [rows, 2]: from 0 to 1, which hard negatives are drawn by.
    """

    features: Tensor
    ids: Tensor
    mask: Tensor
    picture: Tensor
    chances: Tensor


class Stage1(nn.Module):
    """The three losses of a Q-Former; means over this process' rows, whose mean over processes is that of the whole batch."""

    def __init__(self, qformer: QFormer, tokenizer: Any, max_length: int = 32) -> None:
        super().__init__()
        self.qformer, self.tokenizer, self.max_length = qformer, tokenizer, max_length

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [rows, `max_length`], `[CLS]` first, `[SEP]` last."""
        kinds = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        batch = self.tokenizer(list(texts), return_tensors="pt", **kinds)
        return batch.input_ids, batch.attention_mask

    def forward(self, batch: Captions) -> dict[str, Tensor]:
        queries, itg = self._generate(batch)
        itc, to_text, to_image, same = self._contrast(batch, queries)
        itm, right = self._match(batch, to_text, to_image, same)
        first = together.rank() * len(batch.ids)
        diagonal = torch.arange(first, first + len(batch.ids), device=to_text.device)
        recalls = ((side.argmax(1) == diagonal).float().mean() for side in (to_text, to_image))
        measured = zip(("_texts_recalled", "_images_recalled"), recalls, strict=True)
        return {
            "itc": itc,
            "itm": itm,
            "itg": itg,
            **dict(measured),
            "_itm_right": right,
            "_temperature": self.qformer.temperature,
        }

    def vectors(self, queries: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures [rows, queries, joint] and of texts [rows, joint]."""
        image = self.qformer.vision_projection(queries)
        text = self.qformer.text_projection(self.qformer.text(ids, mask)[:, 0])
        return F.normalize(lifted(image), dim=-1), F.normalize(lifted(text), dim=-1)

    def _contrast(self, batch: Captions, queries: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, both sides' logits [rows, all rows], and where a row of all is of the same picture."""
        image, text = self.vectors(queries, batch.ids, batch.mask)
        temperature = self.qformer.temperature
        with torch.autocast(image.device.type, enabled=False):
            to_text = torch.einsum("iqd,td->itq", image, together.gathered(text)).amax(-1) / temperature
            to_image = torch.einsum("td,iqd->tiq", text, together.gathered(image)).amax(-1) / temperature
        same = batch.picture[:, None] == together.gathered(batch.picture)[None]
        target = together.rank() * len(same) + torch.arange(len(same), device=same.device)
        others = same.scatter(1, target[:, None], False)
        loss = sum(smoothed(side.masked_fill(others, _FAR), target, ~others) for side in (to_text, to_image)) / 2
        return loss, to_text.detach(), to_image.detach(), same

    def _match(self, batch: Captions, to_text: Tensor, to_image: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs as they are, with another picture, and with another text, each drawn by similarity among those of all processes."""
        text = drawn(to_text.masked_fill(same, _FAR).softmax(1) * ~same, batch.chances[:, 0])
        image = drawn(to_image.masked_fill(same, _FAR).softmax(1) * ~same, batch.chances[:, 1])
        all_features, all_ids, all_mask = (together.gathered(t) for t in (batch.features, batch.ids, batch.mask))
        logits = lifted(
            self.qformer.matching_logits(
                torch.cat([batch.features, all_features[image], batch.features]),
                torch.cat([batch.ids, batch.ids, all_ids[text]]),
                torch.cat([batch.mask, batch.mask, all_mask[text]]),
            )
        )
        n = len(batch.ids)
        labels = torch.cat([torch.ones(n), torch.zeros(2 * n)]).long().to(logits.device)
        # Where all rows are of one picture, what was drawn is a true pair.
        others = (~same).any(1).to(logits.dtype)
        counts = torch.cat([torch.ones_like(others), others, others])
        share = counts / together.mean(counts.sum())
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses * share).sum(), ((logits.argmax(1) == labels) * share).sum()

    def _generate(self, batch: Captions) -> tuple[Tensor, Tensor]:
        started = batch.ids.clone()
        started[:, 0] = self.tokenizer.bos_token_id
        queries, logits = self.qformer.captioning(batch.features, started, batch.mask)
        labels = torch.where(batch.mask.bool(), started, _IGNORED)[:, 1:]
        shape = {"ignore_index": _IGNORED, "label_smoothing": SMOOTHING, "reduction": "sum"}
        total = F.cross_entropy(lifted(logits[:, :-1]).transpose(1, 2), labels, **shape)
        return queries, total / together.mean((labels != _IGNORED).sum())


def smoothed(logits: Tensor, target: Tensor, candidates: Tensor) -> Tensor:
    """Cross-entropy whose smoothing is spread over `candidates` alone."""
    log = logits.log_softmax(1)
    spread = (log * candidates).sum(1) / candidates.sum(1)
    return -((1 - SMOOTHING) * log.gather(1, target[:, None])[:, 0] + SMOOTHING * spread).mean()


def drawn(weights: Tensor, chances: Tensor) -> Tensor:
    """A column of each row, by its weight; a row without any weight gives any, for none is better."""
    edges = (weights + 1e-12 * (weights.sum(1, keepdim=True) <= 0)).double().cumsum(1)
    return torch.searchsorted(edges, chances.double()[:, None] * edges[:, -1:], right=True)[:, 0].clamp(
        max=weights.shape[1] - 1
    )
