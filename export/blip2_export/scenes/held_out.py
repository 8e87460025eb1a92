"""Scenes that training never drew, as pictures, and the engine that is asked about them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from blip2_export.engine import run_engine
from blip2_export.scenes import drawing


@dataclass(frozen=True)
class Engine:
    """The binary with one bundle."""

    binary: Path
    bundle: Path

    def rows(self, command: str, *typed: str) -> list[dict[str, Any]]:
        return run_engine(self.binary, command, "--model", str(self.bundle), "--json", *typed)

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

    def each(self) -> Iterator[tuple[drawing.Scene, str]]:
        """Scenes with their pictures; a terminal shows how many have been asked about."""
        pairs = zip(self.scenes, self.pictures, strict=True)
        yield from tqdm(pairs, total=len(self.pictures), unit="picture", leave=False, disable=None)

    def missed(self, scene: drawing.Scene, **what: Any) -> None:
        self.wrong.append({"scene": drawing.describe(scene), **what})
