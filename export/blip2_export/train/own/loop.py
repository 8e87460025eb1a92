"""One optimisation loop on whatever hardware there is: goes on after a kill with the weights that it would have had without."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blip2_export.train.own import keep, together
from blip2_export.train.own.estimate import rehearse
from blip2_export.train.own.hardware import Precision, lifted
from blip2_export.train.own.keep import fill, read
from blip2_export.train.own.progress import Progress
from blip2_export.train.own.run import Run, Schedule, option
from blip2_export.train.own.sources import DataError
from blip2_export.train.own.steps import made
from blip2_export.train.own.stop import Interrupted, Stop, Stopped


@dataclass(frozen=True)
class Task:
    """What is trained, of parameters that want gradients.

    `parts`: what a step sees, as so many parts of this process; made in another process, a pure function of the step.
    `losses`: of `model` on a part that lies on the device; the loss is their sum, keys that start with `_` are only logged.
    `measure`: on what is held out; `better`: the key of it that tells the best checkpoint, and whether more is better. `sample`:
    what the model says of a few pictures; `thumbnails`: those pictures, as JPEG. Both see the model in evaluation, and draw what
    they like.
    `notes`: what parts have to say besides, such as pictures that could not be read.
    `mass`: what the losses of a part are means over; parts count by it, so that so many small ones are one large one.
    """

    model: nn.Module
    parts: Callable[[int], list[Any]]
    losses: Callable[[nn.Module, Any], dict[str, Tensor]]
    measure: Callable[[nn.Module], dict[str, Any]] | None = None
    better: tuple[str, bool] = ("loss", False)
    sample: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    thumbnails: dict[str, bytes] = field(default_factory=dict)
    notes: Callable[[Any], dict[str, str]] = lambda _: {}
    mass: Callable[[Any], Tensor] = lambda _: torch.ones(())


@dataclass
class Best:
    """The best measurement so far: its value, its loss and its step, and how many came since."""

    by: str
    value: float | None = None
    step: int | None = None
    since: int = 0
    loss: float = math.inf

    def is_less_than(self, value: float, loss: float, more: bool) -> bool:
        """Of equal values the one of a lower loss is better: while no answer is right yet, much is learnt. `more` is better."""
        if not math.isfinite(value) or self.value is None:
            return math.isfinite(value)
        gain = value - self.value if more else self.value - value
        return gain > 0 or (gain == 0 and loss < self.loss)


class Fit:
    """A run of a task; `go` takes it from its last checkpoint to its end."""

    def __init__(self, run: Run, task: Task, accelerator: Accelerator) -> None:
        self.run, self.task, self.accelerator = run, task, accelerator
        run.work.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            for file in run.leftovers:
                file.unlink(missing_ok=True)
        self.trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
        self.model = accelerator.prepare_model(task.model)
        self.optimiser = _adam(self.trained, run.schedule)
        self.precision = Precision(run.precision, accelerator.device)
        # `looked`: the last step at which it was looked whether to measure.
        self.step, self.looked, self.best = 0, 0, Best(task.better[0])

    def go(self) -> None:
        """Trains, measures, saves; every file is whole at any moment. Ends with `Stopped` if a signal asks it to."""
        self._resume()
        if self._is_over:
            return
        progress = Progress(self.run, self.step, self.accelerator.is_main_process, looked=self.looked)
        progress.thumbnails = self.task.thumbnails
        try:
            with Stop() as stop:
                self._foretell(progress)
                self._train(progress, stop)
        finally:
            progress.close()
        self.accelerator.wait_for_everyone()

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
        is_whole = self.step >= self.run.schedule.steps and self.looked == self.step
        return is_whole or 0 < self.run.patience <= self.best.since

    def _train(self, progress: Progress, stop: Stop) -> None:
        self.model.train()
        with suppress(Interrupted):
            self._go_on(progress, stop)
        if not self._is_over:
            self._save()
            # A launcher ends the others as soon as one has ended.
            self.accelerator.wait_for_everyone()
            raise Stopped(self.run.name, self.step, self.run.schedule.steps, stop.signal)
        is_whole = self.step >= self.run.schedule.steps
        why = "all steps are done" if is_whole else f"not better for {self.run.patience} measurements"
        progress.end(why, self.best.step)

    def _go_on(self, progress: Progress, stop: Stop) -> None:
        """Until it is over, or asked to stop."""
        run, saved = self.run, time.monotonic()
        if self.looked < self.step:  # it was stopped in front of a measurement, or within
            self._look(progress, stop)
        for step, parts in made(self.task.parts, range(self.step, run.schedule.steps), run.workers):
            if self._is_over:
                break
            progress.add(self._update(step, parts), [self.task.notes(part) for part in parts])
            self.step = step + 1
            stop.asked = together.any_(stop.asked)
            if stop.asked:
                return
            self._look(progress, stop)
            if time.monotonic() - saved > run.save_seconds:
                with progress.aside("save"):
                    self._save()
                saved = time.monotonic()
        with progress.aside("save"):
            self._save()

    def _foretell(self, progress: Progress) -> None:
        """Rehearses a step, and measures what is held out before anything is learnt; neither leaves anything behind."""
        if self.task.measure and self.run.measures_first and self.step == 0:
            with progress.aside("measure"), self._looking() as model:
                found = together.agreed(self.task.measure(model))
            progress.measured(found, False)
        self.model.train()
        progress.foretell(rehearse(lambda: self.task.parts(self.step), self._rehearsed, self.run.workers))

    def _rehearsed(self, part: Any) -> None:
        with self.precision.autocast():
            losses = self.task.losses(self.model, part)
        self.precision.scaler.scale(_loss(losses)).backward()
        self.optimiser.zero_grad()

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
                total = _loss(losses) * share
                self._check(step, total, "the loss")
                self.precision.scaler.scale(total).backward()
            for key, value in losses.items():
                logged[key] = logged.get(key, 0.0) + float(together.mean(value)) * share
        self.precision.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), schedule.clip)
        self._check(step, norm, "the norm of the gradients")
        skips = self.precision.step(self.optimiser, float(norm))
        logged |= {"_gradient_norm": float(norm), "_rate": float(self.optimiser.param_groups[0]["lr"])}
        if self.precision.tolerates_overflow:
            logged["_skipped"] = float(skips)
        return {key: value for key, value in logged.items() if math.isfinite(value)}

    def _shares(self, parts: list[Any]) -> list[float]:
        masses = [float(together.mean(self.task.mass(part))) for part in parts]
        return [mass / sum(masses) for mass in masses]

    def _check(self, step: int, value: Tensor, what: str) -> None:
        """All processes end where one has to: the others would wait for it."""
        if not self.precision.tolerates_overflow and not torch.isfinite(together.mean(value)):
            said = f"{self.run.name}: {what} is {float(value.detach())} at step {step}"
            raise FloatingPointError(f"{said}; lower --learning-rate")

    def _look(self, progress: Progress, stop: Stop) -> None:
        """Measures and samples when it is time for that, and draws the page."""
        run, task = self.run, self.task

        def is_time(every: int) -> bool:
            return self.step % every == 0 or self.step == run.schedule.steps

        if task.measure and is_time(run.measure_every):
            with progress.aside("measure"), stop.at_once(), self._looking() as model:
                found = together.agreed(task.measure(model))
            better, self.looked = self._is_better(found), self.step
            progress.measured(found, better)
            if better:
                with progress.aside("keep"):
                    self._save()
                    self._save_best()
        if task.sample and is_time(run.sample_every or run.measure_every):
            with progress.aside("sample"), stop.at_once(), self._looking() as model:
                samples = task.sample(model)
            progress.sampled(samples)
        self.looked = self.step
        if is_time(run.measure_every):
            progress.draw()

    @contextmanager
    def _looking(self) -> Iterator[nn.Module]:
        """The model in evaluation, by itself in each process, which all see the same; modes and random state stay as they were."""
        modes = [(module, module.training) for module in self.model.modules()]
        cards = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        self.model.eval()
        try:
            with torch.random.fork_rng(cards), torch.no_grad(), self.precision.autocast(), together.alone():
                yield self.accelerator.unwrap_model(self.model)
        finally:
            for module, mode in modes:
                module.training = mode

    def _is_better(self, found: dict[str, float]) -> bool:
        key, more = self.task.better
        value, loss = float(found[key]), float(found.get("loss", math.inf))
        if self.best.is_less_than(value, loss, more):
            self.best = Best(key, value, self.step, loss=loss)
            return True
        self.best.since += 1
        return False

    def _save(self) -> None:
        """Where to go on from."""
        more = {
            "optimiser": self.optimiser.state_dict(),
            "precision": self.precision.state(),
            "best": vars(self.best),
            "looked": self.looked,
        }
        self._write(self.run.checkpoint, more)

    def _save_best(self) -> None:
        """The weights alone, after the checkpoint that says they are the best: who finds it knows whether these are missing."""
        self._write(self.run.best, {"best": vars(self.best)})

    def _write(self, file: Path, more: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        weights = {name: p.detach().cpu() for name, p in self.trained.items()}
        state = {"step": self.step, "model": weights, "facts": json.dumps(self.run.facts, sort_keys=True), **more}
        keep.write(file, state)

    def _resume(self) -> None:
        file = self.run.checkpoint
        if not file.exists():
            if self.accelerator.is_main_process:
                # Of a run that was here before, they would pass for those of this one.
                self.run.best.unlink(missing_ok=True)
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
        self.step, self.looked, self.best = int(kept["step"]), int(kept["looked"]), Best(**kept["best"])
        if self.best.step == self.step and not self._has_best():
            self._save_best()
        if self.accelerator.is_main_process:
            print(f"{self.run.name}: going on from step {self.step}", file=sys.stderr)

    def _has_best(self) -> bool:
        """Whether the best weights are those that the checkpoint speaks of."""
        return self.run.best.exists() and read(self.run.best)["step"] == self.best.step


def _adam(trained: dict[str, nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    """Weight decay for what has at least two dimensions, as in LAVIS."""
    decayed = [p for p in trained.values() if p.ndim >= 2]
    others = [p for p in trained.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=schedule.learning_rate, betas=schedule.betas)


def _loss(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([lifted(value) for key, value in losses.items() if not key.startswith("_")]).sum()


def _difference(kept: str, now: dict[str, Any] | None) -> str:
    before, after = json.loads(kept) or {}, now or {}
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return ", ".join(f"{option(key)}: {before.get(key)} then, {after.get(key)} now" for key in keys[:3])


__all__ = ["Best", "Fit", "Run", "Schedule", "Task", "fill", "read"]
