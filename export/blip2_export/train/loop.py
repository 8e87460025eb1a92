"""One optimisation loop for every phase: logs each loss, saves a checkpoint regularly and goes on from it after a kill.

It is apart from `own.loop`, with which it shares what a step sees, the rate and the checkpoint's file. Here matrices learn by Muon,
single parameters at rates of their own, in one process that computes in float32, and what is measured decides nothing; there one
optimiser learns on whatever hardware there is, and measurements choose the weights, end the run and draw its page. In one loop
either would be switches of no use to the other, and a demo that is under way could not go on from its checkpoints.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip2_export.train import muon, rate
from blip2_export.train.own import keep
from blip2_export.train.own.steps import made


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up and cosine decay to `floor` × the peak learning rate.

    AdamW trains everything, unless `matrix_rate` is set: then Muon trains the hidden matrices at that peak rate.
    """

    steps: int
    learning_rate: float
    matrix_rate: float = 0.0
    warmup: int = 500
    floor: float = 0.02
    weight_decay: float = 0.05
    beta2: float = 0.98
    clip: float = 1.0

    def factor(self, step: int) -> float:
        return rate.factor(step, self.steps, self.warmup, self.floor)


@dataclass(frozen=True)
class Phase:
    """A named phase of training and where its files go."""

    name: str
    work: Path
    schedule: Schedule
    log_every: int = 50
    save_seconds: float = 120.0

    @property
    def checkpoint(self) -> Path:
        return self.work / f"{self.name}.pt"

    @property
    def log(self) -> Path:
        return self.work / f"{self.name}.jsonl"


@dataclass(frozen=True)
class Task:
    """What a phase trains: the parameters of `model` that require gradients.

    The loss of a batch is the sum of what `losses` returns; keys that start with `_` are only logged.
    `faster`: factors, also below 1, to the learning rate of parameters whose names end so.
    """

    model: nn.Module
    make_batch: Callable[[int], Any]
    losses: Callable[[Any], dict[str, Tensor]]
    faster: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What is measured and logged after this many steps, and at the end."""

    measure: Callable[[], dict[str, float]]
    every: int


def fit(phase: Phase, task: Task, evaluation: Evaluation | None = None, workers: int = 1) -> None:
    """Trains from the last checkpoint to the end of the schedule. `workers`: processes that make batches."""
    phase.work.mkdir(parents=True, exist_ok=True)
    state, steps = _State(phase, task), phase.schedule.steps
    start = state.resume()
    if start >= steps:
        return
    progress, saved = _Progress(phase, start), time.monotonic()
    task.model.train()
    for step, batch in made(task.make_batch, range(start, steps), workers):
        parts = task.losses(batch)
        state.update(step, parts)
        progress.add(step, {k: float(v.detach()) for k, v in parts.items()})
        done, is_last = step + 1, step + 1 == steps
        if is_last or time.monotonic() - saved > phase.save_seconds:
            state.save(done)
            saved = time.monotonic()
        if evaluation and (is_last or done % evaluation.every == 0):
            task.model.eval()
            with torch.no_grad():
                progress.write({"step": done, "evaluation": evaluation.measure()})
            task.model.train()


class _State:
    """What a step changes, and a checkpoint holds: trained parameters and their optimisers."""

    def __init__(self, phase: Phase, task: Task) -> None:
        self.phase = phase
        self.trained = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
        self.optimisers = _optimisers(task, self.trained, phase.schedule)

    def update(self, step: int, parts: dict[str, Tensor]) -> None:
        """Moves the parameters by the gradients of the summed loss."""
        total = torch.stack([v for k, v in parts.items() if not k.startswith("_")]).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"{self.phase.name}: the loss is {float(total)} at step {step}; lower the learning rate"
            )
        for p in self.trained.values():
            p.grad = None
        total.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), self.phase.schedule.clip)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = optimiser.defaults["lr"] * group["faster"] * self.phase.schedule.factor(step)
            optimiser.step()

    def save(self, step: int) -> None:
        weights = {n: p.detach() for n, p in self.trained.items()}
        optimisers = [o.state_dict() for o in self.optimisers]
        keep.write(self.phase.checkpoint, {"step": step, "model": weights, "optimisers": optimisers})

    def resume(self) -> int:
        """Takes over the last checkpoint, if there is one; gives the step that comes next."""
        file = self.phase.checkpoint
        if not file.exists():
            return 0
        kept = keep.read(file)
        keep.fill(self.trained, kept["model"], file)
        for optimiser, state in zip(self.optimisers, kept["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        print(f"{self.phase.name}: going on from step {kept['step']}", file=sys.stderr)
        return int(kept["step"])


def _optimisers(task: Task, trained: dict[str, nn.Parameter], schedule: Schedule) -> list[torch.optim.Optimizer]:
    by_muon = muon.takes(task.model) & trained.keys() if schedule.matrix_rate else set()
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}  # by optimiser, weight decay and rate
    for name, parameter in trained.items():
        rate = next((r for end, r in task.faster.items() if name.endswith(end)), 1.0)
        decay = schedule.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((name in by_muon, decay, rate), []).append(parameter)

    def of(taken: bool) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "weight_decay": decay, "faster": rate}
            for (muons, decay, rate), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
            if muons == taken
        ]

    adam = torch.optim.AdamW(of(False), lr=schedule.learning_rate, betas=(0.9, schedule.beta2))
    return [adam, muon.Muon(of(True), schedule.matrix_rate)] if by_muon else [adam]


class _Progress:
    def __init__(self, phase: Phase, start: int) -> None:
        self.phase, self.sums, self.count = phase, dict[str, float](), 0
        self.since, self.start = time.monotonic(), start

    def add(self, step: int, parts: dict[str, float]) -> None:
        for k, v in parts.items():
            self.sums[k] = self.sums.get(k, 0.0) + v
        self.count += 1
        if (step + 1) % self.phase.log_every == 0 or step + 1 == self.phase.schedule.steps:
            rate = self.count / (time.monotonic() - self.since)
            self.write(
                {
                    "step": step + 1,
                    **{k: round(v / self.count, 4) for k, v in self.sums.items()},
                    "steps_per_second": round(rate, 2),
                }
            )
            self.sums, self.count, self.since = {}, 0, time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        with self.phase.log.open("a") as log:
            log.write(json.dumps(row) + "\n")
        words = " ".join(f"{k} {v}" for k, v in row.items())
        print(f"{self.phase.name} {words} of {self.phase.schedule.steps}", file=sys.stderr, flush=True)
