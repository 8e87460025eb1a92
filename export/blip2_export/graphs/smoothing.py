"""Outlier channels of activations, moved into the weights before both are rounded (SmoothQuant, Xiao et al. 2023, with a strength
for every value).

The few channels of OPT and T5 that are tens of times as large as the rest would take nearly all of the 8 bits of their rows.
"""

from __future__ import annotations

import numpy as np

from blip2_export.graphs.statistics import Channels

_STRENGTHS = np.arange(0.125, 1.01, 0.125, np.float32)
_WORTH = 0.8  # of the squared error without: a smaller gain is not worth a node
_MOST_ACTIVATION = 127


def factors(channels: Channels, weight: np.ndarray, most: int, exact: bool) -> np.ndarray | None:
    """float32 [in]: what channels are divided by, and the columns of the weight [out, in] multiplied by. None: better left alone.

    `most`: the largest number of a rounded weight. `exact`: left alone, the weight loses nothing.
    """
    used = channels.largest[channels.largest > 0]
    if used.size == 0:
        return None
    weight = weight.astype(np.float32)
    alone = _of_activations(channels, weight) + (0 if exact else _of_weights(channels, weight, most))
    above = np.maximum(channels.largest / np.median(used), 1).astype(np.float32)
    best = None
    for by in (above**strength for strength in _STRENGTHS):
        smooth, heavy = Channels(channels.largest / by, channels.mean / by), weight * by
        error = _of_activations(smooth, heavy) + _of_weights(smooth, heavy, most)
        if error < _WORTH * alone:
            best, alone = by, error / _WORTH
    return best


def _of_activations(channels: Channels, weight: np.ndarray) -> float:
    """Expected squared error of a row of outputs. The largest of a row lies between the mean and the largest of all."""
    step = np.sqrt(channels.largest * channels.mean).max() / _MOST_ACTIVATION
    return float(step**2 / 12 * np.square(weight).sum())


def _of_weights(channels: Channels, weight: np.ndarray, most: int) -> float:
    steps = np.abs(weight).max(1) / most
    squares = np.square(channels.mean).sum() * np.pi / 2  # of a normal distribution with this mean magnitude
    return float(np.square(steps).sum() / 12 * squares)
