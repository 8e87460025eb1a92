"""One optimisation loop for every phase: logs each loss, saves a checkpoint regularly and goes on from it after a kill."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blip2_export.train import muon


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
        if step < self.warmup:
            return (step + 1) / self.warmup
        share = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share))


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


class StepBatches(Dataset[Any]):
    """Batch number `step` is a pure function of `step`, so a resumed run sees what an unbroken one would have seen."""

    def __init__(self, make: Callable[[int], Any], steps: int) -> None:
        self.make, self.steps = make, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Any:
        return self.make(step)


def fit(
    phase: Phase,
    model: nn.Module,
    make_batch: Callable[[int], Any],
    losses: Callable[[Any], dict[str, Tensor]],
    *,
    workers: int = 1,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 2000,
    faster: dict[str, float] | None = None,
) -> None:
    """Trains the parameters of `model` that require gradients. The loss is the sum of what `losses` returns.

    Keys that start with `_` are only logged. Calls `evaluate` now and then and logs what it returns.
    `faster`: factors, also below 1, to the learning rate of parameters whose names end so.
    """
    phase.work.mkdir(parents=True, exist_ok=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimisers = _optimisers(model, trained, phase.schedule, faster or {})
    start = _resume(phase, trained, optimisers)
    if start >= phase.schedule.steps:
        return
    indices = range(start, phase.schedule.steps)
    loader = DataLoader(
        StepBatches(make_batch, phase.schedule.steps),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        multiprocessing_context="fork"
        if workers
        else None,  # `make_batch` is a closure; nothing else can carry it over
    )
    progress, saved = _Progress(phase, start), time.monotonic()
    model.train()
    for step, batch in zip(indices, loader, strict=True):
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = optimiser.defaults["lr"] * group["faster"] * phase.schedule.factor(step)
        parts = losses(batch)
        total = torch.stack([v for k, v in parts.items() if not k.startswith("_")]).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"{phase.name}: the loss is {float(total)} at step {step}; lower the learning rate"
            )
        for p in trained.values():
            p.grad = None
        total.backward()
        nn.utils.clip_grad_norm_(trained.values(), phase.schedule.clip)
        for optimiser in optimisers:
            optimiser.step()
        progress.add(step, {k: float(v.detach()) for k, v in parts.items()})
        done = step + 1
        if time.monotonic() - saved > phase.save_seconds or done == phase.schedule.steps:
            _save(phase, done, trained, optimisers)
            saved = time.monotonic()
        if evaluate and (done % evaluate_every == 0 or done == phase.schedule.steps):
            model.eval()
            with torch.no_grad():
                progress.write({"step": done, "evaluation": evaluate()})
            model.train()


def _optimisers(
    model: nn.Module, trained: dict[str, nn.Parameter], schedule: Schedule, faster: dict[str, float]
) -> list[torch.optim.Optimizer]:
    by_muon = muon.takes(model) & trained.keys() if schedule.matrix_rate else set()
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}  # by optimiser, weight decay and rate
    for name, parameter in trained.items():
        rate = next((r for end, r in faster.items() if name.endswith(end)), 1.0)
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


def _save(phase: Phase, step: int, trained: dict[str, nn.Parameter], optimisers: list[torch.optim.Optimizer]) -> None:
    aside = phase.checkpoint.with_suffix(".tmp")
    weights = {n: p.detach() for n, p in trained.items()}
    torch.save({"step": step, "model": weights, "optimisers": [o.state_dict() for o in optimisers]}, aside)
    os.replace(aside, phase.checkpoint)


def _resume(phase: Phase, trained: dict[str, nn.Parameter], optimisers: list[torch.optim.Optimizer]) -> int:
    if not phase.checkpoint.exists():
        return 0
    state = torch.load(phase.checkpoint, weights_only=True)
    if state["model"].keys() != trained.keys():
        raise ValueError(f"{phase.checkpoint} belongs to another model; remove it or choose another --work folder")
    with torch.no_grad():
        for name, value in state["model"].items():
            trained[name].copy_(value)
    for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(kept)
    print(f"{phase.name}: going on from step {state['step']}", file=sys.stderr)
    return int(state["step"])


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
