"""What a run is: how long, how fast, where its files go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2_export.train import rate
from blip2_export.train.own.aside import aside_of

# Where facts of a run come from, if not from an option of their name.
_OPTIONS = {
    "batch": "--batch-size",
    "better": "--best-by",
    "floor": "--least-rate by --learning-rate",
    "pictures": "--augment and --cache-type",
    "precision": "--precision and --frozen-float32",
    "records": "what --data holds",
    "start": "--bert, --qformer and --queries",
}


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine to `floor` × the peak (section 3.4 of the paper; AdamW with its β₂ of 0.98)."""

    steps: int
    learning_rate: float = 1e-4
    warmup: int = 2000
    floor: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0

    def factor(self, step: int) -> float:
        """Of the peak rate at a step."""
        return rate.factor(step, self.steps, self.warmup, self.floor)


@dataclass(frozen=True)
class Run:
    """A named phase: where its files go, how large its steps are, and how often it is looked at.

    `accumulate`: parts of a step that are computed one after another. `measure_every`: steps between measurements on what is held
    out. `patience`: measurements without a better one after which it ends, 0 for never. `sample_every`: steps between samples, 0
    for with measurements. `measures_first`: also before the first step. `pictures`: of a step, over all processes.
    """

    name: str
    work: Path
    schedule: Schedule
    seed: int = 0
    accumulate: int = 1
    workers: int = 2
    log_every: int = 50
    measure_every: int = 1000
    save_seconds: float = 300.0
    patience: int = 0
    measures_first: bool = False
    precision: str = "no"
    sample_every: int = 0
    pictures: int = 1
    tensorboard: bool = False
    facts: dict[str, Any] | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.name}.pt"

    @property
    def log(self) -> Path:
        return self.work / f"{self.name}.jsonl"

    @property
    def page(self) -> Path:
        return self.work / f"{self.name}.html"

    @property
    def best(self) -> Path:
        return self.work / f"{self.name}_best.pt"

    @property
    def leftovers(self) -> list[Path]:
        """What a run that was killed may have left of a file that it wrote anew."""
        return [aside_of(file) for file in (self.checkpoint, self.best, self.log, self.page)]


def option(fact: str) -> str:
    """What somebody types for a fact of a run."""
    return _OPTIONS.get(fact, f"--{fact.replace('_', '-')}")
