"""One optimisation loop on whatever hardware there is: goes on after a kill with the weights that it would have had without."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blip2_export.train.own import together
from blip2_export.train.own.progress import Progress
from blip2_export.train.own.sources import DataError


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
        if step < self.warmup:
            return (step + 1) / self.warmup
        share = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Run:
    """A named phase: where its files go, how large its steps are, and how often it is looked at.

    `accumulate`: parts of a step that are computed one after another. `measure_every`: steps between measurements on what is held
    out. `patience`: measurements without a better one after which it ends, 0 for never. `sample_every`: steps between samples, 0
    for with measurements. `pictures`: of a step, over all processes.
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


@dataclass(frozen=True)
class Task:
    """What is trained, of parameters that want gradients.

    `parts`: what a step sees, as so many parts of this process; made in another process, a pure function of the step.
    `losses`: of `model` on a part that lies on the device; the loss is their sum, keys that start with `_` are only logged.
    `measure`: on what is held out; `better`: the key of it that tells the best checkpoint, and whether more is better. `sample`:
    what the model says of a few pictures; `thumbnails`: those pictures, as JPEG. Both see the model in evaluation and may draw.
    `notes`: what parts have to say besides, such as pictures that could not be read.
    """

    model: nn.Module
    parts: Callable[[int], list[Any]]
    losses: Callable[[nn.Module, Any], dict[str, Tensor]]
    measure: Callable[[nn.Module], dict[str, Any]] | None = None
    better: tuple[str, bool] = ("loss", False)
    sample: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    thumbnails: dict[str, bytes] = field(default_factory=dict)
    notes: Callable[[Any], dict[str, str]] = lambda _: {}


@dataclass
class Best:
    """The best measurement so far: its value and step, and how many came since."""

    by: str
    value: float | None = None
    step: int | None = None
    since: int = 0


class _Steps(Dataset[list[Any]]):
    def __init__(self, make: Callable[[int], list[Any]], n: int) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, step: int) -> list[Any]:
        return self.make(step)


class Fit:
    """A run of a task; `go` takes it from its last checkpoint to its end."""

    def __init__(self, run: Run, task: Task, accelerator: Accelerator) -> None:
        self.run, self.task, self.accelerator = run, task, accelerator
        run.work.mkdir(parents=True, exist_ok=True)
        self.trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        self.model = accelerator.prepare_model(task.model)
        self.optimiser = accelerator.prepare_optimizer(_adam(self.trained, run.schedule))
        self.step, self.best = 0, Best(task.better[0])

    def go(self) -> None:
        """Trains, measures, saves; every file is whole at any moment."""
        self._resume()
        if self._is_over:
            return
        progress = Progress(self.run, self.step, self.accelerator.is_main_process)
        progress.thumbnails = self.task.thumbnails
        try:
            self._train(progress)
        finally:
            progress.close()

    def take(self, best: bool) -> str:
        """Puts the weights that are to be kept into the model: the best ones if wanted and known, else the last; says which."""
        key, value, step = self.best.by, self.best.value, self.best.step
        if not best:
            return f"{self.run.name}: the last weights, of step {self.step}"
        if step is None or value is None:
            return f"{self.run.name}: the last weights, of step {self.step}, for nothing was measured"
        if step != self.step:
            fill(self.trained, read(self.run.best)["model"], self.run.best)
        return (
            f"{self.run.name}: the best weights by {key} ({value:.4g}), of step {step}; the last step was {self.step}"
        )

    @property
    def _is_over(self) -> bool:
        return self.step >= self.run.schedule.steps or 0 < self.run.patience <= self.best.since

    def _train(self, progress: Progress) -> None:
        run, saved = self.run, time.monotonic()
        self.model.train()
        for step, parts in self._batches(range(self.step, run.schedule.steps)):
            progress.add(self._update(step, parts), [self.task.notes(part) for part in parts])
            self.step = step + 1
            self._look(progress)
            if self._is_over or time.monotonic() - saved > run.save_seconds:
                with progress.aside("save"):
                    self._save()
                saved = time.monotonic()
            if self._is_over:
                break
        is_whole = self.step >= run.schedule.steps
        progress.end(
            "all steps are done" if is_whole else f"not better for {run.patience} measurements", self.best.step
        )

    def _update(self, step: int, parts: list[Any]) -> dict[str, float]:
        # The same noise whenever, and on whichever machine, the step is made.
        torch.manual_seed(hash((self.run.seed, step, together.rank())) % 2**63)
        schedule, logged = self.run.schedule, dict[str, float]()
        for group in self.optimiser.param_groups:
            group["lr"] = schedule.learning_rate * schedule.factor(step)
        self.optimiser.zero_grad()
        for n, part in enumerate(parts):
            is_last = n + 1 == len(parts)
            with self.accelerator.autocast(), self.accelerator.no_sync(self.model) if not is_last else _nothing():
                losses = self.task.losses(self.model, part)
            total = torch.stack([value for key, value in losses.items() if not key.startswith("_")]).sum() / len(parts)
            self._check(step, total)
            self.accelerator.backward(total)
            for key, value in losses.items():
                logged[key] = logged.get(key, 0.0) + float(together.mean(value)) / len(parts)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimiser.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), schedule.clip)
        self.optimiser.step()
        return {**logged, "_gradient_norm": float(norm), "_rate": float(self.optimiser.param_groups[0]["lr"])}

    def _check(self, step: int, total: Tensor) -> None:
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"{self.run.name}: the loss is {float(total)} at step {step}; lower --learning-rate"
            )

    def _look(self, progress: Progress) -> None:
        """Measures and samples when it is time for that, and draws the page."""
        run, task = self.run, self.task

        def is_time(every: int) -> bool:
            return self.step % every == 0 or self.step == run.schedule.steps

        if task.measure and is_time(run.measure_every):
            with progress.aside("measure"), self._looking() as model:
                found = together.agreed(task.measure(model))
            better = self._is_better(found)
            progress.measured(found, better)
            if better:
                with progress.aside("keep"):
                    self._save()
                    self._save_best()
        if task.sample and is_time(run.sample_every or run.measure_every):
            with progress.aside("sample"), self._looking() as model:
                samples = task.sample(model)
            progress.sampled(samples)
        if is_time(run.measure_every):
            progress.draw()

    @contextmanager
    def _looking(self) -> Iterator[nn.Module]:
        """The model in evaluation, by itself in each process, which all see the same; modes and random state stay as they were."""
        modes = [(module, module.training) for module in self.model.modules()]
        cards = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        self.model.eval()
        try:
            with torch.random.fork_rng(cards), torch.no_grad(), self.accelerator.autocast(), together.alone():
                yield self.accelerator.unwrap_model(self.model)
        finally:
            for module, mode in modes:
                module.training = mode

    def _is_better(self, found: dict[str, float]) -> bool:
        key, more = self.task.better
        value, best = float(found[key]), self.best.value
        if math.isfinite(value) and (best is None or (value > best if more else value < best)):
            self.best = Best(key, value, self.step)
            return True
        self.best.since += 1
        return False

    def _batches(self, steps: range) -> Iterator[tuple[int, list[Any]]]:
        loader = DataLoader(
            _Steps(self.task.parts, steps.stop),
            batch_size=None,
            sampler=steps,
            num_workers=self.run.workers,
            # `parts` is a closure; nothing else can carry it over.
            multiprocessing_context="fork" if self.run.workers else None,
        )
        return zip(steps, loader, strict=True)

    def _save(self) -> None:
        """Where to go on from."""
        scaler = self.accelerator.scaler
        more = {
            "optimiser": self.optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "best": vars(self.best),
        }
        self._write(self.run.checkpoint, more)

    def _save_best(self) -> None:
        """The weights alone, after the checkpoint that says they are the best: by that one it is known if these are missing."""
        self._write(self.run.best, {"best": vars(self.best)})

    def _write(self, file: Path, more: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        weights = {name: p.detach().cpu() for name, p in self.trained.items()}
        state = {"step": self.step, "model": weights, "facts": json.dumps(self.run.facts, sort_keys=True), **more}
        aside = file.with_suffix(".tmp")
        try:
            torch.save(state, aside)
            os.replace(aside, file)
        except (OSError, RuntimeError) as error:
            aside.unlink(missing_ok=True)
            raise DataError(f"{file}: it cannot be written ({error}); what was saved before is as it was") from error

    def _resume(self) -> None:
        file = self.run.checkpoint
        if not file.exists():
            return
        kept = read(file)
        if kept["facts"] != json.dumps(self.run.facts, sort_keys=True):
            raise DataError(
                f"{file} is of a run with other settings ({_difference(kept['facts'], self.run.facts)}); "
                "name another --work, or the settings that it had"
            )
        fill(self.trained, kept["model"], file)
        self.optimiser.load_state_dict(kept["optimiser"])
        if self.accelerator.scaler is not None and kept["scaler"]:
            self.accelerator.scaler.load_state_dict(kept["scaler"])
        self.step, self.best = int(kept["step"]), Best(**kept["best"])
        if self.best.step == self.step and not self._has_best():
            self._save_best()
        self.accelerator.print(f"{self.run.name}: going on from step {self.step}")

    def _has_best(self) -> bool:
        """Whether the best weights are those that the checkpoint speaks of."""
        return self.run.best.exists() and read(self.run.best)["step"] == self.best.step


def read(file: Path) -> dict[str, Any]:
    """A checkpoint of this loop."""
    try:
        kept: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the format has no exception of its own
        raise DataError(f"{file}: it is no checkpoint that can be read ({error}); remove it to begin anew") from error
    return kept


def fill(trained: dict[str, nn.Parameter], kept: dict[str, Tensor], file: Path) -> None:
    """Takes over the weights of a checkpoint."""
    if kept.keys() != trained.keys() or any(kept[name].shape != p.shape for name, p in trained.items()):
        raise DataError(f"{file} belongs to another model; name another --work")
    with torch.no_grad():
        for name, value in kept.items():
            trained[name].copy_(value)


def _adam(trained: dict[str, nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    """Weight decay for what has at least two dimensions, as in LAVIS."""
    decayed = [p for p in trained.values() if p.ndim >= 2]
    others = [p for p in trained.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=schedule.learning_rate, betas=schedule.betas)


def _difference(kept: str, now: dict[str, Any] | None) -> str:
    before, after = json.loads(kept) or {}, now or {}
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return ", ".join(f"{key}: {before.get(key)} then, {after.get(key)} now" for key in keys[:3])


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
