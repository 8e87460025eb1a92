"""What a person says of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from blip2_export.read.lavis import Parts
from blip2_export.train.own.batches import Sizes
from blip2_export.train.own.length import Length
from blip2_export.train.own.lora import Lora
from blip2_export.train.own.run import Schedule


@dataclass(frozen=True)
class Setup:
    """`data`: sets, each with its weight; `held_out`: a share of them, or a set of its own.

    `measure_every`: steps between measurements, 0 for as the run is long.

    `better`: the measure that tells the best checkpoint, by default that of the phase; `write`: `best` or `last`, the weights that
    are written. `samples`: pictures whose captions or answers are shown, every `sample_every` steps or else with each measurement.

    `images`: folder of the pictures of all sets, or one for each. `answers`, `held_out_answers`: the annotations of VQAv2's
    questions, for each set. `length`: gives `schedule` its steps once the data is known. `parts`: what a LAVIS file leaves out.
    `frozen_float32`: frozen weights stay float32 whatever the precision is; otherwise they are held in what they are computed in.
    `checkpointing`: activations are computed twice instead of kept.

    `features`: folder that features of the frozen encoder are kept in, as `features_type`, of at most `features_most` GiB.
    `augment`: pictures are cropped and mirrored. `bad_share`: of the pictures, how many may be such that cannot be read.
    """

    data: list[tuple[Path, float]]
    base: Path
    work: Path
    images: tuple[Path, ...] = ()
    held_out: float | Path = 0.02
    held_out_images: Path | None = None
    bert: Path | None = None
    qformer: Path | None = None
    n_queries: int | None = None
    prompt: str = ""
    schedule: Schedule = field(default_factory=lambda: Schedule(1000))
    sizes: Sizes = field(default_factory=lambda: Sizes(64))
    precision: str = "no"
    seed: int = 0
    workers: int = 2
    measure_every: int = 0
    patience: int = 0
    better: str = ""
    write: str = "best"
    samples: int = 4
    sample_every: int = 0
    tensorboard: bool = False
    answers: tuple[Path, ...] = ()
    held_out_answers: Path | None = None
    length: Length | None = None
    parts: Parts = field(default_factory=Parts)
    lora: Lora | None = None
    frozen_float32: bool = False
    checkpointing: bool = False
    features: Path | None = None
    features_type: str = "float16"
    features_most: float = 100.0
    augment: bool = False
    bad_share: float = 0.05

    @property
    def held(self) -> str:
        """The precision that frozen weights are held in."""
        return "no" if self.frozen_float32 else self.precision
