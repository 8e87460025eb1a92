"""Stage 1: ITC + ITM + ITG over features of the frozen ViT (Li et al. 2023, section 3.2; equal weights)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from blip2_export.scenes import drawing
from blip2_export.train.features import Pairs, SceneFeatures
from blip2_export.train.loop import Evaluation, Phase, Task, fit
from blip2_export.train.qformer import QFormer

_SMOOTHING = 0.1
_FAR = -1e4


class Stage1:
    """The three losses of a Q-Former with its tokenizer."""

    def __init__(self, model: QFormer, tokenizer: PreTrainedTokenizerFast, max_length: int = 32) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.generator = torch.Generator().manual_seed(0)

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [batch, length], `[CLS]` first, `[SEP]` last."""
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    def losses(self, pairs: Pairs) -> dict[str, Tensor]:
        false = sorted(pairs.false)
        ids, mask = self.encode(pairs.captions + [pairs.false[i] for i in false])
        (ids, other_ids), (mask, other_mask) = (t.split([len(pairs.captions), len(false)]) for t in (ids, mask))
        started, started_mask = self._started(pairs)
        queries, itg_logits = self.model.captionings(pairs.features, started, started_mask)
        itc, to_text, to_image = self._contrast(queries, ids, mask, pairs.true)
        return {
            "itc": itc,
            "itm": self._match(
                pairs, ids, mask, self._negatives(pairs, to_text, to_image), (false, other_ids, other_mask)
            ),
            "itg": self._generate(itg_logits.flatten(0, 1), started.flatten(0, 1), started_mask.flatten(0, 1)),
            "_temperature": self.model.temperature,
        }

    def similarity(self, queries: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Cosines [images, texts], the largest over the queries."""
        image = F.normalize(self.model.vision_projection(queries), dim=-1)
        text = F.normalize(self.model.text_projection(self.model.text(ids, mask)[:, 0]), dim=-1)
        return torch.einsum("iqd,td->itq", image, text).amax(-1)

    def _contrast(self, queries: Tensor, ids: Tensor, mask: Tensor, true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.similarity(queries, ids, mask) / self.model.temperature
        other_truths = true & ~torch.eye(len(true), dtype=torch.bool)
        logits = logits.masked_fill(other_truths, _FAR)
        target = torch.arange(len(ids))
        loss = (
            sum(
                _smoothed(side, target, ~(mask_.bool()))
                for side, mask_ in ((logits, other_truths), (logits.T, other_truths.T))
            )
            / 2
        )
        return loss, logits.detach(), logits.T.detach()

    def _negatives(self, pairs: Pairs, to_text: Tensor, to_image: Tensor) -> tuple[Tensor, Tensor]:
        """One hard negative text for each image and one hard negative image for each text, drawn by similarity."""

        def draw(logits: Tensor, true: Tensor) -> Tensor:
            chances = logits.masked_fill(true, _FAR).softmax(1) + 1e-9 * ~true
            return torch.multinomial(chances, 1, generator=self.generator)[:, 0]

        return draw(to_text, pairs.true), draw(to_image, pairs.true.T)

    def _match(
        self,
        pairs: Pairs,
        ids: Tensor,
        mask: Tensor,
        negatives: tuple[Tensor, Tensor],
        false: tuple[list[int], Tensor, Tensor],
    ) -> Tensor:
        """Pairs once as they are, once with another text and once with another image. Known false texts go before drawn ones."""
        n, (text, image), (rows, false_ids, false_mask) = math.ceil(pairs.matched * len(ids)), negatives, false
        wrong_ids, wrong_mask = ids[text], mask[text]
        wrong_ids[rows], wrong_mask[rows] = false_ids, false_mask
        features = torch.cat([pairs.features[:n], pairs.features[image[:n]], pairs.features[:n]])
        all_ids = torch.cat([ids[:n], ids[:n], wrong_ids[:n]])
        all_mask = torch.cat([mask[:n], mask[:n], wrong_mask[:n]])
        labels = torch.cat([torch.ones(n, dtype=torch.long), torch.zeros(2 * n, dtype=torch.long)])
        return F.cross_entropy(self.model.matching_logits(features, all_ids, all_mask), labels)

    def _started(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Every picture's captions behind `[DEC]`: ids and mask [batch, captions, length]."""
        others = pairs.more or [[]] * len(pairs.captions)
        each = [[caption, *more] for caption, more in zip(pairs.captions, others, strict=True)]
        ids, mask = self.encode([caption for captions in each for caption in captions])
        ids[:, 0] = self.tokenizer.bos_token_id
        shape = (len(each), len(each[0]))
        return ids.unflatten(0, shape), mask.unflatten(0, shape)

    @staticmethod
    def _generate(logits: Tensor, started: Tensor, mask: Tensor) -> Tensor:
        labels = torch.where(mask.bool(), started, -100)[:, 1:]
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, label_smoothing=_SMOOTHING)


def _smoothed(logits: Tensor, target: Tensor, candidates: Tensor) -> Tensor:
    """Cross-entropy with the smoothing mass spread over `candidates` only."""
    log = logits.log_softmax(1)
    spread = (log * candidates).sum(1) / candidates.sum(1)
    return -((1 - _SMOOTHING) * log.gather(1, target[:, None])[:, 0] + _SMOOTHING * spread).mean()


def train(phase: Phase, stage: Stage1, pairs: Callable[[int], Pairs], held_out: SceneFeatures | None = None) -> None:
    gated = Evaluation(lambda: gate(stage, held_out), every=500) if held_out else None
    fit(phase, Task(stage.model, pairs, stage.losses), gated)


def gate(stage: Stage1, held_out: SceneFeatures, n: int = 200) -> dict[str, float]:
    """ITC R@1 among 100 scenes, ITM on true captions against one-word edits, ITG captions that are true."""
    rng = random.Random("stage 1 gate")
    found = [held_out.scene(i) for i in range(n)]
    features = held_out.features(list(range(n)))
    captions = [drawing.caption(s, rng) for s in found]
    ids, mask = stage.encode(captions)
    queries = stage.model.queries(features)
    cosines = stage.similarity(queries[:100], ids[:100], mask[:100])
    best = cosines.argmax(0).tolist()
    recalled = sum(drawing.is_true(captions[t], found[i]) for t, i in enumerate(best)) / 100
    edits = [drawing.one_word_edit(c, s, rng) or "nothing" for c, s in zip(captions, found, strict=True)]
    right = stage.model.matching_logits(features, ids, mask)
    wrong = stage.model.matching_logits(features, *stage.encode(edits))
    told = (right[:, 1] - right[:, 0] > wrong[:, 1] - wrong[:, 0]).float().mean()
    both = torch.cat([right.argmax(1) == 1, wrong.argmax(1) == 0]).float().mean()
    written = write(stage, features)
    true = sum(drawing.is_true(w, s) for w, s in zip(written, found, strict=True)) / n
    return {"itc_recall": recalled, "itm_edit_told": float(told), "itm_edit_right": float(both), "itg_true": true}


def write(stage: Stage1, features: Tensor, max_length: int = 24) -> list[str]:
    """Greedy captions of the Q-Former itself."""
    ids = torch.full((len(features), 1), stage.tokenizer.bos_token_id)
    for _ in range(max_length):
        _, logits = stage.model.captioning(features, ids, torch.ones_like(ids))
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    end = stage.tokenizer.sep_token_id
    rows = [r[1:].tolist() for r in ids]
    return [stage.tokenizer.decode(r[: r.index(end)] if end in r else r, skip_special_tokens=True) for r in rows]
