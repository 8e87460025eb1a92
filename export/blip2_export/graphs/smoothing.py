"""Outlier channels of activations, moved into the weights before both are rounded (SmoothQuant, Xiao et al. 2023, with a strength
for every value).

The few channels of OPT and T5 that are tens of times as large as the rest would take nearly all of the 8 bits of their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blip2_export.graphs.statistics import Channels

_STRENGTHS = tuple(i / 8 for i in range(1, 9))
_WORTH = 0.8  # of the squared error without: a smaller gain is not worth a node
_MOST_ACTIVATION = 127


@dataclass(frozen=True)
class Rounding:
    """Whole numbers up to `most` for weights; `size` of them, and as many activations, share a scale."""

    most: int
    size: int

    def error(self, channels: Channels, weight: np.ndarray, exact: bool = False) -> float:
        """Expected squared error of a row of outputs. `exact`: the weights lose nothing."""
        magnitudes = np.abs(weight).reshape(len(weight), -1, self.size)
        # The largest of a row lies between the mean and the largest of all.
        typical = np.sqrt(channels.largest * channels.mean).reshape(-1, self.size).max(1) / _MOST_ACTIVATION
        found = np.square(typical) @ np.square(magnitudes).sum((0, 2))
        if not exact:
            squares = np.square(channels.mean).reshape(-1, self.size).sum(1) * np.pi / 2  # of a normal distribution
            found += np.square(magnitudes.max(2) / self.most).sum(0) @ squares
        return float(found / 12)


def factors(channels: Channels, weight: np.ndarray, rounding: Rounding, exact: bool = False) -> np.ndarray | None:
    """float32 [in]: what channels are divided by, and the columns of the weight [out, in] multiplied by. None: better left alone.

    `exact`: left alone, the weight loses nothing.
    """
    used = channels.largest[channels.largest > 0]
    if used.size == 0:
        return None
    weight = weight.astype(np.float32)
    least, best = _WORTH * rounding.error(channels, weight, exact), None
    above = np.maximum(channels.largest / np.median(used), 1).astype(np.float32)
    for by in (above**strength for strength in _STRENGTHS):
        error = rounding.error(Channels(channels.largest / by, channels.mean / by), weight * by)
        if error < least:
            best, least = by, error
    return best
