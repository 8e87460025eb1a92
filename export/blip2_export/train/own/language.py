"""The loss of a frozen language model behind a soft prompt (Li et al. 2023, section 3.3): OPT writes on, Flan-T5 answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2_export.train.own.hardware import lifted
from blip2_export.train.own.sources import DataError

_IGNORED = -100


@dataclass(frozen=True)
class Text:
    """What the model reads, what it should write, and how much that counts. `picture`: the place of its picture in the batch."""

    picture: int
    read: str
    written: str
    weight: float = 1.0


@dataclass
class Texts:
    """Token ids of a batch, padded. `labels`: -100 where nothing is learnt. `weights` [rows]; `picture` [rows]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    weights: Tensor
    picture: Tensor

    def to(self, device: torch.device) -> Texts:
        """The same on another device."""
        return Texts(*(getattr(self, name).to(device) for name in ("ids", "mask", "labels", "weights", "picture")))

    def rows(self, which: slice) -> Texts:
        """Some of them."""
        return Texts(*(getattr(self, name)[which] for name in ("ids", "mask", "labels", "weights", "picture")))

    @property
    def mass(self) -> Tensor:
        """Weighted tokens that are learnt: what the sum of losses is divided by."""
        return ((self.labels != _IGNORED).sum(1) * self.weights).sum()


@dataclass
class SoFar:
    """Texts that are being written; `places`: where in `logits` of them each row's next token is."""

    texts: Texts
    places: list[int]


class Language(Protocol):
    """A language model with its texts.

    `width`: of its embeddings. `projected`: of what `transformers` projects queries to, which is wider where embeddings are
    projected, too. `ends`: tokens that end what it writes.
    """

    model: nn.Module
    tokenizer: Any
    width: int
    projected: int
    ends: set[int]

    def texts(self, rows: Sequence[Text]) -> Texts: ...
    def logits(self, prefix: Tensor, texts: Texts) -> Tensor: ...
    def so_far(self, reads: Sequence[str], written: Sequence[list[int]]) -> SoFar: ...


def of_family(family: str, model: Any, tokenizer: Any, max_length: int = 32) -> Language:
    """For `opt` or `t5`."""
    return {"opt": Opt, "t5": T5}[family](model, tokenizer, max_length)


def loss(language: Language, prefix: Tensor, texts: Texts) -> Tensor:
    """The weighted sum over tokens; `texts.mass` makes a mean of it."""
    logits = lifted(language.logits(prefix, texts))
    each = F.cross_entropy(logits.transpose(1, 2), texts.labels, reduction="none", ignore_index=_IGNORED)
    return (each.sum(1) * texts.weights).sum()


class Opt:
    """Reads `</s>`, what it is given to read and what it should have written; a line break ends a text.

    Without anything to read, `</s>` itself is learnt too, as in LAVIS.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.width = int(model.get_input_embeddings().embedding_dim)
        self.projected = int(model.config.hidden_size)
        self.ends = {self._ids("\n")[-1], int(model.config.eos_token_id)}

    def texts(self, rows: Sequence[Text]) -> Texts:
        encoded = []
        for row in rows:
            read = self._ids(row.read) if row.read else []
            written = self._ids(f"{' ' if row.read and not row.read.endswith(' ') else ''}{row.written}")
            line_end = self._ids("\n")
            written = written[: max(1, self.max_length)] + line_end
            start = [self.model.config.bos_token_id]
            labels = [_IGNORED] * (len(start) + len(read)) if read else start
            encoded.append((start + read + written, labels + written))
        return _padded(encoded, rows, self.model.config.pad_token_id)

    def logits(self, prefix: Tensor, texts: Texts) -> Tensor:
        embeds = self.model.get_input_embeddings()(texts.ids)
        n = prefix.shape[1]
        mask = torch.cat([texts.mask.new_ones(len(prefix), n), texts.mask], 1)
        found = self.model(
            inputs_embeds=torch.cat([prefix.to(embeds.dtype), embeds], 1), attention_mask=mask, use_cache=False
        )
        # Position n - 1 says the first of the text.
        return found.logits[:, n - 1 : -1]

    def so_far(self, reads: Sequence[str], written: Sequence[list[int]]) -> SoFar:
        start = [self.model.config.bos_token_id]
        rows = [start + (self._ids(read) if read else []) + ids for read, ids in zip(reads, written, strict=True)]
        # `logits` has no place behind the last token, so there is one more, which nothing attends to.
        encoded = [([*row, start[0]], start) for row in rows]
        texts = _padded(encoded, [Text(n, "", "") for n in range(len(rows))], self.model.config.pad_token_id)
        return SoFar(texts, [len(row) for row in rows])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


class T5:
    """Its encoder reads the soft prompt and what is given to read; its decoder learns what should be written, up to `</s>`."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.width = int(model.get_input_embeddings().embedding_dim)
        self.projected = int(model.config.hidden_size)
        self.ends = {int(model.config.eos_token_id)}

    def texts(self, rows: Sequence[Text]) -> Texts:
        encoded = [(self._ids(row.read), self._ids(row.written)) for row in rows]
        return _padded(encoded, rows, self.model.config.pad_token_id)

    def logits(self, prefix: Tensor, texts: Texts) -> Tensor:
        embeds = self.model.get_input_embeddings()(texts.ids)
        mask = torch.cat([texts.mask.new_ones(prefix.shape[:2]), texts.mask], 1)
        found = self.model(
            inputs_embeds=torch.cat([prefix.to(embeds.dtype), embeds], 1),
            attention_mask=mask,
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(texts.labels),
            use_cache=False,
        )
        return found.logits

    def so_far(self, reads: Sequence[str], written: Sequence[list[int]]) -> SoFar:
        # The label of the next token is not seen by its own place.
        encoded = [(self._ids(read), [*ids, 0]) for read, ids in zip(reads, written, strict=True)]
        texts = _padded(encoded, [Text(n, "", "") for n in range(len(encoded))], self.model.config.pad_token_id)
        return SoFar(texts, [len(ids) for ids in written])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, truncation=True, max_length=self.max_length).input_ids)


def split(caption: str, rng: random.Random) -> tuple[str, str]:
    """A caption as a prefix and the rest, cut after a word from the first to the middle one, as the authors say they do."""
    words = caption.split()
    if len(words) < 2:
        return "", caption
    cut = rng.randint(1, max(1, len(words) // 2))
    return " ".join(words[:cut]), " ".join(words[cut:])


def _padded(encoded: Sequence[tuple[list[int], list[int]]], rows: Sequence[Text], pad: int | None) -> Texts:
    if not encoded:
        raise DataError("a batch has no text")
    n_read, n_labels = (max(len(row[i]) for row in encoded) for i in (0, 1))
    fill = 1 if pad is None else pad
    ids = torch.tensor([read + [fill] * (n_read - len(read)) for read, _ in encoded])
    mask = torch.tensor([[1] * len(read) + [0] * (n_read - len(read)) for read, _ in encoded])
    labels = torch.tensor([written + [_IGNORED] * (n_labels - len(written)) for _, written in encoded])
    weights = torch.tensor([row.weight for row in rows])
    return Texts(ids, mask, labels, weights, torch.tensor([row.picture for row in rows]))
