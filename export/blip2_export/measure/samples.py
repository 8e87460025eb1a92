"""Numbers and tables as they are printed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def number(value: float) -> str:
    """Four digits that count, without an exponent."""
    digits = 3 - math.floor(math.log10(abs(value))) if value else 3
    return f"{value:.{max(digits, 0)}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown, with columns that line up in a terminal."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    written = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    written.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(written)
