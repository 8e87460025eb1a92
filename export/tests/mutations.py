"""Damages the JSON files of a checkpoint folder, the same way for the same seed."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, -7, 13, 10**9, 2**31, 2**32, 2**63, 10**30, -(10**30)),
    *(0.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), 2.0),
    *(
        "",
        "x",
        "\u0000",
        "\ud83d",
        "../../etc",
        "left",
        "relu",
        "BertTokenizer",
        "CLIPImageProcessor",
        "<pad>",
        "é" * 300,
    ),
    *(
        [],
        {},
        [None],
        [[]],
        [0, 0, 0],
        [1, 2],
        ["x"],
        {"x": None},
        {"height": -1, "width": 28},
        {"shortest_edge": 10**9},
    ),
    [0] * 1000,
)
_WHOLE = (
    *("", " ", "null", "[]", "5", '"x"', "{}", "{", "[[", "nul", '{"a": 1, "a"}', "\ufeff{}", '{"x": 1} trailing'),
    *("[" * 100_000, '{"a":' * 100_000, '{"model_type": ' + "9" * 5000 + "}"),
)


def damage(path: Path, rng: random.Random) -> str:
    """Changes one file; says how."""
    text = path.read_text()
    how = rng.random()
    if how < 0.1:
        whole = rng.choice(_WHOLE)
        path.write_text(whole)
        return f"{path.name} is {whole[:20]!r}"
    if how < 0.15:
        cut = rng.randrange(len(text))
        path.write_text(text[:cut])
        return f"{path.name} ends at {cut}"
    if how < 0.2:
        at = rng.randrange(len(text))
        path.write_bytes(text[:at].encode() + b"\xff\xc0" + text[at:].encode())
        return f"{path.name} has no UTF-8 at {at}"
    content = json.loads(text)
    said = [_edit(content, rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
    path.write_text(json.dumps(content))
    return f"{path.name}: {', '.join(said)}"


def _edit(content: Any, rng: random.Random) -> str:
    """One value somewhere in nested objects and lists becomes another, or goes."""
    where, at = "", content
    while True:
        if not at:
            return f"{where} is empty"
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        where += f".{key}"
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        if rng.random() < 0.2:
            del at[key]
            return f"without {where}"
        if rng.random() < 0.1:
            at[key] = json.loads('{"a":' * 300 + "1" + "}" * 300)
            return f"{where} is 300 deep"
        at[key] = copy.deepcopy(rng.choice(VALUES))
        return f"{where} = {str(at[key])[:40]!r}"
