"""How each phase is looked at: what is measured of its model, and what that says of a few pictures."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from blip2_export.train.own import batches, measures, questions, writing
from blip2_export.train.own.batches import Part, Telling
from blip2_export.train.own.held_out import HeldOut
from blip2_export.train.own.questions import Asking
from blip2_export.train.own.records import Record
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.stage1 import Captions, Stage1
from blip2_export.train.own.stage2 import Written


@dataclass(frozen=True)
class Watch:
    """Nothing of it where nothing is held out."""

    measure: Callable[[Any], dict[str, float]] | None = None
    sample: Callable[[Any], list[dict[str, Any]]] | None = None
    thumbnails: dict[str, bytes] = field(default_factory=dict)


def stage1(held_out: HeldOut, model: Stage1, see: Callable[[Part], Captions], n_samples: int) -> Watch:
    """`see`: features and captions of a part."""
    if len(held_out) < 2:
        return Watch()
    say = batches.captioned(model.encode)

    def known(records: list[Record], rngs: Sequence[random.Random], chances: Tensor) -> measures.Known:
        return measures.Known(say(records, rngs, chances), records)

    def sample(now: Stage1, records: list[Record]) -> list[str]:
        return writing.captions(now, see(held_out.part(records, say)).features)

    return Watch(
        lambda now: measures.of_stage1(now, held_out.parts(known), see), *_samples(held_out, sample, n_samples)
    )


def stage2(
    held_out: HeldOut, telling: Telling, write: Callable[[Part], Written], n_samples: int, better: str = ""
) -> Watch:
    """`write`: features and texts of a part. Captions are written from their start; where `better` is a measure of them, of what is
    held out as well."""
    if not len(held_out):
        return Watch()
    if better in measures.WRITTEN and len(held_out) < 2:
        raise DataError(
            f"--best-by {better} compares held-out pictures, and there is one; hold out more, or choose loss"
        )
    say, whole = batches.written(telling), batches.written(replace(telling, splits=False))

    def known(records: list[Record], rngs: Sequence[random.Random], chances: Tensor) -> measures.Told:
        return measures.Told(whole(records, rngs, chances), records)

    def texts(now: nn.Module, part: Part) -> list[str]:
        prefix = now.prefix(write(part))
        return writing.texts(telling.speaks, prefix, [telling.prompt] * len(prefix))

    def measure(now: nn.Module) -> dict[str, float]:
        found = measures.of_language(now, held_out.parts(say), write)
        if better not in measures.WRITTEN:
            return found
        parts = held_out.parts(known, measures.FEW_WRITTEN)
        told = ((part.said.records, texts(now, replace(part, said=part.said.said))) for part in parts)
        return {**found, **measures.of_captions(told)}

    def sample(now: nn.Module, records: list[Record]) -> list[str]:
        return texts(now, held_out.part(records, whole))

    return Watch(measure, *_samples(held_out, sample, n_samples))


def vqa(held_out: HeldOut, asking: Asking, write: Callable[[Part], Written], n_samples: int) -> Watch:
    """`write`: pixels and questions of a part."""
    if not len(held_out):
        return Watch()
    say, put = questions.asked(asking), questions.put(asking)

    def answers(now: nn.Module, part: Part) -> list[str]:
        said = part.said
        return measures.answers(now, measures.Put(write(replace(part, said=said.asked)), said.questions, said.reads))

    def measure(now: nn.Module) -> dict[str, float]:
        found = measures.of_language(now, held_out.parts(say), write)
        told = [(part.said.questions, answers(now, part)) for part in held_out.parts(put)]
        return {**found, **measures.of_answers(told)}

    def sample(now: nn.Module, records: list[Record]) -> list[str]:
        first = [replace(record, questions=record.questions[:1]) for record in records]
        return answers(now, held_out.part(first, put))

    return Watch(measure, *_samples(held_out, sample, n_samples, asks=True))


def _samples(
    held_out: HeldOut, say: Callable[[Any, list[Record]], list[str]], n: int, asks: bool = False
) -> tuple[Callable[[Any], list[dict[str, Any]]] | None, dict[str, bytes]]:
    records, thumbnails = held_out.shown(n)
    if not records:
        return None, {}

    def sample(now: Any) -> list[dict[str, Any]]:
        rows = []
        for record, said in zip(records, say(now, records), strict=True):
            question = record.questions[0] if asks else None
            true = list(dict.fromkeys(question.given)) if question else record.captions[: measures.CAPTIONS]
            more = {"asked": question.text} if question else {}
            rows.append({"picture": record.key, **more, "said": said, "true": true})
        return rows

    return sample, thumbnails
