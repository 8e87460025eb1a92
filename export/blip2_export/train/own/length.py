"""How long a run is: so many steps, or so many times through the data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from blip2_export.train.own.loop import Schedule

_WARMUP = 2000  # paper, section 3.4
_WARMUP_SHARE = 0.1  # of a run that is too short for it; our choice
# Our choice: what it has learnt after a tenth, or after every time through the data, of a small set not after every few steps.
_FEWEST_LOOKS, _MOST_LOOKS = 10, 50


@dataclass(frozen=True)
class Length:
    """`steps`, or else `epochs`. Without a `warmup` it is the paper's, but never more than a tenth of the run."""

    steps: int | None = None
    epochs: float = 10.0
    warmup: int | None = None
    usual_warmup: int = _WARMUP

    def schedule(self, other: Schedule, n_records: int, batch: int) -> Schedule:
        """`other` over as many steps as this takes."""
        steps = self.steps or max(1, math.ceil(self.epochs * n_records / batch))
        warmup = min(self.usual_warmup, int(steps * _WARMUP_SHARE)) if self.warmup is None else self.warmup
        return replace(other, steps=steps, warmup=warmup)


def measure_every(steps: int, n_records: int, batch: int) -> int:
    """Steps between measurements: ten in a run, or one an epoch where that is more, but fifty at most."""
    often = min(math.ceil(steps / _FEWEST_LOOKS), math.ceil(n_records / batch))
    return max(often, math.ceil(steps / _MOST_LOOKS))
