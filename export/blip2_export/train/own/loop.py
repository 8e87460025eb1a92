"""One optimisation loop on whatever hardware there is: goes on after a kill with the weights that it would have had without."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blip2_export.train.own import together
from blip2_export.train.own.hardware import Precision, lifted
from blip2_export.train.own.progress import Progress
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.stop import Interrupted, Stop, Stopped


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

    `accumulate`: parts of a step that are computed one after another. `measure_every`: steps between measurements on what is
    held out. `patience`: measurements without a better one after which it ends, 0 for never.
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
    precision: str = "no"
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
    `mass`: what the losses of a part are means over; parts count by it, so that so many small ones are one large one.
    """

    model: nn.Module
    parts: Callable[[int], list[Any]]
    losses: Callable[[nn.Module, Any], dict[str, Tensor]]
    measure: Callable[[nn.Module], dict[str, Any]] | None = None
    better: tuple[str, bool] = ("loss", False)
    notes: Callable[[Any], dict[str, str]] = lambda _: {}
    mass: Callable[[Any], Tensor] = lambda _: torch.ones(())


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
        self.optimiser = _adam(self.trained, run.schedule)
        self.precision = Precision(run.precision, accelerator.device)
        self.step, self.best, self.since_best, self.measured = 0, math.nan, 0, 0

    def go(self) -> None:
        """Trains, measures, saves; every file is whole at any moment. Ends with `Stopped` if a signal asks it to."""
        self._resume()
        steps = self.run.schedule.steps
        if self.step >= steps and not self._due():
            return
        with Stop() as stop:
            try:
                is_done = self._train(stop)
            except Interrupted:
                is_done = False
            if not is_done:
                self._save(self.run.checkpoint, self.step)
                raise Stopped(self.run.name, self.step, steps, stop.signal)
        self.measured = steps
        self._save(self.run.checkpoint, steps)
        self.accelerator.wait_for_everyone()

    def _train(self, stop: Stop) -> bool:
        """Whether it came to the end, or to a measurement after which nothing is waited for; not if it was asked to stop."""
        progress, saved = Progress(self.run, self.step, self.accelerator.is_main_process), time.monotonic()
        self.model.train()
        if self._due() and self._measured(progress, stop):  # it was stopped before it had measured
            return True
        for step, parts in self._batches(range(self.step, self.run.schedule.steps)):
            progress.add(self._update(step, parts), [self.task.notes(part) for part in parts])
            self.step = step + 1
            stop.asked = together.any_(stop.asked)
            if stop.asked and (self.step < self.run.schedule.steps or self._due()):
                return False
            if self._due() and self._measured(progress, stop):
                return True
            if time.monotonic() - saved > self.run.save_seconds:
                self._save(self.run.checkpoint, self.step)
                saved = time.monotonic()
        return True

    def _due(self) -> bool:
        """Whether a measurement comes at this step, and has not been."""
        run = self.run
        comes = self.step == run.schedule.steps or self.step % run.measure_every == 0
        return self.task.measure is not None and self.step > self.measured and comes

    def _update(self, step: int, parts: list[Any]) -> dict[str, float]:
        # The same noise whenever, and on whichever machine, the step is made.
        torch.manual_seed(hash((self.run.seed, step, together.rank())) % 2**63)
        schedule, logged = self.run.schedule, dict[str, float]()
        for group in self.optimiser.param_groups:
            group["lr"] = schedule.learning_rate * schedule.factor(step)
        self.optimiser.zero_grad()
        for n, (part, share) in enumerate(zip(parts, self._shares(parts), strict=True)):
            waits = n + 1 < len(parts)
            with self.accelerator.no_sync(self.model) if waits else nullcontext():
                with self.precision.autocast():
                    losses = self.task.losses(self.model, part)
                total = torch.stack([lifted(losses[key]) for key in losses if not key.startswith("_")]).sum() * share
                self._check(step, total, "the loss")
                self.precision.scaler.scale(total).backward()
            for key, value in losses.items():
                logged[key] = logged.get(key, 0.0) + float(together.mean(value)) * share
        self.precision.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), schedule.clip)
        self._check(step, norm, "the norm of the gradients")
        self.precision.step(self.optimiser, float(norm))
        logged |= {"_gradient": float(norm), "_rate": float(self.optimiser.param_groups[0]["lr"])}
        if self.precision.tolerates_overflow:
            logged["_skipped"] = float(self.precision.skipped)
        return {key: value for key, value in logged.items() if math.isfinite(value)}

    def _shares(self, parts: list[Any]) -> list[float]:
        masses = [float(together.mean(self.task.mass(part))) for part in parts]
        return [mass / sum(masses) for mass in masses]

    def _check(self, step: int, value: Tensor, what: str) -> None:
        """All processes end where one has to: the others would wait for it."""
        if not self.precision.tolerates_overflow and not torch.isfinite(together.mean(value)):
            said = f"{self.run.name}: {what} is {float(value.detach())} at step {step}"
            raise FloatingPointError(f"{said}; lower --learning-rate")

    def _measured(self, progress: Progress, stop: Stop) -> bool:
        """Measures on what is held out; whether that was in vain too often."""
        assert self.task.measure is not None
        self.model.eval()
        with torch.no_grad(), self.precision.autocast(), stop.at_once():
            found = self.task.measure(self.accelerator.unwrap_model(self.model))
        self.model.train()
        self.measured = self.step
        progress.write({"step": self.step, "held_out": found})
        key, more = self.task.better
        value = float(found[key])
        if math.isnan(self.best) or (value > self.best if more else value < self.best):
            self.best, self.since_best = value, 0
            self._save(self.run.best, self.step)
        else:
            self.since_best += 1
        ends = 0 < self.run.patience <= self.since_best and self.step < self.run.schedule.steps
        if ends:
            progress.write({"step": self.step, "ended": f"not better for {self.run.patience} measurements"})
        return ends

    def _batches(self, steps: range) -> Iterator[tuple[int, list[Any]]]:
        loader = DataLoader(
            _Steps(self.task.parts, steps.stop),
            batch_size=None,
            sampler=steps,
            num_workers=self.run.workers,
            # `parts` is a closure; nothing else can carry it over.
            multiprocessing_context="fork" if self.run.workers else None,
            worker_init_fn=_leave_signals,
        )
        return zip(steps, loader, strict=True)

    def _save(self, file: Path, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": step,
            "model": {name: p.detach().cpu() for name, p in self.trained.items()},
            "optimiser": self.optimiser.state_dict(),
            "precision": self.precision.state(),
            "best": (self.best, self.since_best, self.measured),
            "facts": json.dumps(self.run.facts, sort_keys=True),
        }
        aside = file.with_suffix(".tmp")
        try:
            with aside.open("wb") as opened:
                torch.save(state, opened)
                opened.flush()
                os.fsync(opened.fileno())
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
        self.precision.take(kept["precision"])
        self.step, (self.best, self.since_best, self.measured) = int(kept["step"]), kept["best"]
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


def _difference(kept: str, now: dict[str, Any] | None) -> str:
    before, after = json.loads(kept) or {}, now or {}
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return ", ".join(f"{key}: {before.get(key)} then, {after.get(key)} now" for key in keys[:3])


def _leave_signals(_: int) -> None:
    """Ctrl-C is heard by all processes; those that make batches end when the one that asks for them does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
