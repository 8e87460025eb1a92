"""How much a bundle differs from the same model in float32: every stage alone and from the picture on, and what it writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from blip2_export.loss import stages
from blip2_export.loss.inputs import Inputs
from blip2_export.run.generation import Graphs
from blip2_export.run.retrieval import Stage1Graphs

_SMALLEST = 1e-30  # stands in for a length of zero
_DIGITS = 7  # of cosines; float32 has no more
Pair = tuple[stages.Arrays, stages.Arrays]  # of a stage alone, with float32 inputs, and from the picture on
Stages = dict[str, dict[str, dict[str, float]]]


def loss(exact: Graphs | Stage1Graphs, bundle: Graphs | Stage1Graphs, given: Inputs) -> dict[str, Any]:
    """The `loss` entry of `bundle.json`. Graphs of one part are open at a time."""
    wanted, found = stages.features(exact, given), stages.features(bundle, given)
    exact.close("vision")
    bundle.close("vision")
    measured = {"features": _stage(wanted, (found, found))}
    model, other = stages.behind(exact, given), stages.behind(bundle, given)
    seen, alone, whole = model.seen(wanted), other.seen(wanted), other.seen(found)
    measured |= _named(stages.SEEN, seen, (alone, whole))
    if isinstance(model, stages.Retrieval) and isinstance(other, stages.Retrieval):
        compared = model.compared(wanted), other.compared(wanted), other.compared(found)
        measured |= _named(stages.COMPARED, compared[0], compared[1:])
        texts = model.read(), other.read()
        measured["text_embeds"] = _stage(texts[0], (texts[1], texts[1]))
    written: dict[str, Any] = {}
    if given.asked:
        tokens = model.write(seen)
        logits = model.logits(seen, tokens)
        exact.close("encoder", "decoder")
        alone_logits, whole_logits = other.logits(seen, tokens), other.logits(whole, tokens)
        measured["first_logits"] = _stage(_first(logits), (_first(alone_logits), _first(whole_logits)))
        written = _written(tokens, logits, whole_logits)
    return {"pictures": len(given.pixels), "stages": measured, **written}


def compared(found: stages.Arrays, wanted: stages.Arrays) -> dict[str, float]:
    """Of arrays by turns: the largest difference beside the array's largest value, and the cosines of rows, the last axis."""
    error = max(largest_error(f, w) for f, w in zip(found, wanted, strict=True))
    rows = np.concatenate([cosines(f, w) for f, w in zip(found, wanted, strict=True)])
    mean, least = (round(float(value), _DIGITS) for value in (rows.mean(), rows.min()))
    return {"error": float(f"{error:.3e}"), "cosine": mean, "least_cosine": least}


def largest_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), _SMALLEST))


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (found, wanted))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray(np.minimum((a * b).sum(-1) / np.maximum(lengths, _SMALLEST), 1))


def agreeing(logits: stages.Arrays, tokens: list[list[int]]) -> float:
    """The share of tokens that would be chosen at their places."""
    same = [row.argmax(-1) == np.array(chosen) for row, chosen in zip(logits, tokens, strict=True)]
    return float(np.concatenate(same).mean())


def _stage(wanted: stages.Arrays, found: Pair) -> dict[str, dict[str, float]]:
    alone, whole = found
    return {"alone": compared(alone, wanted), "end_to_end": compared(whole, wanted)}


def _named(names: dict[str, str], wanted: stages.Seen, found: tuple[stages.Seen, ...]) -> Stages:
    """Stages by the names of outputs that hold them, where a graph gives those."""
    alone, whole = found
    return {
        stage: _stage(_each(wanted, output), (_each(alone, output), _each(whole, output)))
        for output, stage in names.items()
        if output in wanted[0]
    }


def _each(seen: stages.Seen, output: str) -> stages.Arrays:
    return [one[output] for one in seen]


def _first(logits: stages.Arrays) -> stages.Arrays:
    return [rows[:1] for rows in logits]


def _written(tokens: list[list[int]], wanted: stages.Arrays, found: stages.Arrays) -> dict[str, Any]:
    """Of what float32 wrote, read again."""
    share = {"compared": sum(map(len, tokens)), "agree": round(agreeing(found, tokens), 4)}
    perplexity = {"float32": _perplexity(wanted, tokens), "bundle": _perplexity(found, tokens)}
    return {"tokens": share, "perplexity": perplexity}


def _perplexity(logits: stages.Arrays, tokens: list[list[int]]) -> float:
    losses = []
    for rows, chosen in zip(logits, tokens, strict=True):
        shifted = rows.astype(np.float64) - rows.max(-1, keepdims=True)
        losses.append(np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(chosen)), chosen])
    return round(float(np.exp(np.concatenate(losses).mean())), 4)
