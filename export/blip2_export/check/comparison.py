"""What the engine and the reference agreed on, and what not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

TOLERANCE = 1e-4


@dataclass
class Comparison:
    """`written` are the reference's distinct token rows: few of them test little."""

    cases: int = 0
    differences: list[str] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    written: set[tuple[int, ...]] = field(default_factory=set)

    def within(self, error: float, what: str) -> None:
        self.cases += 1
        if not error <= TOLERANCE:
            self.differences.append(f"{what}: off by {error:.1e}, allowed {TOLERANCE:.0e}")

    def close(self, found: Any, wanted: Any, what: str) -> None:
        """Vectors, relative to the largest value of the reference's."""
        found, wanted = np.asarray(found), np.asarray(wanted)
        same = found.shape == wanted.shape
        self.within(float(np.abs(found - wanted).max() / np.abs(wanted).max()) if same else np.inf, what)

    def add(self, other: Comparison) -> None:
        self.cases += other.cases
        self.differences += other.differences
        self.ties += other.ties
        self.written |= other.written

    def summary(self) -> dict[str, int]:
        return {
            "cases": self.cases,
            "equal": self.cases - len(self.differences) - len(self.ties),
            "ties": len(self.ties),
            "different": len(self.differences),
            "distinct": len(self.written),
        }
