"""The Q-Former's first weights and its tokenizer: of BERT as in the paper, of a checkpoint, of stage 1, or of nothing."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedTokenizerFast

from blip2_export.read.checkpoint import Checkpoint
from blip2_export.train.own.base import Base
from blip2_export.train.own.sources import DataError
from blip2_export.train.qformer import QFormer
from blip2_export.train.text import train_qformer_tokenizer

_VOCABULARY = 30_000
_READ = 100_000  # captions that a new vocabulary is made of
# What checkpoints call the parts of `QFormer`.
_HEADS = {
    "cls.predictions.transform.dense.": "transform.0.",
    "cls.predictions.transform.LayerNorm.": "transform.2.",
    "cls.predictions.bias": "head_bias",
    "temp": "temperature",
}


@dataclass(frozen=True)
class Start:
    """Where the weights come from, in this order of preference; what none of them has is new.

    `bert`: a BERT folder. `qformer`: a checkpoint of stage 1 (a retrieval folder) or of another BLIP-2.
    """

    bert: Path | None = None
    qformer: Checkpoint | None = None
    n_queries: int | None = None
    seed: int = 1


def tokenizer(work: Path, start: Start, captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """The Q-Former's, kept in the work folder: of where its weights come from, or one trained on the captions."""
    folder = work / "qformer_tokenizer"
    if not (folder / "tokenizer.json").exists():
        _new_tokenizer(start, captions).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _new_tokenizer(start: Start, captions: Iterable[str]) -> PreTrainedTokenizerFast:
    if start.qformer is not None and start.qformer.has("embeddings.word_embeddings.weight"):
        folder = start.qformer.folder
        nested = folder / "qformer_tokenizer"
        return PreTrainedTokenizerFast.from_pretrained(nested if nested.is_dir() else folder)
    if start.bert:
        made = PreTrainedTokenizerFast.from_pretrained(start.bert)
        made.add_special_tokens({"bos_token": "[DEC]"})
        return made
    said = list(captions)
    random.Random(0).shuffle(said)
    return train_qformer_tokenizer(iter(said[:_READ]), vocab_size=_VOCABULARY)


def qformer(base: Base, start: Start, n_words: int) -> QFormer:
    """A Q-Former of the base's shape, with the weights that there are."""
    torch.manual_seed(start.seed)
    made = QFormer(
        base.qformer_config(n_words),
        start.n_queries or base.config.num_query_tokens,
        base.config.image_text_hidden_size,
    )
    if start.bert:
        _fill_from_bert(made, start.bert)
    if start.qformer is not None:
        _fill_from_checkpoint(made, start.qformer)
    return made


def _fill_from_bert(made: QFormer, folder: Path) -> None:
    """Self-attention, both feed-forward branches and embeddings; cross-attention stays new (paper, section 3.1)."""
    try:
        bert = AutoModel.from_pretrained(folder).state_dict()
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no BERT that can be read ({error})") from error
    known, width = bert.get("embeddings.word_embeddings.weight"), made.cfg.hidden_size
    if known is None or known.shape[1] != width:
        found = "no BERT" if known is None else f"{known.shape[1]} wide"
        raise DataError(f"{folder}: it is {found}, the Q-Former {width} wide")
    with torch.no_grad():
        for name, value in made.qformer.state_dict().items():
            plain = name.replace(".attention.attention.", ".attention.self.").replace("_query.", ".")
            if "crossattention" not in name and plain in bert and bert[plain].shape == value.shape:
                value.copy_(bert[plain])
        _fill_rows(made.embeddings.word_embeddings.weight, known)
        _fill_rows(made.embeddings.position_embeddings.weight, bert["embeddings.position_embeddings.weight"])


def _fill_rows(table: Tensor, known: Tensor) -> None:
    n = min(len(table), len(known))
    table[:n] = known[:n]


def _fill_from_checkpoint(made: QFormer, checkpoint: Checkpoint) -> None:
    """Every tensor of the same name and shape; queries are taken as far as there are any."""
    own = {**made.state_dict(), "query_tokens": made.query_tokens}
    taken = 0
    with torch.no_grad():
        for name in checkpoint.names():
            target = own.get(_own_name(name))
            if target is None:
                continue
            value = torch.from_numpy(checkpoint.tensor(name).astype("float32"))
            if name == "query_tokens" and value.shape[-1] == target.shape[-1]:
                n = min(value.shape[-2], target.shape[-2])
                target[..., :n, :] = value[..., :n, :]
            elif value.shape == target.shape:
                target.copy_(value)
            else:
                continue
            taken += 1
    if not taken:
        raise DataError(f"{checkpoint.folder}: nothing of its Q-Former fits into one of this base")


def _own_name(name: str) -> str:
    for there, here in _HEADS.items():
        if name.startswith(there):
            return here + name[len(there) :]
    return name


def parts(model: QFormer) -> dict[str, Any]:
    """Modules and tensors of stage 1 by the names that checkpoints have."""
    named = {
        name: getattr(model, name)
        for name in ("qformer", "embeddings", "vision_projection", "text_projection", "itm_head")
    }
    heads = {
        "cls.predictions.transform.dense": model.transform[0],
        "cls.predictions.transform.LayerNorm": model.transform[2],
    }
    return {**named, **heads}
