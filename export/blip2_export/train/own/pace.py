"""How fast a run is, and from that when it will end: steps, measurements and checkpoints each take their own time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_RECENT = 200  # steps; a machine that gets slower or faster is followed within so many
_FIRST = 2  # steps that take longer than all others, for caches are cold and kernels are chosen


class Pace:
    """Told whenever something has ended; what lies between two ends is the time of the later one.

    `expected`: seconds of a step and of a measurement, as long as none was seen.
    """

    def __init__(
        self,
        steps: int,
        measure_every: int,
        save_seconds: float,
        expected: tuple[float, float] = (0.0, 0.0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.measure_every, self.save_seconds, self.clock = steps, measure_every, save_seconds, clock
        self.expected = expected
        self.last = clock()
        self.of_steps: deque[float] = deque(maxlen=_RECENT)
        self.n_seen, self.of_measuring, self.of_saving = 0, deque[float](maxlen=5), deque[float](maxlen=5)

    def begin(self) -> None:
        """The first step begins now."""
        self.last = self.clock()

    def stepped(self) -> None:
        """A step has ended."""
        self.n_seen += 1
        took = self._since()
        if self.n_seen == _FIRST + 1:
            self.of_steps.clear()
        self.of_steps.append(took)

    def measured(self) -> None:
        """A measurement on what is held out has ended."""
        self.of_measuring.append(self._since())

    def saved(self) -> None:
        """A checkpoint is written."""
        self.of_saving.append(self._since())

    def left(self, step: int) -> float:
        """Seconds from the end of so many steps to the end of the run."""
        is_sure = self.n_seen > _FIRST or not self.expected[0]
        steps = (self.steps - step) * (_mean(self.of_steps) if is_sure else self.expected[0])
        n_measurements = self._measurements(self.steps) - self._measurements(step) if self.measure_every else 0
        whole = steps + n_measurements * (_mean(self.of_measuring) if self.of_measuring else self.expected[1])
        n_saves = 1 + int(whole / self.save_seconds) if self.save_seconds else self.steps - step
        return whole + n_saves * _mean(self.of_saving) if step < self.steps else 0.0

    def _measurements(self, step: int) -> int:
        """Of so many steps; the last is always measured."""
        return step // self.measure_every + (step == self.steps and step % self.measure_every > 0)

    def _since(self) -> float:
        now = self.clock()
        took, self.last = now - self.last, now
        return took


def _mean(seconds: deque[float]) -> float:
    return sum(seconds) / len(seconds) if seconds else 0.0
