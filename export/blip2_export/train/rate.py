"""How the learning rate goes: up from nothing in a line, then down along half a cosine."""

from __future__ import annotations

import math


def factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """Of the peak rate at a step: 1 after `warmup`, `floor` at the end of `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
