"""A run that a signal ends, at whatever moment, ends later with the weights that it would have had without."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_kills import ADAPTERS

from blip2_export.check import random_checkpoint
from blip2_export.scenes import dataset
from blip2_export.train.own import loop

HERE = Path(__file__).parent


KILLED, TERM, INTERRUPTED = -signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGINT
STATUSES = {"saving": KILLED, "measuring": KILLED, "term": TERM, "interrupt": INTERRUPTED, "last": TERM}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, list[int]]]]:
    folder = tmp_path_factory.mktemp("kills")
    random_checkpoint.write(folder / "opt", "tiny", seed=4)
    dataset.write_dataset(folder / "data", 12, 0, 32)
    asked = [{"image": f"{i:06}.png", "question": "how many?", "answers": ["two", "2", "two"]} for i in range(12)]
    (folder / "data" / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, HERE / "own_kills.py", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", ["stage1", "stage2", *ADAPTERS])
def test_a_run_that_signals_end_is_the_same_in_the_end(
    runs: tuple[Path, dict[str, dict[str, list[int]]]], stage: str
) -> None:
    """Killed at random moments, half-way through a checkpoint's file and while it measures; asked to end, too."""
    root, statuses = runs[0] / stage, dict(runs[1][stage])
    logs = {file.stem: file.read_text() for file in root.glob("*.log")}
    assert statuses.pop("whole") == [0], logs["whole"][-3000:]
    random = {"random-workers"} & statuses.keys()
    assert bool(random) == (stage == "stage1") and all(statuses.pop(name)[-1] == 0 for name in random), logs
    assert statuses
    for name, found in statuses.items():
        assert found == [STATUSES[name], 0], logs[name][-3000:]
        if STATUSES[name] > 0:
            assert "and saved; the same command goes on from there" in logs[name] and "Traceback" not in logs[name]
    phase = ADAPTERS.get(stage, stage)
    for kept in (f"{phase}.pt", f"{phase}_best.pt"):
        whole = loop.read(root / "whole" / kept)
        for name in (*statuses, *random):
            other = loop.read(root / name / kept)
            assert whole["best"] == other["best"], (kept, name)
            assert all(torch.equal(value, other["model"][key]) for key, value in whole["model"].items()), (kept, name)
    assert not list(root.glob("*/*.part")), "nothing is left half-written"
