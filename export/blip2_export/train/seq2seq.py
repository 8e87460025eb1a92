"""The demo's T5-shaped language model: its tokenizer, its texts and its pre-training on text alone.

The encoder reads the description of a scene (32 tokens) and behind it a question, or the first words of a caption; the decoder
writes the answer, or the rest of the caption (prefix language modelling, Li et al. 2023, section 3.3). In stage 2 the 32 projected
queries take the description's place.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from blip2_export import scenes
from blip2_export.train import language, text
from blip2_export.train.loop import Phase, fit
from blip2_export.train.speaker import Speaker

PAD, END = 0, 1
ASK_PROMPT = "Question: {} Short answer:"
_UNKNOWN = 2
# T5 does not divide its scores: `q` holds the root of the head dimension, and a position bias of some units must move far at a
# rate that suits weights of some hundredths.
_BIAS_RATE = 30.0


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A unigram model of whole words with their log-probabilities, and of single characters for every other word."""
    counts = Counter(word for line in texts for word in line.split())
    total = sum(counts.values())
    words = sorted((f"▁{word}", math.log(n / total)) for word, n in counts.items() if n > 1)
    known = {word for word, _ in words}
    letters = sorted({"▁", *map(chr, range(33, 127))} - known)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0), *words, *((letter, -15.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
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
    """Four encoder and three decoder layers of width 128; the exact GELU and the untied head of BLIP-2's Flan-T5."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=4,
        num_decoder_layers=3,
        num_heads=4,
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


class Batcher:
    """Turns texts into `Asked` batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, Tensor] = {}

    def encode(self, words: str) -> Tensor:
        """Token ids with `</s>` at the end."""
        if words not in self.known:
            if len(self.known) > 200_000:
                self.known.clear()
            self.known[words] = torch.tensor(self.tokenizer.encode(words))
        return self.known[words]

    def description(self, scene: scenes.Scene) -> list[int]:
        ids = self.encode(scenes.describe(scene))[:-1]
        if len(ids) != text.N_QUERIES:
            raise ValueError(f"a description has {len(ids)} tokens, expected {text.N_QUERIES}: a word was split")
        return list(map(int, ids))

    def pack(self, rows: list[list[text.Text]]) -> Asked:
        every = [(i, t) for i, texts in enumerate(rows) for t in texts]
        prompts = [self.encode(t.prompt) for _, t in every]
        return Asked(
            torch.tensor([i for i, _ in every]),
            pad_sequence(prompts, batch_first=True, padding_value=PAD),
            pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True),
            pad_sequence([self.encode(t.target) for _, t in every], batch_first=True, padding_value=-100),
            torch.tensor([1.0 if t.kind in ("caption", "report") else text.ANSWER_WEIGHT for _, t in every]),
            [t.kind for _, t in every],
        )


class Texts(nn.Module):
    """A T5 with the loss over asked texts."""

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    @property
    def width(self) -> int:
        """Of a query in the soft prompt."""
        return int(self.model.config.d_model)

    def logits(self, prefix: Tensor, asked: Asked) -> Tensor:
        """Logits of the targets [rows, length, vocab] behind `prefix` [scenes, 32, width]."""
        words = self.model.get_input_embeddings()(asked.prompt)
        embeds = torch.cat([prefix[asked.scene], words], 1)
        mask = torch.cat([asked.mask.new_ones(len(words), prefix.shape[1]), asked.mask], 1)
        # Given labels rather than shifted ids, the model builds the decoder's input as the reference's trainer does.
        return self.model(inputs_embeds=embeds, attention_mask=mask, labels=asked.labels, use_cache=False).logits

    def losses(self, prefix: Tensor, asked: Asked) -> dict[str, Tensor]:
        logits = self.logits(prefix, asked)
        each = F.cross_entropy(logits.transpose(1, 2), asked.labels, reduction="none", ignore_index=-100)
        weights = asked.weights[:, None] * (asked.labels != -100)
        counts = right_by_kind(logits.detach(), asked)
        out = {"lm": (each * weights).sum() / weights.sum()}
        if answers := [v for k, v in counts.items() if k in scenes.QUESTION_KINDS]:
            out["_answers_right"] = torch.tensor(sum(r for r, _ in answers) / sum(n for _, n in answers))
        return out


def right_by_kind(logits: Tensor, asked: Asked) -> dict[str, tuple[int, int]]:
    """(right, all) texts per kind; right when every token of the target is the most probable one after the true tokens."""
    right = ((logits.argmax(-1) == asked.labels) | (asked.labels == -100)).all(1)
    counts: dict[str, tuple[int, int]] = {}
    for kind, ok in zip(asked.kinds, right.tolist(), strict=True):
        before = counts.get(kind, (0, 0))
        counts[kind] = (before[0] + ok, before[1] + 1)
    return counts


def texts_of(
    scene: scenes.Scene, rng: random.Random, n_captions: int, n_questions: int, report: bool, split: bool = True
) -> list[text.Text]:
    """Texts about one scene. `split`: half of the captions are given up to a random word, and the decoder writes the rest."""
    said = []
    for one in language.texts_of(scene, rng, n_captions, n_questions, report, ASK_PROMPT):
        prompt, target = one.prompt, one.target.strip()
        if one.kind == "caption" and split and rng.random() < 0.5:
            words = target.split()
            here = rng.randrange(1, len(words))
            prompt, target = " ".join(words[:here]), " ".join(words[here:])
        said.append(text.Text(one.kind, prompt, target))
    return said


def pretrain(phase: Phase, tokenizer: PreTrainedTokenizerFast, batch_size: int = 24) -> T5ForConditionalGeneration:
    """Trains (or goes on training) the language model and returns it."""
    torch.manual_seed(0)
    model, batcher = Texts(new(tokenizer)), Batcher(tokenizer)

    def make_batch(step: int) -> Any:
        rng = random.Random(f"text {step}")
        found = [language.scene_to_read(rng, step / phase.schedule.steps) for _ in range(batch_size)]
        rows = [texts_of(s, rng, 1, 8, rng.random() < 0.2) for s in found]
        return torch.tensor([batcher.description(s) for s in found]), batcher.pack(rows)

    def losses(batch: tuple[Tensor, Asked]) -> dict[str, Tensor]:
        ids, asked = batch
        return model.losses(model.model.get_input_embeddings()(ids), asked)

    fit(
        phase,
        model,
        make_batch,
        losses,
        evaluate=lambda: gate(model, batcher),
        evaluate_every=500,
        faster={"relative_attention_bias.weight": _BIAS_RATE, "Attention.q.weight": model.model.config.d_kv**-0.5},
    )
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
                parameter.normal_(0, 0.04)
            elif name.endswith("relative_attention_bias.weight"):
                parameter.normal_(0, 0.5)
    return model


def gate(model: Texts, batcher: Batcher) -> dict[str, float]:
    """Share of right texts per kind on held-out scenes, from their true description."""
    rng = random.Random("text gate")
    counts: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for _ in range(6):
        found = [scenes.sample_scene(rng) for _ in range(50)]
        asked = batcher.pack([texts_of(s, rng, 1, 6, False) for s in found])
        prefix = model.model.get_input_embeddings()(torch.tensor([batcher.description(s) for s in found]))
        for kind, (right, n) in right_by_kind(model.logits(prefix, asked), asked).items():
            counts[kind] += right
            total[kind] += n
    return {k: round(counts[k] / total[k], 4) for k in sorted(total)}


def speaker(model: Texts, batcher: Batcher) -> Speaker:
    return Speaker(
        model,
        texts_of,
        lambda kind, asked, answer: text.Text(kind, ASK_PROMPT.format(asked), answer),
        batcher.pack,
        lambda prefix, asked: right_by_kind(model.logits(prefix, asked), asked),
        lambda prefix: greedy(model.model, prefix, batcher.tokenizer),
    )


def greedy(
    language: T5ForConditionalGeneration, prefix: Tensor, tokenizer: PreTrainedTokenizerFast, max_new_tokens: int = 30
) -> list[str]:
    """Captions of a soft prompt."""
    end = language.get_input_embeddings()(torch.full((len(prefix), 1), END))
    embeds = torch.cat([prefix, end], 1)
    ids = language.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
