"""Questions (Li et al. 2023, section 4.2): the question goes into the Q-Former, image encoder and Q-Former are trained at a higher
resolution, the language model stays as it is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from blip2_export.read import tokenizers
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.train.own import language
from blip2_export.train.own.base import Base
from blip2_export.train.own.records import Question, Record, passed_over
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.stage2 import Stage2
from blip2_export.train.qformer import QFormer

PROMPT = "Question: {} Answer:"
SIDE = 490  # appendix, VQA
TOKENS = 32  # of a question, that the Q-Former reads


@dataclass
class Asked:
    """What the Q-Former reads of each row, and what the language model reads and writes."""

    ids: Tensor
    mask: Tensor
    texts: language.Texts

    @property
    def mass(self) -> Tensor:
        """What the loss is divided by."""
        return self.texts.mass

    def to(self, device: torch.device) -> Asked:
        """The same on another device."""
        return Asked(self.ids.to(device), self.mask.to(device), self.texts.to(device))


@dataclass(frozen=True)
class Asking:
    """Who answers, what the Q-Former reads questions with, if it does, and how many are asked of a picture at once."""

    speaks: language.Language
    tokenizer: Any
    n_questions: int


def asked(asking: Asking) -> Callable[[list[Record], Sequence[random.Random], Tensor], Asked]:
    """Questions of each picture; each of their answers is a row with its weight, as LAVIS trains."""

    def say(records: list[Record], rngs: Sequence[random.Random], _: Tensor) -> Asked:
        rows, questions = [], []
        for place, (record, rng) in enumerate(zip(records, rngs, strict=True)):
            for question in _drawn(asking, record, rng):
                for answer, weight in question.answers:
                    rows.append(language.Text(place, PROMPT.format(question.text), answer, weight))
                    questions.append(question.text)
        return Asked(*_read(asking.tokenizer, questions), asking.speaks.texts(rows))

    return say


@dataclass
class Put:
    """Questions, once each, and what the language model reads of them."""

    asked: Asked
    questions: list[Question]
    reads: list[str]


def put(asking: Asking) -> Callable[[list[Record], Sequence[random.Random], Tensor], Put]:
    """Questions of each picture, to be answered."""

    def say(records: list[Record], rngs: Sequence[random.Random], _: Tensor) -> Put:
        rows, found = [], []
        for place, (record, rng) in enumerate(zip(records, rngs, strict=True)):
            for question in _drawn(asking, record, rng):
                rows.append(language.Text(place, PROMPT.format(question.text), question.answers[0][0]))
                found.append(question)
        asked = Asked(*_read(asking.tokenizer, [question.text for question in found]), asking.speaks.texts(rows))
        return Put(asked, found, [row.read for row in rows])

    return say


def _drawn(asking: Asking, record: Record, rng: random.Random) -> list[Question]:
    return rng.sample(record.questions, min(asking.n_questions, len(record.questions)))


def _read(tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """What the Q-Former reads: nothing without a tokenizer."""
    if tokenizer is None:
        return torch.zeros(2, len(texts), 0, dtype=torch.long).unbind()
    read = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    return read.input_ids, read.attention_mask


def model(base: Base, first: QFormer, side: int, speaks: language.Language) -> Stage2:
    """Everything of the base at another size, with the text branch of `first` in its Q-Former."""
    made = Stage2(_reader(base, first), base.model.query_tokens, speaks)
    made.language_projection.load_state_dict(base.model.language_projection.state_dict())
    made.eye = base.eye(side)
    made.embeddings = first.embeddings
    return made


def _reader(base: Base, first: QFormer) -> Blip2QFormerModel:
    """The base's Q-Former, whose feed-forward layers of texts come from stage 1 where it has none."""
    made = Blip2QFormerModel(first.cfg)
    own, texts = base.model.qformer.state_dict(), first.qformer.state_dict()
    if any(own[name].shape != texts[name].shape for name in own.keys() & texts.keys()):
        raise DataError(f"{base.checkpoint.folder}: its Q-Former has another shape than that of stage 1")
    made.load_state_dict({**texts, **own})
    return made


def reads(base: Base) -> tuple[Any, nn.Module | None]:
    """The tokenizer and the embeddings of the base's own Q-Former, if it reads questions."""
    cfg, checkpoint = base.config.qformer_config, base.checkpoint
    if not cfg.use_qformer_text_input:
        return None, None
    made = Blip2TextEmbeddings(cfg)
    names = [name for name, _ in made.named_parameters()]
    made.load_state_dict({name: base.tensor(f"embeddings.{name}").float() for name in names}, strict=False)
    try:
        return tokenizers.load(checkpoint.tokenizer_folder / "qformer_tokenizer"), made
    except CheckpointError as error:
        raise DataError(str(error)) from error


def check_side(base: Base, side: int) -> None:
    """Refuses a size that is no whole number of patches."""
    patch = base.config.vision_config.patch_size
    if side < patch or side % patch:
        near = max(patch, round(side / patch) * patch)
        raise DataError(f"pictures of {side} pixels are no whole number of patches of {patch}; {near} would be")


def usable(records: list[Record]) -> tuple[list[Record], str]:
    """Records with questions, and what was passed over."""
    return [record for record in records if record.questions], passed_over(records)
