"""How well a model does on what is held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from blip2_export.train.own import language, writing
from blip2_export.train.own.answers import accuracy
from blip2_export.train.own.batches import Captioned, Part
from blip2_export.train.own.captions import clean
from blip2_export.train.own.records import Question, Record
from blip2_export.train.own.scores import Caption, scores
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.stage1 import Captions, Stage1, drawn
from blip2_export.train.own.stage2 import Stage2, Written

# What the best checkpoint can be chosen by, and whether more of it is better.
MORE_IS_BETTER = {
    "stage1": {
        "loss": False,
        "itc": False,
        "itm": False,
        "itg": False,
        "itm_accuracy": True,
        "itm_hard_accuracy": True,
        "r1": True,
    },
    "stage2": {"loss": False, "cider": True, "bleu4": True},
    "vqa": {"loss": False, "accuracy": True},
}
USUAL = {"stage1": "loss", "stage2": "loss", "vqa": "accuracy"}
WRITTEN = ("cider", "bleu4")  # what captions have to be written for
FEW_WRITTEN = 200  # pictures that captions are written of in a measurement
CAPTIONS = 5  # of a picture, as retrieval on COCO and Flickr30k is measured
_RERANKED = 8  # candidates of each query
_TOGETHER = 64  # texts, or pairs of them with pictures, that go through the model at once
_FEW = 200  # pictures up to which candidates are ranked anew by matching; their features stay in memory


def better(phase: str, name: str = "") -> tuple[str, bool]:
    """The measure that tells the best checkpoint, and whether more of it is better."""
    known = MORE_IS_BETTER[phase]
    name = name or USUAL[phase]
    if name not in known:
        raise DataError(f"--best-by {name}: {phase} is measured by {', '.join(known)}")
    return name, known[name]


class Means:
    """Weighted means of numbers by name."""

    def __init__(self) -> None:
        self.sums, self.weights = dict[str, float](), dict[str, float]()

    def add(self, name: str, value: Tensor | float, weight: Tensor | float) -> None:
        if float(weight):
            self.sums[name] = self.sums.get(name, 0.0) + float(value) * float(weight)
            self.weights[name] = self.weights.get(name, 0.0) + float(weight)

    def found(self) -> dict[str, float]:
        return {name: value / self.weights[name] for name, value in self.sums.items()}


# Stage 1


@dataclass
class Known:
    """What is said of the rows of a part, and all captions of their pictures."""

    said: Captioned
    records: list[Record]


def of_stage1(model: Stage1, parts: Iterable[Part], see: Callable[[Part], Captions]) -> dict[str, float]:
    """Losses as they are learnt, matching, and retrieval among everything that is held out. `see`: features of a part."""
    means, gallery = Means(), Gallery()
    for part in parts:
        batch = see(replace(part, said=part.said.said))
        losses, n = model(batch), len(batch.ids)
        means.add("itc", losses["itc"], n)
        means.add("itm", losses["itm"], n)
        means.add("itg", losses["itg"], batch.mask[:, 1:].sum())
        image, text = model.vectors(model.qformer.queries(batch.features), batch.ids, batch.mask)
        _match(means, model, batch, torch.einsum("iqd,td->itq", image, text).amax(-1))
        gallery.add(model, batch, image, part.said.records)
    found = means.found()
    loss = sum(found[name] for name in ("itc", "itm", "itg"))
    return {"loss": loss, **found, **gallery.recalls(model)}


def _match(means: Means, model: Stage1, batch: Captions, similar: Tensor) -> None:
    """Shares of pairs that are told right, half of them true: against texts drawn blindly, and against the most similar ones."""
    same = batch.picture[:, None] == batch.picture[None]
    has = ~same.all(1)
    if not has.any():
        return
    blind = drawn((~same).float(), batch.chances[:, 0])
    text, image = (side.masked_fill(same, -math.inf).argmax(1) for side in (similar, similar.T))
    f, ids, mask = batch.features, batch.ids, batch.mask

    def told(features: Tensor, which: Tensor, truth: int) -> Tensor:
        logits = model.qformer.matching_logits(features, ids[which], mask[which])
        return (logits.argmax(1) == truth).float()[has].mean()

    own, n = torch.arange(len(ids), device=ids.device), has.sum()
    true = told(f, own, 1)
    hard = (told(f, text, 0) + told(f[image], own, 0)) / 2
    means.add("itm_accuracy", (true + told(f, blind, 0)) / 2, n)
    means.add("itm_hard_accuracy", (true + hard) / 2, n)


@dataclass
class Gallery:
    """Pictures, by where they are, for sets may share names, and the distinct texts that are said of them, as they are learnt."""

    images: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    keys: dict[str, int] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    vectors: list[Tensor] = field(default_factory=list)
    pairs: set[tuple[int, int]] = field(default_factory=set)

    def add(self, model: Stage1, batch: Captions, images: Tensor, records: Sequence[Record]) -> None:
        """Rows of a batch."""
        new = []
        for row, record in enumerate(records):
            key = str(record.source)
            if key not in self.keys:
                self.keys[key] = len(self.keys)
                self.images.append(images[row].float().cpu())
                if len(self.keys) <= _FEW:
                    self.features.append(batch.features[row].cpu())
            for caption in map(clean, record.captions[:CAPTIONS]):
                if caption not in self.texts:
                    self.texts[caption] = len(self.texts)
                    new.append(caption)
                self.pairs.add((self.keys[key], self.texts[caption]))
        for i in range(0, len(new), _TOGETHER):
            ids, mask = (t.to(batch.ids.device) for t in model.encode(new[i : i + _TOGETHER]))
            hidden = model.qformer.text(ids, mask)[:, 0]
            self.vectors.append(nn.functional.normalize(model.qformer.text_projection(hidden), dim=-1).float().cpu())

    def recalls(self, model: Stage1) -> dict[str, float]:
        """R@1 and R@5 of texts for pictures and of pictures for texts, by similarity and, among few, by matching the best."""
        true = torch.zeros(len(self.keys), len(self.texts), dtype=torch.bool)
        rows, columns = zip(*self.pairs, strict=True)
        true[list(rows), list(columns)] = True
        scores = self._similar()
        found = _recalls(scores, true)
        if len(self.keys) <= _FEW:
            by_picture = self._matched(model, scores, lambda row, column: (row, column))
            by_text = self._matched(model, scores.T, lambda row, column: (column, row)).T
            found |= {f"reranked_{name}": value for name, value in _recalls(by_picture, true, by_text).items()}
        return found

    def _similar(self) -> Tensor:
        """[pictures, texts]"""
        # In 16 bits many would be alike.
        with torch.autocast("cpu", enabled=False):
            texts = torch.cat(self.vectors)
            return torch.stack([(texts @ image.T).amax(1) for image in self.images])

    def _matched(self, model: Stage1, scores: Tensor, pair: Callable[[int, int], tuple[int, int]]) -> Tensor:
        """Of each row's best candidates the logit of a match comes on top, as in LAVIS; the others stay behind them.

        `pair`: picture and text of a row and a column.
        """
        said, device = list(self.texts), model.qformer.query_tokens.device
        best, found = scores.topk(min(_RERANKED, scores.shape[1])).indices, scores - 1e4
        candidates = [(row, column) for row, columns in enumerate(best.tolist()) for column in columns]
        for first in range(0, len(candidates), _TOGETHER):
            some = candidates[first : first + _TOGETHER]
            pairs = [pair(row, column) for row, column in some]
            ids, mask = (t.to(device) for t in model.encode([said[text] for _, text in pairs]))
            seen = torch.stack([self.features[picture] for picture, _ in pairs]).to(device)
            logits = model.qformer.matching_logits(seen, ids, mask)[:, 1].float().cpu()
            where = torch.tensor(some).unbind(1)
            found[where] = scores[where] + logits
        return found


def _recalls(scores: Tensor, true: Tensor, by_text: Tensor | None = None) -> dict[str, float]:
    text, image = ranks(scores, true), ranks((scores if by_text is None else by_text).T, true.T)
    found = {f"{side}_r{k}": share(rank, k) for side, rank in (("text", text), ("image", image)) for k in (1, 5)}
    return {"r1": (found["text_r1"] + found["image_r1"]) / 2, **found}


def ranks(scores: Tensor, true: Tensor) -> Tensor:
    """How many false columns of each row are not below its best true one: none if it is found first.

    Ties, and what is no number, count against it.
    """
    best = scores.masked_fill(~true, -math.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~true).sum(1)


def share(rank: Tensor, k: int) -> float:
    """R@k."""
    return float((rank < k).float().mean())


# The language model


@dataclass
class Told:
    """What is said of the rows of a part, a row a picture, and these pictures' records."""

    said: language.Texts
    records: list[Record]


def of_language(model: Stage2, parts: Iterable[Part], write: Callable[[Part], Written]) -> dict[str, float]:
    """The loss of a token, by the weights of texts, over everything that is held out."""
    total, mass = 0.0, 0.0
    for part in parts:
        batch = write(part)
        total += float(language.loss(model.language, model.prefix(batch), batch.texts))
        mass += float(batch.texts.mass)
    lm = total / mass
    return {"loss": lm, "lm": lm, "perplexity": math.exp(lm) if lm < 700 else math.inf}


def of_captions(told: Iterable[tuple[Sequence[Record], Sequence[str]]]) -> dict[str, float]:
    """BLEU-4 and CIDEr-D of what is written of pictures."""
    return scores(
        [Caption(text, record.captions) for records, texts in told for record, text in zip(records, texts, strict=True)]
    )


@dataclass(frozen=True)
class Put:
    """Questions of a batch whose rows are theirs, and what the language model reads of each."""

    batch: Written
    questions: list[Question]
    reads: list[str]


def answers(model: Stage2, put: Put, longest: int = 10) -> list[str]:
    """Greedy ones; 10 tokens at most, as LAVIS has it."""
    return writing.texts(model.language, model.prefix(put.batch), put.reads, longest)


def of_answers(told: Iterable[tuple[Sequence[Question], Sequence[str]]]) -> dict[str, float]:
    """Accuracy of answers to questions."""
    means = Means()
    for asked, said in told:
        for question, answer in zip(asked, said, strict=True):
            means.add("accuracy", accuracy(answer, question.given), 1)
    return means.found()
