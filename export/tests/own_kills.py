"""Trains in processes that end by signals, and prints how that went: `own_kills.py FOLDER`, called by test_own_kills.py.

It starts no thread and takes no gradient itself, so that it may fork; every run is a fork that has everything imported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blip2_export.train import cli
from blip2_export.train.own import ground, loop

STEPS = 6
ADAPTERS = {"lora": "stage2", "asks": "vqa"}  # the stages that train one, by what they are called here


def command(folder: Path, stage: str, work: Path) -> list[str]:
    """What a person would type."""
    more = ["--workers", "2"] if work.name.endswith("workers") else ["--workers", "0"]
    out = [] if stage == "stage1" else ["--out", str(work / "out")]
    more += ["--lora", "both:2"] if stage in ADAPTERS else []
    more += ["--qformer", str(folder / "opt")] if stage == "stage2" else []
    sizes = [
        "--steps",
        str(STEPS),
        "--batch-size",
        "4",
        "--accumulate",
        "2",
        "--learning-rate",
        "0.01",
        "--warmup",
        "1",
    ]
    looks = ["--held-out", "0.4", "--measure-every", "2", "--patience", "9", "--samples", "1"]
    data = folder / "data" / ("asked.json" if stage == "asks" else "")
    places = ["--data", str(data), "--base", str(folder / "opt"), "--work", str(work)]
    return [ADAPTERS.get(stage, stage), *places, *sizes, *looks, *more, *out]


def run(typed: list[str]) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(typed))


def forked(typed: list[str], log: Path, before: Callable[[], Any] = lambda: None) -> int:
    """The process of a run that saves after every step."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 99
    try:
        with log.open("a") as opened:
            os.dup2(opened.fileno(), 1)
            os.dup2(opened.fileno(), 2)
            plain = ground.Ground.run
            ground.Ground.run = lambda *said: replace(plain(*said), save_seconds=0.0)  # type: ignore[method-assign]
            before()
            status = run(typed)
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> int:
    """A status, or minus a signal."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_while_it_saves(which: int) -> Callable[[], None]:
    """Half of the checkpoint is in the file."""

    def before() -> None:
        save, count = torch.save, [0]

        def half(state: Any, file: Any) -> None:
            count[0] += 1
            save(state, file)
            if count[0] == which:
                file.flush()
                file.truncate(file.tell() // 2)
                die()

        torch.save = half

    return before


def dies_while_it_measures() -> None:
    is_better = loop.Fit._is_better

    def dies(self: loop.Fit, found: dict[str, float]) -> bool:
        return die() if self.step == 4 else is_better(self, found)  # type: ignore[func-returns-value]

    loop.Fit._is_better = dies  # type: ignore[method-assign]


def asks_itself_to_end(number: int, at: int) -> Callable[[], None]:
    """In the middle of a step, by a signal."""

    def before() -> None:
        update = loop.Fit._update

        def asks(self: loop.Fit, step: int, parts: list[Any]) -> dict[str, float]:
            if step == at:
                os.kill(os.getpid(), number)
            return update(self, step, parts)

        loop.Fit._update = asks  # type: ignore[method-assign]

    return before


def asks_itself_to_end_while_it_measures() -> None:
    looking = loop.Fit._looking

    def asks(self: loop.Fit) -> Any:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return looking(self)

    loop.Fit._looking = asks  # type: ignore[method-assign]


HURT: dict[str, dict[str, Callable[[], None]]] = {
    "stage1": {"saving": dies_while_it_saves(3), "interrupt": asks_itself_to_end_while_it_measures},
    "stage2": {"measuring": dies_while_it_measures, "term": asks_itself_to_end(signal.SIGTERM, 3)},
    "lora": {"last": asks_itself_to_end(signal.SIGTERM, STEPS - 1)},
    "asks": {"saving": dies_while_it_saves(3)},
}


def killed_at_random(typed: list[str], log: Path, rng: random.Random, took: float) -> list[int]:
    """Twice, if it is not faster; then it may end."""
    statuses: list[int] = []
    while not statuses or statuses[-1] == -signal.SIGKILL:
        child = forked(typed, log)
        if len(statuses) < 2:
            time.sleep(took * rng.uniform(0.3, 0.9))
            os.kill(child, signal.SIGKILL)
        statuses.append(ended(child))
    return statuses


def main() -> None:
    folder, found = Path(sys.argv[1]), dict[str, dict[str, list[int]]]()
    torch.set_num_threads(1)
    for stage, hurt in HURT.items():
        root, began = folder / stage, time.monotonic()
        root.mkdir()
        found[stage] = statuses = {}
        statuses["whole"] = [ended(forked(command(folder, stage, root / "whole"), root / "whole.log"))]
        took = time.monotonic() - began
        for name, before in hurt.items():
            typed, log = command(folder, stage, root / name), root / f"{name}.log"
            statuses[name] = [ended(forked(typed, log, before)), ended(forked(typed, log))]
        if stage == "stage1":  # the loop is the same in all
            typed, log = command(folder, stage, root / "random-workers"), root / "random.log"
            statuses["random-workers"] = killed_at_random(typed, log, random.Random(stage), took)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
