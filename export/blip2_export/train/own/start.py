"""The Q-Former's first weights and its tokenizer: of BERT as in the paper, of a checkpoint, of stage 1, or of nothing."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

from blip2_export.read import tokenizers
from blip2_export.read.adapter import open_folder
from blip2_export.read.checkpoint import RETRIEVAL, Checkpoint, CheckpointError
from blip2_export.read.lavis.qformer import qformer_source
from blip2_export.read.lavis.state import read_state
from blip2_export.train.own import together
from blip2_export.train.own.aside import aside_of
from blip2_export.train.own.base import Base
from blip2_export.train.own.sources import DataError
from blip2_export.train.qformer import QFormer
from blip2_export.train.text import train_qformer_tokenizer

_VOCABULARY = 30_000
_READ = 100_000  # captions that a new vocabulary is made of
_STARTS = "[DEC]"
_WORDS = "embeddings.word_embeddings.weight"
_BY_WORD = (_WORDS, "embeddings.position_embeddings.weight", "head_bias")  # a row for each word, or position
# What checkpoints call the parts of `QFormer`.
_HEADS = {
    "cls.predictions.transform.dense.": "transform.0.",
    "cls.predictions.transform.LayerNorm.": "transform.2.",
    "cls.predictions.bias": "head_bias",
    "temp": "temperature",
}


@dataclass(frozen=True)
class Start:
    """Where the weights come from: what `qformer` has of them, else `bert`, and what none of them has is new.

    `bert`: a BERT folder. `qformer`: a checkpoint of stage 1 (a retrieval folder, a LAVIS file) or of another BLIP-2, as the base.
    """

    bert: Path | None = None
    qformer: Checkpoint | None = None
    n_queries: int | None = None
    seed: int = 1


def tokenizer(work: Path, start: Start, captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """The Q-Former's, kept in the work folder: of where its weights come from, or one trained on the captions."""
    folder = work / "qformer_tokenizer"
    if not (folder / "tokenizer.json").exists():
        _keep(_new_tokenizer(start, captions), folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _keep(made: PreTrainedTokenizerFast, folder: Path) -> None:
    """Whole or not at all."""
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        made.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    except Exception as error:  # tokenizers has no exception of its own
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(f"{folder}: it cannot be written ({error})") from error


def open_qformer(path: Path, bert: Path | None = None) -> Checkpoint:
    """A BLIP-2 folder, or a LAVIS file of stage 1, whose tokenizer is that of the folder `bert`."""
    try:
        return _LavisQFormer(path, bert) if path.is_file() else open_folder(path)
    except CheckpointError as error:
        raise DataError(str(error)) from error


class _LavisQFormer(Checkpoint):
    """What a LAVIS file holds without its image encoder and language model."""

    def __init__(self, file: Path, bert: Path | None) -> None:
        state = {name: value for name, value in read_state(file).items() if not name.startswith("visual_encoder.")}
        if "query_tokens" not in state:
            raise CheckpointError(f"{file}: no Q-Former is in it")
        self._hold(file, {"model_type": "blip-2", "architectures": [RETRIEVAL]}, [qformer_source(file, state)])
        if bert is None and self.has(_WORDS):
            raise CheckpointError(f"{file}: its Q-Former reads texts; name the folder of its tokenizer with --bert")
        self.tokenizer_folder = bert or file.parent


def _new_tokenizer(start: Start, captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """With `[DEC]` as the token that starts a caption."""
    folder = start.bert
    if start.qformer is not None and start.qformer.has(_WORDS):
        nested = start.qformer.tokenizer_folder / "qformer_tokenizer"
        folder = nested if nested.is_dir() else start.qformer.tokenizer_folder
    if folder is None:
        said = list(captions)
        random.Random(0).shuffle(said)
        return train_qformer_tokenizer(iter(said[:_READ]), vocab_size=_VOCABULARY)
    try:
        made = tokenizers.load(folder)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    if made.bos_token != _STARTS:
        made.add_special_tokens({"bos_token": _STARTS})
    return made


def qformer(base: Base, start: Start, n_words: int) -> QFormer:
    """A Q-Former of the base's shape, with the weights that there are."""
    torch.manual_seed(start.seed)
    given = start.qformer
    known = given.tensor("query_tokens").shape[-2] if given is not None and given.has("query_tokens") else None
    made = QFormer(
        base.qformer_config(n_words),
        start.n_queries or known or base.config.num_query_tokens,
        base.config.image_text_hidden_size,
    )
    if start.bert:
        _fill_from_bert(made, start.bert)
    if given is not None:
        _fill_from_checkpoint(made, given)
        _compare_norms(base, given)
    return made


def _fill_from_bert(made: QFormer, folder: Path) -> None:
    """Self-attention, both feed-forward branches, embeddings and the head; cross-attention stays new (paper, section 3.1).

    Types of tokens are left out, as in LAVIS.
    """
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32) if kind == "bert" else None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no BERT that can be read ({error})") from error
    width = made.cfg.hidden_size
    if model is None or model.config.hidden_size != width:
        found = f"{kind}, not BERT" if model is None else f"{model.config.hidden_size} wide"
        raise DataError(f"{folder}: it is {found}, the Q-Former {width} wide")
    known = {_bert_name(name): value for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, value in _own_tensors(made).items():
            plain = name.replace("_query.", ".")
            if "crossattention" not in name and plain in known:
                _fill(value, known[plain], rows=plain in _BY_WORD)


def _bert_name(name: str) -> str:
    """What BERT's tensors are called here."""
    if name.startswith("bert.encoder."):
        return "qformer." + name.removeprefix("bert.").replace(".attention.self.", ".attention.attention.")
    if name.startswith("bert.embeddings.LayerNorm."):
        return name.replace("bert.embeddings.LayerNorm.", "qformer.layernorm.")
    return _own_name(name.removeprefix("bert."))


def _fill_from_checkpoint(made: QFormer, checkpoint: Checkpoint) -> None:
    """Every tensor of the same name and shape; queries, words and positions as far as there are any."""
    own, misfits, taken = _own_tensors(made), list[str](), 0
    there = checkpoint.tensor("query_tokens").shape[-1] if checkpoint.has("query_tokens") else made.cfg.hidden_size
    if there != made.cfg.hidden_size:
        raise DataError(f"{checkpoint.folder}: its Q-Former is {there} wide, that of the base {made.cfg.hidden_size}")
    with torch.no_grad():
        for name in checkpoint.names():
            here = _own_name(name)
            if here not in own:
                continue
            value = torch.from_numpy(checkpoint.tensor(name).astype("float32"))
            if here == "query_tokens":
                fits = _fill(own[here][0], value[0], rows=True)
            else:
                fits = _fill(own[here], value, rows=here in _BY_WORD)
            taken += fits
            misfits += [] if fits else [name]
    if not taken:
        raise DataError(f"{checkpoint.folder}: nothing of its Q-Former fits into one of this base")
    if misfits:
        _warn(f"{checkpoint.folder}: {len(misfits)} tensors have other shapes here and start anew: {misfits[0]}")


def _fill(target: Tensor, value: Tensor, rows: bool) -> bool:
    """Whether it fits. `rows`: their number may be another."""
    if value.shape == target.shape:
        target.copy_(value)
    elif rows and value.shape[1:] == target.shape[1:]:
        n = min(len(target), len(value))
        target[:n] = value[:n]
    else:
        return False
    return True


def _compare_norms(base: Base, checkpoint: Checkpoint) -> None:
    """LAVIS trains the norm behind the image encoder with the Q-Former; here it belongs to the encoder, which is frozen."""
    for kind in ("weight", "bias"):
        name = f"vision_model.post_layernorm.{kind}"
        if checkpoint.has(name):
            there = torch.from_numpy(checkpoint.tensor(name).astype("float32"))
            if not torch.equal(there, base.model.get_parameter(name).float()):
                _warn(
                    f"{checkpoint.folder}: the norm behind its image encoder is not that of {base.checkpoint.folder}, "
                    "so that its Q-Former sees other features than it was trained on"
                )
                return


def tell_unread(path: Path | None, bert: Path | None) -> None:
    """That nothing gives what reads texts: a checkpoint without it, such as stage 2 leaves, and no BERT."""
    if path is not None and bert is None and not open_qformer(path).has(_WORDS):
        _warn(
            f"{path}: its Q-Former reads no texts, as stage 2 leaves it, so that what reads them starts from nothing; name what "
            "stage 1 left, or a --bert"
        )


def fill_projection(made: nn.Linear, checkpoint: Checkpoint) -> None:
    """Where the Q-Former comes from a model with a language model of this width, so does what lies between them."""
    for kind in ("weight", "bias"):
        name, value = f"language_projection.{kind}", made.get_parameter(kind)
        if checkpoint.has(name) and checkpoint.tensor(name).shape == value.shape:
            value.data.copy_(torch.from_numpy(checkpoint.tensor(name).astype("float32")))


def _own_tensors(made: QFormer) -> dict[str, Tensor]:
    return {**made.state_dict(), "query_tokens": made.query_tokens}


def _own_name(name: str) -> str:
    for there, here in _HEADS.items():
        if name.startswith(there):
            return here + name[len(there) :]
    return name


def _warn(said: str) -> None:
    if together.rank() == 0:
        print(f"warning: {said}", file=sys.stderr)


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
