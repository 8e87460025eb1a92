"""How a run goes: a line for people, one of JSON for machines, TensorBoard's file where wanted, a page after every measurement."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TextIO

from blip2_export.train.own import page
from blip2_export.train.own.board import Board
from blip2_export.train.own.log import Log, Row
from blip2_export.train.own.pace import Pace
from blip2_export.train.own.run import Run

if TYPE_CHECKING:
    from blip2_export.train.own.estimate import Rehearsal

_OFTEN_S = 0.2  # a line on a terminal is not drawn anew more often
_DETAILS = ("reranked_", "text_", "image_")  # for the log and the page
_OWN = ("step", "steps", "at", "left_s", "step_s", "pictures_per_s", "rate", "gradient_norm")


class Progress:
    """Means over the steps since the last line, of each number over those that had it. Of several processes one `tells`.

    `looked`: the last step at which it was measured, if that is not `start`.
    """

    def __init__(
        self,
        run: Run,
        start: int,
        tells: bool,
        looked: int | None = None,
        screen: Screen | None = None,
    ) -> None:
        self.run, self.step, self.tells = run, start, tells
        self.screen = screen or Screen(sys.stderr)
        every = {
            "measure": run.measure_every,
            "keep": run.measure_every,
            "sample": run.sample_every or run.measure_every,
        }
        self.pace = Pace(every, {"save": run.save_seconds}, self.screen.clock)
        self.sums, self.counts, self.count, self.took = dict[str, float](), dict[str, int](), 0, 0.0
        self.bad: set[str] = set()
        self.log = Log(run.log, start, looked) if tells else None
        self.board = Board(run.work / "tensorboard" / run.name, self.log.rows) if self.log and run.tensorboard else None
        self.thumbnails: dict[str, bytes] = {}
        self._row({"resumed": True} if start else {"settings": run.facts or {}, "machine": run.machine})

    def add(self, measured: dict[str, float], notes: list[dict[str, str]]) -> None:
        """What a step measured, and which pictures it could not read."""
        for key, value in measured.items():
            key = key.lstrip("_")
            self.sums[key], self.counts[key] = self.sums.get(key, 0.0) + value, self.counts.get(key, 0) + 1
        self.step, self.count, self.took = self.step + 1, self.count + 1, self.took + self.pace.step()
        for note in notes:
            self._note(note)
        if self.step % self.run.log_every == 0 or self.step == self.run.schedule.steps:
            row = self._means()
            self._row(row)
            self._show(row, lasting=not self.screen.is_terminal)
            self.sums, self.counts, self.count, self.took = {}, {}, 0, 0.0
        elif self.screen.is_due():
            self._show(self._means())

    def foretell(self, found: Rehearsal) -> None:
        """What a rehearsal found, before the first step."""
        if self.log:
            # A run that goes on measured before.
            self.pace.asides["measure"].extend(row["took_s"] for row in self.log.rows[-200:] if "took_s" in row)
        self.pace.expect(found.step)
        left, n = self.pace.left(self.step, self.run.schedule.steps), self.run.schedule.steps - self.step
        memory = f"{found.peak / (1 << 30):.2f} GiB of memory were needed so far"
        self._say(f"{self.run.name}: {n} steps of about {_short(found.step)} s are {_time(left)}; {memory}")

    def aside(self, kind: str) -> AbstractContextManager[None]:
        """For what is no part of a step: `measure`, `keep` what is best, `sample` or `save`."""
        return self.pace.aside(kind)

    def measured(self, found: dict[str, float], better: bool) -> None:
        """On what is held out."""
        self._row({"held_out": found, "better": better, "took_s": round(self.pace.last("measure"), 2)})
        shown = (key for key in found if not key.startswith(_DETAILS))
        numbers = " ".join(f"{key} {_short(found[key])}" for key in shown)
        best = ", the best so far" if better else ""
        self._say(f"{self.run.name} {self.step}: held out: {numbers}{best}")

    def sampled(self, samples: list[dict[str, Any]]) -> None:
        """What the model says of a few pictures."""
        self._row({"samples": samples})
        for sample in samples:
            asked = f"{sample['asked']} " if "asked" in sample else ""
            self._say(f"  {sample['picture']}: {asked}{sample['said']}")

    def draw(self) -> None:
        """The page, from the log."""
        if self.log:
            page.write(self.run.page, self.run.name, self.log.rows, self.thumbnails)

    def end(self, why: str, best_step: int | None = None) -> None:
        """The last line."""
        self._row({"ended": why, "best_step": best_step})
        self.draw()
        self._say(f"{self.run.name} {self.step}: {why}; its page is {self.run.page}")

    def _means(self) -> Row:
        means = {key: round(value / self.counts[key], 9) for key, value in self.sums.items()}
        step_s = self.took / self.count
        return {
            "steps": self.count,
            **means,
            "pictures_per_s": round(self.run.pictures / step_s, 3),
            "step_s": round(step_s, 6),
            "left_s": round(self.pace.left(self.step, self.run.schedule.steps), 1),
        }

    def _row(self, row: Row) -> None:
        if self.log is None:
            return
        self.log.add({"step": self.step, **row, "at": round(time.time(), 3)})
        if self.board:
            self.board.add(self.log.rows[-1])

    def close(self) -> None:
        """Leaves a terminal at the start of a line."""
        self.screen.close()

    def _show(self, row: Row, lasting: bool = False) -> None:
        if self.tells:
            self.screen.line(self._said(row), lasting)

    def _said(self, row: Row) -> str:
        losses = " ".join(f"{key} {_short(value)}" for key, value in row.items() if key not in _OWN)
        speed = f"{_short(row['pictures_per_s'])} pictures/s, {_time(row['left_s'])} left"
        rate = f" rate {row['rate']:.2e}" if "rate" in row else ""
        return f"{self.run.name} {self.step} of {self.run.schedule.steps}: {losses}{rate}, {speed}"

    def _say(self, text: str) -> None:
        if self.tells:
            self.screen.line(text, lasting=True)

    def _note(self, bad: dict[str, str]) -> None:
        new = {key: why for key, why in bad.items() if key not in self.bad}
        self.bad |= new.keys()
        if not new or not self.tells:
            return
        self._row({"bad": new})
        first, why = next(iter(new.items()))
        self._say(f"warning: {first} cannot be read ({why}); another takes its place, {len(self.bad)} so far")


class Screen:
    """Lines that last, and on a terminal one that is drawn over and over below them."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock, self.drawn = stream, clock, -_OFTEN_S
        self.is_terminal, self.is_open = stream.isatty(), False

    def is_due(self) -> bool:
        return self.is_terminal and self.clock() - self.drawn >= _OFTEN_S

    def line(self, text: str, lasting: bool = False) -> None:
        """Control characters are left out: file names and captions may have any."""
        text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
        if self.is_terminal and not lasting:
            text = text[: shutil.get_terminal_size().columns - 1]
        elif not lasting:
            return
        start = "\r\x1b[K" if self.is_open else ""
        self.stream.write(f"{start}{text}" + ("\n" if lasting else ""))
        self.stream.flush()
        self.is_open, self.drawn = not lasting, self.clock()

    def close(self) -> None:
        """The drawn line is the last."""
        if self.is_open:
            self.stream.write("\n")
            self.stream.flush()
            self.is_open = False


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{round(seconds)} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
