"""Lines over steps as SVG, without any script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
_WIDTH, _TALL, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 240, 56, 12, 12, 28
_MOST = 400  # points of a line; more cannot be told apart
COLOURS = 8


@dataclass(frozen=True)
class Line:
    """`dotted`: its points are few, and each is marked."""

    name: str
    points: Sequence[Point]
    dotted: bool = False


def figure(title: str, lines: Sequence[Line], best: float | None = None) -> str:
    """A plot with its heading and key, or nothing where there is no point. `best`: a step that is marked."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    keys = "".join(
        f'<span class="key"><i style="background:var(--c{i % COLOURS})"></i>{escape(line.name)} '
        f"<b>{short(line.points[-1][1])}</b></span>"
        for i, line in enumerate(lines)
    )
    return f"<figure><h2>{escape(title)}</h2>{_svg(title, lines, best)}<figcaption>{keys}</figcaption></figure>"


def short(value: float) -> str:
    """Four digits, as far as they say something."""
    return f"{value:.0f}" if 10_000 <= abs(value) < 1e9 else f"{value:.4g}"


def _svg(title: str, lines: Sequence[Line], best: float | None) -> str:
    lines = [Line(line.name, thinned(line.points), line.dotted) for line in lines]
    x = _Axis([p[0] for line in lines for p in line.points], _LEFT, _WIDTH - _RIGHT)
    y = _Axis([p[1] for line in lines for p in line.points], _TALL - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_TALL}" role="img" aria-label="{escape(title)}">']
    for at in x.ticks(least=1):
        parts.append(f'<line class="axis" x1="{x(at)}" x2="{x(at)}" y1="{_TOP}" y2="{_TALL - _BOTTOM}"/>')
        parts.append(f'<text x="{x(at)}" y="{_TALL - _BOTTOM + 16}" text-anchor="middle">{short(at)}</text>')
    for at in y.ticks():
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(at)}" y2="{y(at)}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(at) + 4}" text-anchor="end">{short(at)}</text>')
    if best is not None and x.low <= best <= x.high:
        mark = f'<line class="best" x1="{x(best)}" x2="{x(best)}" y1="{_TOP}" y2="{_TALL - _BOTTOM}">'
        parts.append(f"{mark}<title>the best, step {short(best)}</title></line>")
    parts += [_drawn(line, i, x, y) for i, line in enumerate(lines)]
    return "".join([*parts, "</svg>"])


def _drawn(line: Line, i: int, x: _Axis, y: _Axis) -> str:
    colour = f"var(--c{i % COLOURS})"
    path = "L".join(f"{x(a)} {y(b)}" for a, b in line.points)
    found = f'<path d="M{path}" fill="none" style="stroke:{colour}" stroke-width="1.6"/>'
    if not line.dotted and len(line.points) > 1:
        return found
    return found + "".join(
        f'<circle cx="{x(a)}" cy="{y(b)}" r="3" style="fill:{colour}">'
        f"<title>{escape(line.name)} {short(b)}, step {short(a)}</title></circle>"
        for a, b in line.points
    )


class _Axis:
    """From values to places."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = min(values), max(values), start, end
        if self.low == self.high:
            room = abs(self.low) * 0.05 or 1.0
            self.low, self.high = self.low - room, self.high + room

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, n: int = 5, least: float = 0) -> list[float]:
        """Round values; `least`: between two of them."""
        rough = max(least, (self.high - self.low) / n)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step)
        return [round(k * step, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Means of neighbours where there are more than a plot can show."""
    size = -(-len(points) // _MOST)
    if size == 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]
