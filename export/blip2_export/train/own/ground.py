"""What every stage stands on, whatever it trains: hardware, a base, data, and the work folder that a run is in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from blip2_export.train.own import estimate, hardware, length, loop, machine, measures, start, watch
from blip2_export.train.own.bad import Bad
from blip2_export.train.own.base import Base, open_base
from blip2_export.train.own.batches import Batches, Part, Say
from blip2_export.train.own.features import Eye, Shelf
from blip2_export.train.own.held_out import HeldOut
from blip2_export.train.own.loop import Fit, Run, Task
from blip2_export.train.own.pictures import Sight
from blip2_export.train.own.sets import Learnt, Usable, learnt
from blip2_export.train.own.setup import Setup
from blip2_export.train.own.sources import DataError

_MEASURED_TOGETHER = 128  # pictures at most
_LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class Stage:
    """What `model` is trained on. `read`: a part as the model takes it; `still`: models beside it that do not change."""

    name: str
    model: nn.Module
    parts: Callable[[int], list[Part]]
    read: Callable[[Part], Any]
    looks: watch.Watch
    bad: Bad
    still: list[nn.Module]
    mass: Callable[[Part], Tensor] = lambda _: torch.ones(())

    def task(self, better: str) -> Task:
        """`better`: the measure that tells the best checkpoint."""

        def losses(trained: nn.Module, part: Part) -> dict[str, Tensor]:
            return trained(self.read(part))

        looks, by = self.looks, measures.better(self.name, better)
        shown = (looks.sample, looks.thumbnails)
        return Task(self.model, self.parts, losses, looks.measure, by, *shown, self.bad.note, self.mass)


@dataclass(frozen=True)
class Ground:
    """`setup`: with the steps that its length takes on this data."""

    setup: Setup
    base: Base
    learnt: Learnt
    accelerator: Accelerator

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def n_pictures(self) -> int:
        return len(self.learnt.train) + len(self.learnt.held_out)

    def first(self) -> tuple[Any, Any]:
        """The Q-Former's tokenizer, and the Q-Former as it starts."""
        setup = self.setup
        setup.work.mkdir(parents=True, exist_ok=True)
        given = start.open_qformer(setup.qformer, setup.bert) if setup.qformer else None
        begins = start.Start(setup.bert, given, setup.n_queries)
        with self.accelerator.main_process_first():
            tokenizer = start.tokenizer(setup.work, begins, self._texts())
        return tokenizer, start.qformer(self.base, begins, len(tokenizer))

    def _texts(self) -> Iterator[str]:
        """What the Q-Former will read."""
        for record in self.learnt.train:
            yield from record.captions
            yield from (question.text for question in record.questions)

    def take_stage1(self, first: nn.Module) -> bool:
        """Whether there was one in the work folder."""
        file, best = (self.setup.work / name for name in ("stage1.pt", "stage1_best.pt"))
        if self.setup.write == "best" and file.exists() and best.exists():
            file = best
        if not file.exists():
            if self.setup.qformer is None:
                raise DataError(f"{file} is missing; run `train stage1` with the same --work first, or name --qformer")
            return False
        found = loop.read(file)
        kept = {name.removeprefix("qformer."): value for name, value in found["model"].items()}
        loop.fill(dict(first.named_parameters()), kept, file)
        if self.accelerator.is_main_process:
            steps = json.loads(found["facts"])["steps"]
            print(f"the Q-Former is that of {file}, step {found['step']} of {steps}", file=sys.stderr)
        return True

    def save_memory(self, *modules: nn.Module) -> None:
        if self.setup.checkpointing:
            hardware.recomputed(*modules)

    def eye(self) -> Eye:
        """The frozen encoder, with the features that are kept of it, if they are."""
        setup, vision, shelf = self.setup, self.base.vision, None
        if setup.features is not None:
            if setup.augment:
                raise DataError("--cache-features goes with pictures that stay as they are; leave it or --augment out")
            look = self.base.look(self.base.config.vision_config.image_size)
            shelf = Shelf(setup.features, vision, look, setup.precision, setup.features_type)
            shelf.begin(self.n_pictures, setup.features_most)
        return Eye(vision, self.device, shelf)

    def sight(self, shelf: Shelf | None = None, side: int | None = None) -> Sight:
        """How pictures are seen that are learnt from."""
        look = self.base.look(side or self.base.config.vision_config.image_size)
        return Sight(look, self.setup.augment, shelf)

    def parts(self, sight: Sight, say: Say) -> Callable[[int], list[Part]]:
        """Of a step."""
        made = Batches(self.learnt.order, sight, self.setup.sizes, self.setup.seed)
        return lambda step: made.parts(step, say)

    def held_out(self, sight: Sight, bad: Bad) -> HeldOut:
        """Pictures as they are."""
        sizes = self.setup.sizes
        # The same, however many processes there are.
        size = min(sizes.batch // sizes.accumulate, _MEASURED_TOGETHER)
        return HeldOut(self.learnt.held_out, replace(sight, augments=False), size, self.setup.seed, bad.tell)

    def bad(self, name: str) -> Bad:
        return Bad(self.setup.work / f"{name}_bad_pictures.jsonl", self.n_pictures, self.setup.bad_share)

    def fit(self, stage: Stage, out: Path | None) -> None:
        """Trains, and leaves the weights in the model that are to be written."""
        if self.setup.write not in ("best", "last"):
            raise DataError(f"--write {self.setup.write}: it is best or last")
        run = self.run(stage.name)
        self._tell(run, stage, out)
        fit = Fit(run, stage.task(self.setup.better), self.accelerator)
        fit.go()
        if self.accelerator.is_main_process:
            stage.bad.end()
        said = fit.take(self.setup.write == "best")
        if self.accelerator.is_main_process:
            print(said, file=sys.stderr)

    def run(self, name: str) -> Run:
        """The run of a stage: of the same work folder with other facts it is refused."""
        setup = self.setup
        more = {
            "log_every": max(1, min(50, setup.schedule.steps // 100)),
            "measure_every": setup.measure_every,
            "patience": setup.patience,
            "measures_first": True,
            "workers": setup.workers,
            "precision": setup.precision,
            "sample_every": setup.sample_every,
            "pictures": setup.sizes.batch,
            "tensorboard": setup.tensorboard,
            "machine": machine.facts(self.device),
        }
        facts = {**_facts(setup, name), "records": self.learnt.print()}
        return Run(name, setup.work, setup.schedule, setup.seed, setup.sizes.accumulate, facts=facts, **more)

    def _tell(self, run: Run, stage: Stage, out: Path | None) -> None:
        """What training takes, and how often it is measured; refuses where the disk is too small."""
        told = estimate.of(stage.model, *stage.still)
        if not self.accelerator.is_main_process:
            return
        estimate.check_disk(run.work, run.name, told, out)
        often = f"; it is measured every {run.measure_every} of {run.schedule.steps} steps"
        print(f"{run.name}: {told}{often if stage.looks.measure else ''}", file=sys.stderr)


def opened(setup: Setup) -> tuple[Accelerator, Base]:
    """Hardware and base, of which it can be said whether the stage goes with them before data is read."""
    if setup.precision not in hardware.PRECISIONS:
        raise DataError(f"the precision `{setup.precision}` is none of {', '.join(hardware.PRECISIONS)}")
    # 16-bit arithmetic is `hardware`'s: the one of `accelerate` refuses fp16 on a CPU.
    # One process converts and evaluates for as long as that takes; the others wait.
    wait = InitProcessGroupKwargs(timeout=_LONGEST_WAIT)
    # Unless it is told, `accelerate` lets processes of a CPU that `torchrun` started learn each by itself.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=[wait])
    return accelerator, open_base(setup.base, setup.parts)


def laid(setup: Setup, base: Base, accelerator: Accelerator, usable: Usable) -> Ground:
    """With data that is `usable`."""
    # The first process unpacks shards and looks for copies; then the others find that done.
    with accelerator.main_process_first():
        found = learnt(setup, usable)
    setup.sizes.check()
    n_records, batch, schedule = len(found.order), setup.sizes.batch, setup.schedule
    if setup.length is not None:
        schedule = setup.length.schedule(schedule, n_records, batch)
    every = setup.measure_every or length.measure_every(schedule.steps, n_records, batch)
    return Ground(replace(setup, schedule=schedule, measure_every=every), base, found, accelerator)


def _facts(setup: Setup, name: str) -> dict[str, Any]:
    """What a run's weights follow from."""
    # Features that are kept are rounded; whole ones are what they would be without.
    features_type = setup.features_type if setup.features is not None else "float32"
    return {
        "base": str(setup.base),
        "data": [[str(path), weight] for path, weight in setup.data],
        "held_out": str(setup.held_out),
        "start": [str(setup.bert), str(setup.qformer), setup.n_queries],
        "prompt": setup.prompt,
        "batch": setup.sizes.batch,
        "seed": setup.seed,
        "accumulate": setup.sizes.accumulate,
        "precision": [setup.precision, setup.held],
        "pictures": ["augmented" if setup.augment else "whole", features_type],
        "lora": asdict(setup.lora) if setup.lora else None,
        "better": measures.better(name, setup.better)[0],
        **{key: value for key, value in asdict(setup.schedule).items() if key != "betas"},
    }


__all__ = ["Ground", "Stage", "laid", "opened"]
