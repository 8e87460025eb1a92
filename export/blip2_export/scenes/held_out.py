"""Scenes that training never drew, as pictures, and the engine that is asked about them."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blip2_export.engine import run_engine
from blip2_export.scenes import drawing

_AT_ONCE = 100  # pictures that one run of the engine is asked about


@dataclass(frozen=True)
class Engine:
    """The binary with one bundle."""

    binary: Path
    bundle: Path

    def rows(self, command: str, *typed: str) -> list[dict[str, Any]]:
        return run_engine(self.binary, command, "--model", str(self.bundle), "--json", *typed)

    def pairs(self, command: str, key: str, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[list[dict[str, Any]]]:
        """Of each picture the rows about its own texts, which `ask` calls `question` and `match` `text`."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "pairs.jsonl"
            lines = [json.dumps({"image": picture, key: list(texts)}) for picture, texts in pairs if texts]
            file.write_text("\n".join(lines))
            rows = iter(self.rows(command, "--pairs", str(file)))
        return [[next(rows) for _ in texts] for _, texts in pairs]

    def vectors(self, kind: str, *items: str) -> np.ndarray:
        """What `embed` writes: [pictures, queries, width], or [texts, width]."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "vectors.npy"
            options = ["--model", str(self.bundle), *(["--per-query"] if kind == "image" else []), "--npy", str(file)]
            run_engine(self.binary, "embed", *options, kind, *items)
            return np.load(file)


@dataclass
class HeldOut:
    """`rng` draws what is asked of the scenes; `wrong` collects what the bundle got wrong."""

    engine: Engine
    scenes: list[drawing.Scene]
    pictures: list[str]
    rng: random.Random
    wrong: list[dict[str, Any]] = field(default_factory=list)

    def each(self, command: str, key: str, texts: Sequence[Sequence[str]]) -> Iterator[list[dict[str, Any]]]:
        """Of each scene the rows about its own texts; a terminal shows how many have been asked about."""
        pairs = list(zip(self.pictures, texts, strict=True))
        with tqdm(total=len(pairs), unit="picture", leave=False, disable=None) as bar:
            for first in range(0, len(pairs), _AT_ONCE):
                block = pairs[first : first + _AT_ONCE]
                yield from self.engine.pairs(command, key, block)
                bar.update(len(block))

    def missed(self, scene: drawing.Scene, **what: Any) -> None:
        self.wrong.append({"scene": drawing.describe(scene), **what})
