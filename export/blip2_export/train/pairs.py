"""The two stages on real image–caption pairs, around the frozen ViT and language model of a BLIP-2 folder."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, Blip2ForConditionalGeneration, Blip2QFormerConfig, PreTrainedTokenizerFast

from blip2_export.train import checkpoint, stage1, stage2
from blip2_export.train.features import Pairs
from blip2_export.train.frozen import frozen
from blip2_export.train.images import CaptionedImages, DataError, PixelPairs
from blip2_export.train.language import Texts
from blip2_export.train.loop import Phase, Task, fit
from blip2_export.train.qformer import QFormer
from blip2_export.train.text import N_QUERIES, Packed, Packer, Text, train_qformer_tokenizer


@dataclass(frozen=True)
class Setup:
    """Where data, frozen models and results lie.

    `base` is a BLIP-2 OPT folder: its ViT, language model, tokenizer and dimensions are used, its Q-Former is not. `bert` is an
    optional BERT folder that the Q-Former and its tokenizer start from, as in the paper; otherwise it starts from nothing
    and its tokenizer is trained on the captions.
    """

    data: CaptionedImages
    base: Path
    work: Path
    bert: Path | None = None
    batch_size: int = 64
    prompt: str = ""


def train_stage1(setup: Setup, phase: Phase) -> None:
    """ITC + ITM + ITG; leaves `stage1.pt` and the Q-Former's tokenizer in the work folder."""
    base = _base(setup.base)
    eye = base.vision_model
    side = eye.config.image_size
    tokenizer = _qformer_tokenizer(setup)
    stage = stage1.Stage1(_qformer(setup, base, len(tokenizer)), tokenizer)

    def losses(batch: PixelPairs) -> dict[str, Tensor]:
        return stage.losses(Pairs(_features(eye, batch.pixels), batch.captions, batch.true))

    with frozen(eye, "vision model"):
        fit(phase, Task(stage.model, lambda step: setup.data.batch(step, setup.batch_size, side), losses))


def train_stage2(setup: Setup, phase: Phase, out: Path) -> None:
    """The LM loss on `prompt` + caption; writes the Hugging Face folder `out`."""
    base = _base(setup.base)
    first = _qformer(setup, base, len(_qformer_tokenizer(setup)))
    _load_stage1(first, setup.work / "stage1.pt")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(setup.base)
    eye, second, packer = base.vision_model, stage2.Stage2(first, Texts(base.language_model)), Packer(tokenizer)
    side = eye.config.image_size

    def make_batch(step: int) -> tuple[Tensor, Packed]:
        batch = setup.data.batch(step, setup.batch_size, side)
        texts = [[Text("caption", setup.prompt, f"{' ' * bool(setup.prompt)}{c}\n")] for c in batch.captions]
        return batch.pixels, packer.pack(texts)

    with frozen(eye, "vision model"), frozen(base.language_model, "language model"):
        fit(phase, Task(second, make_batch, lambda batch: second.losses((_features(eye, batch[0]), batch[1]))))
    checkpoint.write_stage2(out, eye, second, tokenizer)


def _base(folder: Path) -> Any:
    try:
        model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a BLIP-2 folder ({error})") from error
    if model.config.text_config.model_type != "opt" or model.config.num_query_tokens != N_QUERIES:
        raise DataError(f"{folder}: stages are trained around OPT with {N_QUERIES} query tokens")
    return model.requires_grad_(False).eval()


def _features(eye: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return eye(pixels).last_hidden_state


def _qformer_tokenizer(setup: Setup) -> PreTrainedTokenizerFast:
    folder = setup.work / "qformer_tokenizer"
    if not (folder / "tokenizer.json").exists():
        if setup.bert:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(setup.bert)
            tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        else:
            captions = [c for _, said in setup.data.items for c in said]
            random.Random(0).shuffle(captions)
            tokenizer = train_qformer_tokenizer(iter(captions[:100_000]), vocab_size=30_000)
        tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _qformer(setup: Setup, base: Any, vocab_size: int) -> QFormer:
    torch.manual_seed(1)
    shape = {**base.config.qformer_config.to_dict(), "vocab_size": vocab_size, "use_qformer_text_input": True}
    q = QFormer(Blip2QFormerConfig(**shape), base.config.num_query_tokens, base.config.image_text_hidden_size)
    if setup.bert:
        _start_from_bert(q, setup.bert)
    return q


def _start_from_bert(q: QFormer, folder: Path) -> None:
    """Self-attention, both feed-forward branches and embeddings from BERT; cross-attention stays new (paper, section 3.1)."""
    bert = AutoModel.from_pretrained(folder).state_dict()
    own = q.qformer.state_dict()
    with torch.no_grad():
        for name, value in own.items():
            plain = name.replace(".attention.attention.", ".attention.self.").replace("_query.", ".")
            if "crossattention" not in name and plain in bert and bert[plain].shape == value.shape:
                value.copy_(bert[plain])
        words = q.embeddings.word_embeddings.weight
        known = bert["embeddings.word_embeddings.weight"]
        if known.shape[1] != words.shape[1]:
            raise DataError(f"{folder}: BERT is {known.shape[1]} wide, the Q-Former {words.shape[1]}")
        words[: len(known)] = known
        positions = bert["embeddings.position_embeddings.weight"]
        n = min(len(positions), len(q.embeddings.position_embeddings.weight))
        q.embeddings.position_embeddings.weight[:n] = positions[:n]


def _load_stage1(q: QFormer, file: Path) -> None:
    if not file.exists():
        raise DataError(f"{file} is missing; run `train stage1` with the same --work first")
    state = torch.load(file, weights_only=True)["model"]
    try:
        q.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{file} belongs to another Q-Former; use the --base and --work of stage 1") from error
