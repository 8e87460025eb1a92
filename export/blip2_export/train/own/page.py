"""The log of a run as a page that stands alone: no script, nothing from elsewhere, and texts that are only ever texts."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from blip2_export.train.own.aside import aside_of
from blip2_export.train.own.log import Row
from blip2_export.train.own.plots import COLOURS, Line, figure, short
from blip2_export.train.own.sources import DataError

_ABOUT = (
    "step",
    "steps",
    "at",
    "left_s",
    "step_s",
    "pictures_per_s",
    "rate",
    "gradient_norm",
    "temperature",
    "skipped",
)
_LIGHT = ("#2563a8", "#c2620c", "#2f7d4f", "#8a4fbf", "#b1366b", "#7a6a1d", "#3b8291", "#666d75")
_DARK = ("#7ab3ef", "#f2a55f", "#74c795", "#c39bea", "#ef86b4", "#d3c065", "#7cc6d6", "#a9afb6")
_SHOWN = 6  # of the samples of a picture: the first and the last ones


def write(file: Path, name: str, rows: Sequence[Row], thumbnails: dict[str, bytes]) -> None:
    """Whole at any moment. `thumbnails`: JPEG of the pictures that samples name."""
    aside = aside_of(file)
    try:
        aside.write_text(document(name, rows, thumbnails), encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{file}: it cannot be written ({error}); the last checkpoint is as it was") from error


def document(name: str, rows: Sequence[Row], thumbnails: dict[str, bytes]) -> str:
    """The page."""
    steps = [row for row in rows if "rate" in row]
    measured = [row for row in rows if "held_out" in row]
    best = next((row["step"] for row in reversed(measured) if row.get("better")), None)
    body = "".join(
        [
            _header(name, rows, steps),
            f'<div class="plots">{"".join(_plots(steps, measured, best))}</div>',
            _measures(measured),
            _samples([row for row in rows if "samples" in row], thumbnails),
            _bad(rows),
            *(_facts(title, rows[0].get(key) or {}) for title, key in _FACTS if rows),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(name)}</title>\n<style>{_style()}</style>\n<main>{body}</main>\n"
    )


_FACTS = (("Settings", "settings"), ("Machine", "machine"))
_SHARES: dict[str, Callable[[str], bool]] = {
    "Retrieval, ranked anew by matching": lambda key: key.startswith("reranked"),
    "Retrieval": lambda key: key.endswith(("r1", "r5")),
    "Right answers": lambda _: True,
}


def _header(name: str, rows: Sequence[Row], steps: Sequence[Row]) -> str:
    ended = next((row["ended"] for row in reversed(rows) if "ended" in row), None)
    last = steps[-1] if steps else {}
    state = ended or ("under way" if steps else "no step is logged yet")
    found = f"<h1>{escape(name)}</h1><p>{escape(state)}"
    if rows:
        found += f", step {rows[-1]['step']}"
    if last.get("left_s") and not ended:
        found += f", about {round(last['left_s'] / 60)} min left"
    if last.get("pictures_per_s"):
        found += f", {short(last['pictures_per_s'])} pictures/s"
    return f"{found}.</p>"


def _plots(steps: Sequence[Row], measured: Sequence[Row], best: float | None) -> list[str]:
    """Losses in one plot each, learnt and held out; other numbers beside those that they are compared with."""
    held = {key: _points(measured, key, "held_out") for row in measured for key in row["held_out"]}
    # A number that was not finite is not in its row.
    keys = dict.fromkeys(key for row in steps for key in row)
    losses = [key for key in keys if key not in _ABOUT and not _is_share(key)]
    found = [
        figure(f"{key}: loss", [Line("learnt", _points(steps, key)), Line("held out", held.pop(key, []), True)], best)
        for key in losses
    ]
    found.append(figure("loss, held out", [Line("loss", held.pop("loss", []), True)], best) if len(losses) > 1 else "")
    held.pop("loss", None)
    for title, belongs in _SHARES.items():
        mine = [key for key in held if _is_share(key) and belongs(key)]
        found.append(figure(f"{title}, held out", [Line(key, held.pop(key), True) for key in mine], best))
    learnt = [Line(key, _points(steps, key)) for key in keys if _is_share(key)]
    found.append(figure("Right in the batch", learnt))
    found += [figure(f"{key}, held out", [Line(key, points, True)], best) for key, points in held.items()]
    single = {
        "rate": "Learning rate",
        "gradient_norm": "Gradient norm",
        "temperature": "Temperature",
        "skipped": "Share of steps that overflowed",
    }
    found += [figure(title, [Line(key, _points(steps, key))]) for key, title in single.items()]
    found.append(figure("Pictures per second", [Line("pictures/s", _points(steps, "pictures_per_s"))]))
    return found


def _is_share(key: str) -> bool:
    """Whether it lies from 0 to 1, by its name."""
    return key.endswith(("accuracy", "r1", "r5", "recalled", "right"))


def _points(rows: Sequence[Row], key: str, inside: str | None = None) -> list[tuple[float, float]]:
    values = ((row["step"], (row[inside] if inside else row).get(key)) for row in rows)
    return [(step, value) for step, value in values if isinstance(value, int | float)]


def _measures(measured: Sequence[Row]) -> str:
    if not measured:
        return ""
    keys = list(measured[-1]["held_out"])
    head = "".join(f"<th>{escape(key)}</th>" for key in ["step", *keys])
    shown = measured if len(measured) <= 12 else [*measured[:2], *measured[-10:]]
    better = [row for row in measured if row.get("better")]
    body = "".join(
        f"<tr{' class=chosen' if better and row is better[-1] else ''}><td>{row['step']}</td>"
        + "".join(f"<td>{_number(row['held_out'].get(key))}</td>" for key in keys)
        + "</tr>"
        for row in shown
    )
    left_out = f" {len(measured) - len(shown)} of {len(measured)} are left out." if len(shown) < len(measured) else ""
    about = f'<p class="soft">The best is marked.{left_out}</p>'
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<section><h2>Held out</h2>{table}{about}</section>"


def _number(value: Any) -> str:
    return short(value) if isinstance(value, int | float) else "–"


def _samples(rows: Sequence[Row], thumbnails: dict[str, bytes]) -> str:
    if not rows:
        return ""
    cards = "".join(
        _card(key, rows, thumbnails.get(key)) for key in dict.fromkeys(s["picture"] for s in rows[-1]["samples"])
    )
    return f'<section><h2>What it says of pictures that are held out</h2><div class="cards">{cards}</div></section>'


def _card(key: str, rows: Sequence[Row], thumbnail: bytes | None) -> str:
    found = [(row["step"], sample) for row in rows for sample in row["samples"] if sample["picture"] == key]
    shown = found if len(found) <= _SHOWN else [found[0], *found[-_SHOWN + 1 :]]
    data = base64.b64encode(thumbnail).decode() if thumbnail else ""
    image = f'<img alt="" src="data:image/jpeg;base64,{data}">' if data else ""
    asked = f"<p><b>{escape(found[-1][1]['asked'])}</b></p>" if found[-1][1].get("asked") else ""
    said = "".join(f"<li><span>{step}</span> {escape(sample['said']) or '–'}</li>" for step, sample in shown)
    true = "".join(f"<li>{escape(text)}</li>" for text in found[-1][1].get("true", [])[:5])
    return (
        f'<article>{image}<p class="soft">{escape(key)}</p>{asked}<ul class="said">{said}</ul>'
        f'<p class="soft">People say:</p><ul>{true}</ul></article>'
    )


def _bad(rows: Sequence[Row]) -> str:
    bad = {key: why for row in rows for key, why in row.get("bad", {}).items()}
    if not bad:
        return ""
    lines = "".join(f"<li>{escape(key)}: {escape(str(why))}</li>" for key, why in list(bad.items())[:20])
    return f'<section><h2>{len(bad)} pictures could not be read</h2><ul class="wide">{lines}</ul></section>'


def _facts(title: str, facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f'<section><h2>{title}</h2><div class="wide"><table class="facts">{rows}</table></div></section>'


def _style() -> str:
    light = " ".join(f"--c{i}: {c};" for i, c in enumerate(_LIGHT[:COLOURS]))
    dark = " ".join(f"--c{i}: {c};" for i, c in enumerate(_DARK[:COLOURS]))
    return f"""
:root {{ color-scheme: light dark; --paper: #fbfbfa; --ink: #1d1f21; --soft: #6a6f75; --line: #dcdedf; {light} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #16181a; --ink: #e8e9ea; --soft: #9aa0a6; --line: #34383c; {dark} }} }}
{_RULES}"""


_RULES = """* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .facts td { text-align: left; } th, .facts td:first-child { color: var(--soft); font-weight: 500; }
.facts td + td { white-space: normal; } .chosen td { font-weight: 700; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 1.5rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .85rem; color: var(--soft); } figcaption b { color: var(--ink); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--line); } .best { stroke: var(--soft); stroke-dasharray: 4 3; stroke-width: 1.5; }
.key { display: inline-flex; align-items: center; gap: .35rem; margin-right: 1rem; }
.key i { width: .8rem; height: .8rem; border-radius: 2px; display: inline-block; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 1.5rem; }
article img { width: 100%; max-width: 15rem; border-radius: 4px; display: block; }
article ul { padding-left: 1.1rem; margin: .25rem 0; }
.said { list-style: none; padding: 0 !important; } .said span { color: var(--soft); font-size: .8rem; margin-right: .4rem; }
.said li:last-child { font-weight: 600; }
"""
