"""One optimisation loop on whatever hardware there is: goes on after a kill with the weights that it would have had without."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blip2_export.train.own import together
from blip2_export.train.own.estimate import rehearse
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

    `accumulate`: parts of a step that are computed one after another. `measure_every`: steps between measurements on what is held out.
    `patience`: measurements without a better one after which it ends, 0 for never.
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
    facts: dict[str, Any] | None = None

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.name}.pt"

    @property
    def best(self) -> Path:
        return self.work / f"{self.name}_best.pt"


@dataclass(frozen=True)
class Task:
    """What is trained, of parameters that want gradients.

    `parts`: what a step sees, as so many parts of this process; made in another process, a pure function of the step.
    `losses`: of `model` on a part that lies on the device; the loss is their sum, keys that start with `_` are only logged.
    `measure`: on what is held out; `better`: the key of it that tells the best checkpoint, and whether more is better.
    `notes`: what parts have to say besides, such as pictures that could not be read.
    """

    model: nn.Module
    parts: Callable[[int], list[Any]]
    losses: Callable[[nn.Module, Any], dict[str, Tensor]]
    measure: Callable[[nn.Module], dict[str, Any]] | None = None
    better: tuple[str, bool] = ("loss", False)
    notes: Callable[[Any], dict[str, str]] = lambda _: {}


class _Steps(Dataset[list[Any] | DataError]):
    def __init__(self, make: Callable[[int], list[Any]], n: int) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, step: int) -> list[Any] | DataError:
        try:
            return self.make(step)
        except DataError as error:
            # Raised here, it would come out of another process with all its traces in its text.
            return error


class Fit:
    """A run of a task; `go` takes it from its last checkpoint to its end."""

    def __init__(self, run: Run, task: Task, accelerator: Accelerator) -> None:
        self.run, self.task, self.accelerator = run, task, accelerator
        run.work.mkdir(parents=True, exist_ok=True)
        self.trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        self.model = accelerator.prepare_model(task.model)
        self.optimiser = accelerator.prepare_optimizer(_adam(self.trained, run.schedule))
        self.step, self.best, self.since_best = 0, math.nan, 0

    def go(self) -> None:
        """Trains, measures, saves; every file is whole at any moment."""
        self._resume()
        run, steps = self.run, self.run.schedule.steps
        if self.step >= steps:
            return
        progress, saved = Progress(run, self.step, self.accelerator.is_main_process), time.monotonic()
        self._foretell(progress)
        self.model.train()
        for step, parts in self._batches(range(self.step, steps)):
            progress.add(self._update(step, parts), [self.task.notes(part) for part in parts])
            self.step = step + 1
            is_last = self.step == steps
            if self.task.measure and (is_last or self.step % run.measure_every == 0):
                is_last = self._measured(progress) or is_last
                progress.pace.measured()
            if is_last or time.monotonic() - saved > run.save_seconds:
                self._save(run.checkpoint, steps if is_last else self.step)
                progress.pace.saved()
                saved = time.monotonic()
            if is_last:
                break

    def _foretell(self, progress: Progress) -> None:
        """Rehearses a step, and measures what is held out before anything is learnt."""
        # Both as in a step; neither leaves anything behind.
        self.model.train()
        found = rehearse(
            lambda: self.task.parts(self.step), self._rehearsed, lambda: self._before(progress), self.run.workers
        )
        progress.foretell(found)

    def _rehearsed(self, part: Any) -> None:
        with self.accelerator.autocast():
            losses = self.task.losses(self.model, part)
        self.accelerator.backward(_loss(losses))
        self.optimiser.zero_grad()

    def _before(self, progress: Progress) -> None:
        if self.task.measure is None:
            return
        found = self._held_out()
        if self.step == 0:
            progress.write({"step": 0, "held_out": found})

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
            total = _loss(losses) / len(parts)
            self._check(step, total)
            self.accelerator.backward(total)
            for key, value in losses.items():
                logged[key] = logged.get(key, 0.0) + float(together.mean(value)) / len(parts)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimiser.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), schedule.clip)
        self.optimiser.step()
        return {**logged, "_gradient": float(norm), "_rate": float(self.optimiser.param_groups[0]["lr"])}

    def _check(self, step: int, total: Tensor) -> None:
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"{self.run.name}: the loss is {float(total)} at step {step}; lower --learning-rate"
            )

    def _measured(self, progress: Progress) -> bool:
        """Measures on what is held out; whether that was in vain too often."""
        found = self._held_out()
        progress.write({"step": self.step, "held_out": found})
        key, more = self.task.better
        value = float(found[key])
        if math.isnan(self.best) or (value > self.best if more else value < self.best):
            self.best, self.since_best = value, 0
            self._save(self.run.best, self.step)
        else:
            self.since_best += 1
        gives_up = 0 < self.run.patience <= self.since_best
        if gives_up:
            progress.write({"step": self.step, "ended": f"not better for {self.run.patience} measurements"})
        return gives_up

    def _held_out(self) -> dict[str, Any]:
        assert self.task.measure is not None
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            found = self.task.measure(self.accelerator.unwrap_model(self.model))
        self.model.train()
        return found

    def _batches(self, steps: range) -> Iterator[tuple[int, list[Any]]]:
        loader = DataLoader(
            _Steps(self.task.parts, steps.stop),
            batch_size=None,
            sampler=steps,
            num_workers=self.run.workers,
            # `parts` is a closure; nothing else can carry it over.
            multiprocessing_context="fork" if self.run.workers else None,
        )
        for step, parts in zip(steps, loader, strict=True):
            if isinstance(parts, DataError):
                raise parts
            yield step, parts

    def _save(self, file: Path, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "step": step,
            "model": {name: p.detach().cpu() for name, p in self.trained.items()},
            "optimiser": self.optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "best": (self.best, self.since_best),
            "facts": json.dumps(self.run.facts, sort_keys=True),
        }
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
        self.step, (self.best, self.since_best) = int(kept["step"]), kept["best"]
        self.accelerator.print(f"{self.run.name}: going on from step {self.step}")


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


def _loss(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([value for key, value in losses.items() if not key.startswith("_")]).sum()


def _difference(kept: str, now: dict[str, Any] | None) -> str:
    before, after = json.loads(kept) or {}, now or {}
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return ", ".join(f"{key}: {before.get(key)} then, {after.get(key)} now" for key in keys[:3])


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
