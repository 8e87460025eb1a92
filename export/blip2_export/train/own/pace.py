"""When a run ends, from what its recent steps took, and what measuring and saving take besides."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_RECENT = 100


class Pace:
    """Told when each step is done; whatever is done between steps `aside` is counted apart.

    `every`: how often each kind of it comes, in steps. `every_s`: in seconds.
    """

    def __init__(
        self,
        every: dict[str, int],
        every_s: dict[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.every, self.every_s, self.clock = every, every_s, clock
        self.steps: deque[float] = deque(maxlen=_RECENT)
        self.asides: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=5))
        self.mark, self.besides, self.n = clock(), 0.0, 0

    def step(self) -> float:
        """One more is done; the seconds that it took."""
        now = self.clock()
        took, self.mark, self.besides = max(1e-9, now - self.mark - self.besides), now, 0.0
        if self.n == 1:
            # The first one also made buffers and chose kernels.
            self.steps.clear()
        if self.n or not self.steps:
            self.steps.append(took)
        self.n += 1
        return took

    def expect(self, took: float) -> None:
        """Takes a step to be that long until there are two; the first begins now."""
        self.steps.append(took)
        self.mark, self.besides = self.clock(), 0.0

    @contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """What is done here is no part of a step."""
        before = self.clock()
        yield
        took = self.clock() - before
        self.besides += took
        self.asides[kind].append(took)

    def last(self, kind: str) -> float:
        """Seconds of the last time."""
        return self.asides[kind][-1]

    def left(self, step: int, steps: int) -> float:
        """Seconds from after `step` to the end."""
        found = (steps - step) * _mean(self.steps)
        for kind, every in self.every.items():
            # At the end it is done in any case.
            times = -(-steps // every) - step // every if step < steps else 0
            found += times * _mean(self.asides[kind])
        busy = sum(_mean(self.asides[kind]) / every for kind, every in self.every_s.items() if every > 0)
        return found * (1 + busy)


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values) if values else 0.0
