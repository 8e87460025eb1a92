"""Tokenizers trained on the scenes' words, and the packing of many texts behind one prefix."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blip2_export import vocabulary
from blip2_export.scenes import drawing

N_QUERIES = 32  # also the length of a description in tokens: a soft prompt takes the description's place
ASK_PROMPT = "Question: {} Answer:"
REPORT_PROMPT = "Report:"
PAD, BOS = 1, 2
_ANSWER_WEIGHT = 3.0


def corpus(n: int, seed: str, ask_prompt: str = ASK_PROMPT) -> Iterator[str]:
    """Captions, questions with answers and reports of `n` scenes."""
    rng = random.Random(seed)
    for _ in range(n):
        scene = drawing.sample_scene(rng)
        yield drawing.caption(scene, rng) + "\n"
        yield REPORT_PROMPT + drawing.describe(scene) + "\n"
        for kind in drawing.QUESTION_KINDS:
            _, asked, answer = drawing.question(scene, rng, kind)
            yield f"{ask_prompt.format(asked)} {answer}\n"


def train_opt_tokenizer(texts: Iterator[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE with OPT's special ids (`<pad>` 1, `</s>` 2, which also starts every text) and `<image>` at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_max_length=2048,
    )


def train_qformer_tokenizer(texts: Iterator[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """WordPiece as BERT's, lower case, with `[DEC]` as the last id: the token that starts a caption of the Q-Former."""
    tokenizer = vocabulary.word_piece(texts, vocab_size - 1)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[DEC]", model_max_length=512, **vocabulary.NAMES
    )


def tokenizers(work: Path) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """The language model's and the Q-Former's tokenizer, trained at the first call and kept in `work`."""
    folders = work / "tokenizer", work / "qformer_tokenizer"
    if not all((f / "tokenizer.json").exists() for f in folders):
        texts = list(corpus(2000, "tokenizers"))
        train_opt_tokenizer(iter(texts)).save_pretrained(folders[0])
        train_qformer_tokenizer(iter(texts)).save_pretrained(folders[1])
    opt, qformer = (PreTrainedTokenizerFast.from_pretrained(f) for f in folders)
    return opt, qformer


@dataclass(frozen=True)
class Text:
    """A prompt, what the model shall say after it, and what sort of text it is."""

    kind: str
    prompt: str
    target: str


def asked_text(kind: str, asked: str, answer: str, ask_prompt: str = ASK_PROMPT) -> Text:
    return Text(kind, ask_prompt.format(asked), f" {answer}\n")


def question_kinds(n: int) -> list[str]:
    """One of each kind; yes or no, the slowest to learn, fills up."""
    return [*drawing.QUESTION_KINDS, *["yes/no"] * n][:n]


@dataclass(frozen=True)
class Mixture:
    """How many texts of each sort there are about a scene."""

    n_captions: int
    n_questions: int
    report: bool = False


def texts_of(scene: drawing.Scene, rng: random.Random, mixture: Mixture, ask_prompt: str = ASK_PROMPT) -> list[Text]:
    """Texts about one scene."""
    kinds = question_kinds(mixture.n_questions)
    texts = [asked_text(*drawing.question(scene, rng, kind), ask_prompt) for kind in kinds]
    texts += [caption_text(scene, rng) for _ in range(mixture.n_captions)]
    return texts + [report_text(scene)] * mixture.report


def target_weight(text: Text) -> float:
    """Of a token of the target in the loss."""
    return 1.0 if text.kind in ("caption", "report") else _ANSWER_WEIGHT


def caption_text(scene: drawing.Scene, rng: random.Random) -> Text:
    return Text("caption", "", drawing.caption(scene, rng) + "\n")


def report_text(scene: drawing.Scene) -> Text:
    return Text("report", REPORT_PROMPT, drawing.describe(scene) + "\n")


@dataclass
class Packed:
    """Texts side by side behind one prefix of `N_QUERIES` positions; no text sees another.

    `ids`, `labels`, `weights`, `positions`, `branch`: [batch, length]. `labels` are the next tokens, -100 where none is learned.
    `kinds[row][branch]` names the text. Branch -1 is padding.
    """

    ids: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor
    branch: Tensor
    kinds: list[list[str]]

    def mask(self) -> Tensor:
        """Additive mask [batch, 1, P + length, P + length]: causal within prefix and branch, every branch sees the prefix."""
        rows, n = self.ids.shape
        group = torch.cat([torch.zeros(rows, N_QUERIES, dtype=torch.long), self.branch + 1], 1)
        group = torch.where(group == 0, 0, group)
        group[:, N_QUERIES:][self.branch < 0] = -1
        total = N_QUERIES + n
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        seen = (group[:, None, :] == 0) | (group[:, None, :] == group[:, :, None])
        return torch.where(causal & seen, 0.0, torch.finfo(torch.float32).min)[:, None]

    def all_positions(self) -> Tensor:
        prefix = torch.arange(N_QUERIES).expand(len(self.ids), -1)
        return torch.cat([prefix, self.positions], 1)


class Encoder:
    """Token ids of texts, kept for those it has seen. `special`: with the tokens that the tokenizer puts around a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: bool) -> None:
        self.tokenizer, self.special = tokenizer, special
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) > 200_000:
                self.known.clear()
            self.known[text] = self.tokenizer.encode(text, add_special_tokens=self.special)
        return self.known[text]

    def description(self, scene: drawing.Scene) -> list[int]:
        """Always `N_QUERIES` tokens."""
        ids: list[int] = self.tokenizer.encode(drawing.describe(scene), add_special_tokens=False)
        if len(ids) != N_QUERIES:
            raise ValueError(f"a description has {len(ids)} tokens, expected {N_QUERIES}: a word was split")
        return ids


class Packer(Encoder):
    """Turns texts into `Packed` batches.

    `prompt_weight`: how much a language model learns to write the prompts themselves. Stage 2 learns only what follows them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_weight: float = 0.0) -> None:
        super().__init__(tokenizer, special=False)
        self.prompt_weight = prompt_weight

    def pack(self, rows: list[list[Text]]) -> Packed:
        packed = [self._row(texts) for texts in rows]
        length = max(len(r[0]) for r in packed)
        fill = (PAD, -100, 0.0, N_QUERIES, -1)
        columns = []
        for k, value in enumerate(fill):
            table = np.full((len(rows), length), value, np.float32 if k == 2 else np.int64)
            for i, r in enumerate(packed):
                table[i, : len(r[k])] = r[k]
            columns.append(torch.from_numpy(table))
        return Packed(*columns, [[t.kind for t in texts] for texts in rows])

    def _row(self, texts: list[Text]) -> tuple[list[int], list[int], list[float], list[int], list[int]]:
        ids, labels, weights, positions, branch = [], [], [], [], []
        for k, text in enumerate(texts):
            prompt, target = [BOS, *self.encode(text.prompt)], self.encode(text.target)
            whole = prompt + target
            weight = target_weight(text)
            ids += whole[:-1]
            labels += whole[1:]
            weights += [self.prompt_weight] * (len(prompt) - 1) + [weight] * len(target)
            positions += range(N_QUERIES, N_QUERIES + len(whole) - 1)
            branch += [k] * (len(whole) - 1)
        return ids, labels, weights, positions, branch


def right_by_kind(logits: Tensor, packed: Packed) -> dict[str, tuple[int, int]]:
    """(right, all) texts per kind; right when every token of the target is the most probable one after the true tokens.

    Greedy decoding gives exactly such a target. Captions have many true forms, so theirs is a lower bound.
    """
    hit = logits.argmax(-1) == packed.labels
    counts: dict[str, tuple[int, int]] = {}
    for i, kinds in enumerate(packed.kinds):
        for k, kind in enumerate(kinds):
            target = (packed.branch[i] == k) & (packed.weights[i] > 0.5)
            add_counts(counts, {kind: (int(hit[i][target].all()), 1)})
    return counts


def add_counts(counts: dict[str, tuple[int, int]], more: dict[str, tuple[int, int]]) -> None:
    """Adds (right, all) per kind."""
    for kind, (right, total) in more.items():
        before = counts.get(kind, (0, 0))
        counts[kind] = (before[0] + right, before[1] + total)


def shares(counts: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Of right texts per kind."""
    return {kind: round(right / total, 4) for kind, (right, total) in sorted(counts.items())}


def answers_right(counts: dict[str, tuple[int, int]]) -> float | None:
    """The share of right ones over all kinds of questions, if any were asked."""
    asked = [v for kind, v in counts.items() if kind in drawing.QUESTION_KINDS]
    return sum(right for right, _ in asked) / sum(total for _, total in asked) if asked else None
