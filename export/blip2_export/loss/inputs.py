"""What the tokenizers of a bundle and the checkpoint's image processor make of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from blip2_export.loss.samples import Sample
from blip2_export.reference import pictures
from blip2_export.run.sessions import Bundle


@dataclass(frozen=True)
class Asked:
    """Ids of the language model's prompt behind a picture, and of the Q-Former's question where it reads one.

    `text`: what may be said there; `n_new`: tokens that are written at most.
    """

    picture: int
    prompt: list[int]
    question: list[int] | None
    text: list[int]
    n_new: int


@dataclass(frozen=True)
class Inputs:
    """`pixels` [3, S, S] of every picture, ids of `texts` that a stage-1 Q-Former reads, what a model that writes is `asked`."""

    pixels: list[np.ndarray]
    texts: list[list[int]]
    asked: list[Asked]


def inputs(bundle: Bundle, samples: list[Sample], prepare: pictures.Prepare) -> Inputs:
    side = bundle.facts["image"]["size"]
    pixels = [pictures.shown_as(prepare, sample.picture, side)[1] for sample in samples]
    words = _question_tokenizer(bundle)
    if bundle.facts["family"] == "qformer":
        assert words is not None, "stage 1 reads text"
        texts = [words.encode(sample.text).ids for sample in samples]
        return Inputs(pixels, texts, _captions(bundle.facts, texts))
    tokenizer = Tokenizer.from_file(str(bundle.folder / "tokenizer.json"))
    tasks = (("caption", False), ("ask", True))
    asked = [
        _asked(bundle.facts, (tokenizer, words), i, (task, sample.question if asks else "", sample.text))
        for i, sample in enumerate(samples)
        for task, asks in tasks
    ]
    return Inputs(pixels, [], asked)


def _question_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """Of what the Q-Former reads, which it cuts as the bundle says."""
    text = bundle.facts["qformer"].get("text")
    if text is None:
        return None
    tokenizer = Tokenizer.from_file(str(bundle.folder / text["tokenizer"]))
    tokenizer.enable_truncation(text["max_tokens"], direction=text["truncation_side"])
    return tokenizer


def _captions(facts: dict[str, Any], texts: list[list[int]]) -> list[Asked]:
    """Of a Q-Former that writes: behind its start token what a text has behind `[CLS]`."""
    if "language" not in facts:
        return []
    start = [facts["language"]["token_ids"]["bos"]]
    return [_fitting(facts, "caption", Asked(i, start, None, text[1:], 0)) for i, text in enumerate(texts)]


def _asked(
    facts: dict[str, Any], tokenizers: tuple[Tokenizer, Tokenizer | None], picture: int, what: tuple[str, str, str]
) -> Asked:
    """`what`: the task, the question in its prompt if it has one, and the text behind."""
    (words, questions), (task, question, text) = tokenizers, what
    template = facts["prompts"][task]
    prompt = template.replace("{}", question)
    read = None
    if questions is not None:
        read = questions.encode(prompt if facts["qformer"]["text"]["reads"] == "prompt" else question).ids
    said = [*words.encode(text, add_special_tokens=False).ids, facts["language"]["token_ids"]["eos"][0]]
    return _fitting(facts, task, Asked(picture, words.encode(prompt).ids, read, said, 0))


def _fitting(facts: dict[str, Any], task: str, asked: Asked) -> Asked:
    """With no more tokens than positions behind the prompt."""
    before = 1 if facts["family"] == "encoder_decoder" else facts["qformer"]["n_queries"] + len(asked.prompt)
    room = facts["language"]["max_positions"] + 1 - before
    n_new = min(facts["generation"][task]["max_new_tokens"], room)
    return Asked(asked.picture, asked.prompt, asked.question, asked.text[:room], n_new)
