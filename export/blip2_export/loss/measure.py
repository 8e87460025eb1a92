"""How much a bundle differs from the same model in float32: every stage alone and from the picture on, and what it writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from blip2_export.loss import stages
from blip2_export.loss.inputs import Inputs
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.run.generation import Graphs
from blip2_export.run.retrieval import Stage1Graphs

_SMALLEST = 1e-30  # stands in for a length of zero
_MOST_NATS = 50  # a token; what is less probable is as good as impossible
_DIGITS = 7  # of cosines; float32 has no more
Runnable = Graphs | Stage1Graphs


def loss(exact: Runnable, bundle: Runnable, given: Inputs) -> dict[str, Any]:
    """The `loss` entry of `bundle.json`. Graphs of one part of one bundle are open at a time."""
    wanted = stages.run(exact, given)
    alone, whole = stages.run(bundle, given, wanted, wanted.tokens), stages.run(bundle, given, tokens=wanted.tokens)
    measured = {
        stage: {"alone": compared(alone.stages[stage], values), "end_to_end": compared(whole.stages[stage], values)}
        for stage, values in wanted.stages.items()
    }
    written = _written(wanted.tokens, wanted.logits, whole.logits) if wanted.tokens else {}
    return {"pictures": len(given.pixels), "stages": measured, **written}


def compared(found: stages.Arrays, wanted: stages.Arrays) -> dict[str, float]:
    """Of arrays by turns: the largest difference beside the array's largest value, and the cosines of rows, the last axis."""
    error = max(largest_error(f, w) for f, w in zip(found, wanted, strict=True))
    rows = np.concatenate([cosines(f, w) for f, w in zip(found, wanted, strict=True)])
    mean, least = (round(float(value), _DIGITS) for value in (rows.mean(), rows.min()))
    return {"error": float(f"{error:.3e}"), "cosine": mean, "least_cosine": least}


def largest_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative to the largest value that is wanted."""
    if not np.isfinite(found).all():
        raise CheckpointError(
            "in this precision the graphs give values that are not numbers; choose another for this part (bfloat16 has the range "
            "of float32)"
        )
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), _SMALLEST))


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (found, wanted))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray(np.minimum((a * b).sum(-1) / np.maximum(lengths, _SMALLEST), 1))


def agreeing(logits: stages.Arrays, tokens: list[list[int]]) -> float:
    """The share of tokens that would be chosen at their places."""
    same = [row.argmax(-1) == np.array(chosen) for row, chosen in zip(logits, tokens, strict=True)]
    return float(np.concatenate(same).mean())


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
    return round(float(np.exp(min(np.concatenate(losses).mean(), _MOST_NATS))), 4)
