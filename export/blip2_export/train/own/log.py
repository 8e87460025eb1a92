"""The log of a run, WORK/PHASE.jsonl: one object a line, by their steps, each step once however often the run was killed.

    {"step": 0, "settings": {…}, "machine": {…}}                  when it began
    {"step": 40, "resumed": true}                                 it went on from a checkpoint
    {"step": 50, "steps": 10, LOSSES…, "rate": 1e-05, "gradient_norm": 0.7, "pictures_per_s": 51.2, "step_s": 1.25, "left_s": 3100}
    {"step": 1000, "held_out": {"loss": 2.1, …}, "better": true, "took_s": 12.5}
    {"step": 1000, "samples": [{"picture": "a.jpg", "said": "a dog", "true": ["a dog on a lawn"]}]}
    {"step": 1000, "bad": {"b.jpg": "OSError: …"}}                 pictures that gave way to others, when first met
    {"step": 9000, "ended": "…", "best_step": 7000}               why, and where its best measurement was

`steps`: how many steps a line is the mean of. `rate`: the learning rate. `gradient_norm`: before clipping. `skipped`: under fp16,
the share of them that overflowed and was left out. `left_s`: until the end, measuring and saving included. Every line has `at`,
seconds since 1970. A value that is not finite is `null`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from blip2_export.train.own.aside import aside_of
from blip2_export.train.own.sources import DataError

Row = dict[str, Any]


class Log:
    """The file of one run; what is after `step` belongs to steps that a killed run lost, and is cut.

    `looked`: the last step at which it was measured, if that is an earlier one: it will be measured at `step` again.
    """

    def __init__(self, file: Path, step: int, looked: int | None = None) -> None:
        last = step if looked is None else looked
        self.file = file
        self.rows = [row for row in read(file) if row["step"] <= (last if _looks(row) else step)] if step else []
        aside = aside_of(file)
        try:
            aside.write_bytes(b"".join(_line(row) for row in self.rows))
            os.replace(aside, file)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise _unwritten(file, error) from error

    def add(self, row: Row) -> None:
        """One write for one line, so that a run that is killed leaves whole lines."""
        plain, line = finite(row), _line(row)
        try:
            with self.file.open("ab", buffering=0) as opened:
                before = os.fstat(opened.fileno()).st_size
                if opened.write(line) != len(line):
                    opened.truncate(before)
                    raise OSError("there is no room for a line")
        except OSError as error:
            raise _unwritten(self.file, error) from error
        self.rows.append(plain)


def read(file: Path) -> list[Row]:
    """All whole lines."""
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")
    return [row for line in lines[:-1] if (row := _row(line)) is not None]


def finite(value: Any) -> Any:
    """The same with `None` for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _looks(row: Row) -> bool:
    return "held_out" in row or "samples" in row


def _line(row: Row) -> bytes:
    return json.dumps(finite(row), allow_nan=False).encode() + b"\n"


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _unwritten(file: Path, error: OSError) -> DataError:
    return DataError(f"{file}: it cannot be written ({error}); the last checkpoint is as it was")
