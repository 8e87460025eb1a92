"""The demo's T5-shaped language model: its tokenizer, its texts and its pre-training on text alone.

The encoder reads the description of a scene (32 tokens) and behind it a question, or the first words of a caption; the decoder
writes the answer, or the rest of the caption (prefix language modelling, Li et al. 2023, section 3.3). In stage 2 the 32 projected
queries take the description's place.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from blip2_export import vocabulary
from blip2_export.scenes import drawing
from blip2_export.train import speaker as speakers
from blip2_export.train import text
from blip2_export.train.loop import Phase
from blip2_export.train.speaker import Speaker
from blip2_export.train.text import Mixture

PAD, END = 0, 1
ASK_PROMPT = "Question: {} Short answer:"
_SPREAD = 0.04  # of embeddings at the start
# In tokens: targets up to each, and longer ones, are decoded apart, or answers would be mostly padding.
_LENGTHS = (4, 16)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A unigram model of whole words, and of single characters for every other word."""
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary.unigram(texts),
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_max_length=512,
    )


def tokenizer(work: Path) -> PreTrainedTokenizerFast:
    """Trained at the first call and kept in `work`."""
    folder = work / "t5_tokenizer"
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(text.corpus(2000, "tokenizers", ASK_PROMPT)).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def config(tokenizer: PreTrainedTokenizerFast) -> T5Config:
    """Four encoder and two decoder layers of width 128; the exact GELU and the untied head of BLIP-2's Flan-T5.

    All layers share one position bias a head, so that there must be heads enough for the distances and for the words.
    """
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=16,
        d_ff=256,
        num_layers=4,
        num_decoder_layers=2,
        num_heads=8,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        pad_token_id=PAD,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=PAD,
    )


@dataclass
class Asked:
    """Rows that read a prefix and a prompt and write a target.

    `scene` [rows]: whose prefix a row reads. `prompt` and its `mask` [rows, length]. `labels` [rows, length], -100 behind the end.
    `weights` [rows]. `kinds[row]` names the text.
    """

    scene: Tensor
    prompt: Tensor
    mask: Tensor
    labels: Tensor
    weights: Tensor
    kinds: list[str]

    def groups(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The numbers of rows with targets of like lengths, and their labels without the common end of padding."""
        lengths = (self.labels != -100).sum(1)
        group = torch.bucketize(lengths, torch.tensor(_LENGTHS))
        for k in range(len(_LENGTHS) + 1):
            rows = (group == k).nonzero()[:, 0]
            if len(rows):
                yield rows, self.labels[rows, : int(lengths[rows].max())]


class Batcher(text.Encoder):
    """Turns texts into `Asked` batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer, special=True)

    def pack(self, rows: list[list[text.Text]]) -> Asked:
        every = [(i, t) for i, texts in enumerate(rows) for t in texts]
        prompts = [torch.tensor(self.encode(t.prompt)) for _, t in every]
        targets = [torch.tensor(self.encode(t.target)) for _, t in every]
        return Asked(
            torch.tensor([i for i, _ in every]),
            pad_sequence(prompts, batch_first=True, padding_value=PAD),
            pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True),
            pad_sequence(targets, batch_first=True, padding_value=-100),
            torch.tensor([text.target_weight(t) for _, t in every]),
            [t.kind for _, t in every],
        )


class Texts(nn.Module):
    """A T5 with the loss over asked texts.

    Its layers add what they find to what they read, which nothing normalises: a prefix that is far larger than words (at full rate
    it grows to twelve times their size) drowns what they write, and looking things up is learned more slowly.
    """

    projection = speakers.Projection(spread=0.007, rate=0.1)

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    @property
    def width(self) -> int:
        """Of a query in the soft prompt."""
        return int(self.model.config.d_model)

    def described(self, ids: Tensor) -> Tensor:
        """Descriptions [batch, 32] as a prefix [batch, 32, width]."""
        prefix: Tensor = self.model.get_input_embeddings()(ids)
        return prefix

    def logits(self, prefix: Tensor, asked: Asked) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The groups of `asked` with their logits [rows, length, vocab] behind `prefix` [scenes, 32, width]."""
        words = self.model.get_input_embeddings()(asked.prompt)
        embeds = torch.cat([prefix[asked.scene], words], 1)
        mask = torch.cat([asked.mask.new_ones(len(words), prefix.shape[1]), asked.mask], 1)
        hidden = self.model.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        for rows, labels in asked.groups():
            # Given labels rather than shifted ids, the model builds the decoder's input as the reference's trainer does.
            out = self.model(encoder_outputs=(hidden[rows],), attention_mask=mask[rows], labels=labels, use_cache=False)
            yield rows, labels, out.logits

    def losses(self, prefix: Tensor, asked: Asked) -> dict[str, Tensor]:
        groups = list(self.logits(prefix, asked))
        total = prefix.new_zeros(())
        for rows, labels, logits in groups:
            each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
            total = total + (each * asked.weights[rows, None]).sum()
        weight = (asked.weights[:, None] * (asked.labels != -100)).sum()
        out = {"lm": total / weight}
        if (right := text.answers_right(right_by_kind(groups, asked.kinds))) is not None:
            out["_answers_right"] = torch.tensor(right)
        return out


class Placed(Texts):
    """Each word of a description carries two learned vectors: of its object's slot, and of its place among the slot's words.

    T5 knows distances only; without these vectors it learned to look up next to nothing in 1,400 steps. They are left behind
    with the descriptions: queries that stand for them find their own.
    """

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__(model)
        self.slots = nn.Parameter(_SPREAD * torch.randn(drawing.MAX_OBJECTS, 1, self.width))
        self.roles = nn.Parameter(_SPREAD * torch.randn(1, text.N_QUERIES // drawing.MAX_OBJECTS, self.width))

    def described(self, ids: Tensor) -> Tensor:
        return super().described(ids) + (self.slots + self.roles).flatten(0, 1)


def right_by_kind(groups: Iterable[tuple[Tensor, Tensor, Tensor]], kinds: list[str]) -> dict[str, tuple[int, int]]:
    """(right, all) texts per kind; right when every token of the target is the most probable one after the true tokens.

    `groups`: as `Texts.logits` gives them. `kinds`: of all rows.
    """
    counts: dict[str, tuple[int, int]] = {}
    for rows, labels, logits in groups:
        right = ((logits.argmax(-1) == labels) | (labels == -100)).all(1)
        for row, ok in zip(rows.tolist(), right.tolist(), strict=True):
            text.add_counts(counts, {kinds[row]: (ok, 1)})
    return counts


def texts_of(scene: drawing.Scene, rng: random.Random, mixture: Mixture, split: bool = True) -> list[text.Text]:
    """Texts about one scene. `split`: half of the captions are given up to a random word, and the decoder writes the rest."""
    said = []
    for one in text.texts_of(scene, rng, mixture, ASK_PROMPT):
        prompt, target = one.prompt, one.target.strip()
        if one.kind == "caption" and split and rng.random() < 0.5:
            words = target.split()
            here = rng.randrange(1, len(words))
            prompt, target = " ".join(words[:here]), " ".join(words[here:])
        said.append(text.Text(one.kind, prompt, target))
    return said


def _mixture(share: float) -> Mixture:
    """Lookup is learned on questions, and then put to use in captions."""
    return Mixture(1, 8) if share < 0.75 else Mixture(4, 6)


def pretrain(phase: Phase, tokenizer: PreTrainedTokenizerFast, batch_size: int = 24) -> T5ForConditionalGeneration:
    """Trains (or goes on training) the language model and returns it."""
    torch.manual_seed(0)
    model = Placed(new(tokenizer))
    # T5 does not divide its scores: `q` holds the root of the head dimension, and a position bias of some units must move far at a
    # rate that suits weights of some hundredths.
    faster = {"relative_attention_bias.weight": 30.0, "Attention.q.weight": model.model.config.d_kv**-0.5}
    speakers.pretrain(phase, speaker(model, Batcher(tokenizer)), batch_size, _mixture, faster)
    return model.model


def new(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """With a head of its own, which `transformers` ties until it loads one from a file.

    T5's own embeddings start with a deviation of 1, which suits its optimiser and drowns what the first layers write.
    """
    model = T5ForConditionalGeneration(config(tokenizer))
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("shared.weight", "lm_head.weight"):
                parameter.normal_(0, _SPREAD)
            elif name.endswith("relative_attention_bias.weight"):
                parameter.normal_(0, 0.5)
    return model


def speaker(model: Texts, batcher: Batcher) -> Speaker:
    return Speaker(
        model,
        batcher.description,
        texts_of,
        lambda kind, asked, answer: text.Text(kind, ASK_PROMPT.format(asked), answer),
        batcher.pack,
        lambda prefix, asked: right_by_kind(model.logits(prefix, asked), asked.kinds),
        lambda prefix: speakers.greedy(model.model, prefix, END, batcher.tokenizer),
    )
