"""Which differences between the engine and the reference count as ties."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from blip2_export.check import parity
from blip2_export.reference.generation import Found

Kept = list[tuple[list[int], float]]  # tokens and scores of beams, the best first
# By new tokens. The beams part at the second, where one of two is dropped, and end in texts of other scores.
ENGINE: dict[int, Kept] = {
    1: [([5], -1.0), ([6], -2.0)],
    2: [([5, 7], -1.0), ([6, 8], -2.0)],
    3: [([6, 8, 9], -1.2), ([5, 7, 9], -1.5)],
}
PARTED: dict[int, Kept] = {**ENGINE, 2: [([5, 7], -1.0), ([6, 4], -2.0)], 3: [([6, 4, 9], -1.1), ([5, 7, 9], -1.5)]}


class Reference:
    mixes_pictures = False

    def __init__(self, kept: dict[int, Kept]) -> None:
        self.kept = kept

    def search(self, pixels: np.ndarray, prompt: str, n: int, question: str, **search: Any) -> Found:
        kept = self.kept[n][: search.get("num_return_sequences", 1)]
        scores = [score for _, score in kept]
        return Found([tokens for tokens, _ in kept], SimpleNamespace(sequences_scores=scores))

    def text(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def found(reference: dict[int, Kept], penalty: float = 1.0) -> tuple[int, int]:
    """(ties, differences) of one caption in an engine that keeps `ENGINE`."""
    both = parity._Both(Reference(reference), Path(), Path(), 3, np.zeros((1, 3, 2, 2)), [Path("0.png")])

    def engine(_: Path, *typed: str) -> list[dict[str, Any]]:
        rows = [
            {"tokens": t, "score": s, "text": both.reference.text(t)}
            for t, s in ENGINE[int(typed[typed.index("--max-new-tokens") + 1])]
        ]
        return [{**rows[0], "candidates": rows}]

    with patch.object(parity, "run_engine", engine):
        both.captions("", {"num_beams": 2, "length_penalty": penalty})
    return len(both.found.ties), len(both.found.differences)


def moved(kept: dict[int, Kept], n: int, rank: int, by: float) -> dict[int, Kept]:
    """With one score that is another."""
    rows = list(kept[n])
    rows[rank] = (rows[rank][0], rows[rank][1] + by)
    return {**kept, n: rows}


def test_equal_tokens_are_no_tie() -> None:
    assert found(ENGINE) == (0, 0)


@pytest.mark.parametrize(("by", "wanted"), [(0.0, (1, 0)), (4e-6, (1, 0)), (1e-4, (0, 1))])
def test_beams_that_part_at_a_tie_may_end_in_other_texts(by: float, wanted: tuple[int, int]) -> None:
    assert found(moved(PARTED, 2, 1, by)) == wanted


@pytest.mark.parametrize(("penalty", "wanted"), [(0.0, (1, 0)), (2.0, (0, 1))])
def test_a_score_that_is_divided_by_the_length_is_near_only_where_the_sum_is(
    penalty: float, wanted: tuple[int, int]
) -> None:
    assert found(moved(PARTED, 2, 1, 8e-6), penalty) == wanted


def test_beams_in_another_order_have_not_parted() -> None:
    swapped = {**PARTED, 1: ENGINE[1][::-1]}
    assert found(moved(swapped, 2, 1, 1e-4)) == (0, 1)


def test_a_worse_text_from_the_same_beams_is_a_difference() -> None:
    assert found({**ENGINE, 3: ENGINE[3][::-1]}) == (0, 1)
