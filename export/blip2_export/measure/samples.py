"""Measured values, and the tables that they are printed in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

Samples = dict[str, list[float]]  # what was measured → its values, in the order in which they were taken
_NONE = "–"


def add(samples: Samples, more: Samples) -> None:
    for name, values in more.items():
        samples.setdefault(name, []).extend(values)


def number(value: float) -> str:
    """Four digits that count, without an exponent."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 3
    return f"{value:.{max(digits, 0)}f}"


def median(values: Sequence[float]) -> str:
    return number(statistics.median(values)) if values else _NONE


def spread(values: Sequence[float]) -> str:
    """The quartiles: half of the values lie between them."""
    if len(values) < 2:
        return _NONE
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{number(low)}–{number(high)}"


def ratio(over: str, under: str) -> str:
    """Of two numbers as they are printed."""
    if _NONE in (over, under):
        return _NONE
    return f"{float(over) / float(under):.3f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown, with columns that line up in a terminal."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    written = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    written.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(written)
