"""How a run goes: a line for people, one of JSON for machines, and an end that is foreseen."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from blip2_export.train.own.pace import Pace

if TYPE_CHECKING:
    from blip2_export.train.own.estimate import Rehearsal
    from blip2_export.train.own.loop import Run


class Progress:
    """Means over the steps since the last line."""

    def __init__(self, run: Run, start: int, tells: bool) -> None:
        self.run, self.step, self.tells = run, start, tells
        self.sums, self.count, self.since = dict[str, float](), 0, time.monotonic()
        self.bad: set[str] = set()
        self.pace = Pace(run.schedule.steps, run.measure_every, run.save_seconds)

    def add(self, measured: dict[str, float], notes: list[dict[str, str]]) -> None:
        """What a step measured, and which pictures it could not read."""
        for key, value in measured.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.step, self.count = self.step + 1, self.count + 1
        self.pace.stepped()
        for note in notes:
            self._note(note)
        if self.step % self.run.log_every == 0 or self.step == self.run.schedule.steps:
            took = time.monotonic() - self.since
            left = self.pace.left(self.step)
            means = {key: round(value / self.count, 6) for key, value in self.sums.items()}
            self.write({"step": self.step, **means, "steps_per_s": round(self.count / took, 3), "left_s": round(left)})
            self.sums, self.count, self.since = {}, 0, time.monotonic()

    def foretell(self, found: Rehearsal) -> None:
        """What a rehearsal found, before the first step."""
        self.pace.expected = (found.step, found.measurement)
        left, n = self.pace.left(self.step), self.run.schedule.steps - self.step
        if self.tells:
            print(
                f"{self.run.name}: {n} steps of about {found.step:.3g} s, a measurement takes {found.measurement:.3g} s: "
                f"about {_time(left)}; {found.peak / (1 << 30):.2f} GiB of memory so far",
                file=sys.stderr,
                flush=True,
            )
        self.pace.begin()

    def write(self, row: dict[str, Any]) -> None:
        """A line in the log of the run, and for whoever looks on."""
        if not self.tells:
            return
        with (self.run.work / f"{self.run.name}.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(f"{self.run.name} {_plain(row)} of {self.run.schedule.steps}", file=sys.stderr, flush=True)

    def _note(self, bad: dict[str, str]) -> None:
        new = {key: why for key, why in bad.items() if key not in self.bad}
        self.bad |= new.keys()
        if not new or not self.tells:
            return
        with (self.run.work / "bad_pictures.jsonl").open("a") as log:
            for key, why in new.items():
                log.write(json.dumps({"picture": key, "why": why}) + "\n")
        first, why = next(iter(new.items()))
        print(
            f"warning: {first} cannot be read ({why}); another takes its place, {len(self.bad)} so far", file=sys.stderr
        )


def _plain(row: dict[str, Any]) -> str:
    shown = {key: _time(value) if key == "left_s" else value for key, value in row.items()}
    return " ".join(
        f"{key.lstrip('_').removesuffix('_s') if key == 'left_s' else key} {value}" for key, value in shown.items()
    )


def _time(seconds: float) -> str:
    minutes, hours = divmod(round(seconds) // 60, 60)[::-1] if seconds >= 3600 else (round(seconds) // 60, 0)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{round(seconds)} s"
