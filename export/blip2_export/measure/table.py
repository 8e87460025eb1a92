"""Reports of both sides, round by round → the table of the README."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from blip2_export.measure import samples
from blip2_export.measure.records import Report

Rounds = dict[str, list[Report]]  # a job → its reports, one a round
_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
)  # 97.5 % of Student's t, from 1 degree of freedom on
_NONE = "–"


@dataclass(frozen=True)
class Value:
    """A figure and where it lies with a certainty of 95 %, if anything tells."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        within = f" ({samples.number(self.interval[0])}–{samples.number(self.interval[1])})" if self.interval else ""
        return samples.number(self.value) + within


@dataclass(frozen=True)
class Row:
    """`of`: what one report says, with its own interval."""

    label: str
    job: str
    of: Callable[[Report], Value | None]
    is_rate: bool = False


def table(sides: dict[str, Rounds], rows: Sequence[Row], better: str = "times as fast") -> str:
    """The first side is what the others are compared with."""
    first, *others = sides
    heads = ["", first, *(head for name in others for head in (name, better))]
    return samples.table(heads, (_cells(row, sides, first, others) for row in rows))


def rows(jobs: dict[str, str], stages: Sequence[str]) -> Iterator[Row]:
    """`jobs`: those that were measured, and how to call their texts."""
    yield from (Row(f"{stage}, ms", "stage", _stage(stage)) for stage in stages)
    for job in ("single", "beams"):
        if job in jobs:
            yield Row(f"{jobs[job]}, ms", job, latency("end_to_end"))
    if "single" in jobs:
        yield Row("time to first token, ms", "single", latency("time_to_first_token"))
        yield Row("time per token behind it, ms", "single", latency("time_per_output_token"))
    if "offline" in jobs:
        yield Row(f"{jobs['offline']}, images/s", "offline", rate("images"), True)
        yield Row(f"{jobs['offline']}, tokens/s", "offline", rate("tokens"), True)


def over_rounds(values: Sequence[Value]) -> Value:
    """The geometric mean of rounds, with an interval made of how they differ; of one round its own.

    Queries of a process are more alike than those of another one a minute later, so that more queries in a round make no
    surer figure; more rounds do.
    """
    if len(values) == 1:
        return values[0]
    logs = [math.log(one.value) for one in values]
    mean, n = statistics.fmean(logs), len(logs)
    half = _T[min(n - 1, len(_T)) - 1] * statistics.stdev(logs) / math.sqrt(n)
    return Value(math.exp(mean), (math.exp(mean - half), math.exp(mean + half)))


def ratio(over: Value, under: Value) -> Value:
    """As far as both intervals tell."""
    if over.interval is None or under.interval is None:
        return Value(over.value / under.value, None)
    (low, high), (least, most) = over.interval, under.interval
    return Value(over.value / under.value, (low / most, high / least))


def _cells(row: Row, sides: dict[str, Rounds], first: str, others: Sequence[str]) -> list[str]:
    theirs = _values(row, sides[first])
    cells = [row.label, _said(theirs)]
    for name in others:
        ours = _values(row, sides[name])
        pairs = zip(ours, theirs, strict=False)  # who was stopped has one round less
        cells += [_said(ours), _said([ratio(a, b) if row.is_rate else ratio(b, a) for a, b in pairs])]
    return cells


def _values(row: Row, rounds: Rounds) -> list[Value]:
    return [value for report in rounds.get(row.job, []) if (value := row.of(report)) is not None]


def _said(values: Sequence[Value]) -> str:
    return str(over_rounds(values)) if values else _NONE


def _stage(name: str) -> Callable[[Report], Value | None]:
    return lambda report: _percentile(dict(map(tuple, report["figures"]["stages_ms"])).get(name), 50)


def latency(name: str, rank: int = 50) -> Callable[[Report], Value | None]:
    return lambda report: _percentile(report["figures"]["latencies_ms"].get(name), rank)


def _percentile(summary: Report | None, rank: int) -> Value | None:
    """None of what takes no time."""
    found = summary and next(one for one in summary["percentiles"] if one["rank"] == rank)
    return Value(found["value"], tuple(found["interval"])) if found and found["value"] > 0 else None


def rate(name: str) -> Callable[[Report], Value | None]:
    """None where nothing was answered."""
    return lambda report: Value(found, None) if (found := report["figures"]["rates"][name]) else None
