"""Training in several processes as a person starts and stops it: `torchrun`, and signals to the launcher."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from blip2_export.check import random_checkpoint
from blip2_export.scenes import dataset
from blip2_export.train import cli
from blip2_export.train.own import loop

HERE = Path(__file__).parent
LAUNCH = (Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "-m", "blip2_export")
# Between two processes and one with the whole batch: a share of losses, and an absolute difference of weights. Sums are made in
# another order, which AdamW turns into as much as a step where a weight has next to no gradient. Apart they would differ by 3e-2
# and 2e-2.
LOSSES, WEIGHTS = 2e-3, 1e-3


def command(folder: Path, work: Path) -> list[str]:
    places = ["--data", folder / "data", "--base", folder / "opt", "--work", work]
    sizes = ["--steps", 30, "--batch-size", 8, "--held-out", 0.3, "--measure-every", 5, "--learning-rate", 0.001]
    return ["train", "stage1", *map(str, [*places, *sizes, "--workers", 1])]


def alone(typed: list[str]) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(typed[1:]))


def drop_nothing(file: Path) -> None:
    """What is dropped differs from process to process."""
    config = json.loads(file.read_text())
    config["qformer_config"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    file.write_text(json.dumps(config))


def losses(log: Path) -> torch.Tensor:
    """[steps, losses]"""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return torch.tensor([[row[name] for name in ("itc", "itm", "itg")] for row in rows if "itc" in row])


def stopped(typed: list[str], log: Path, work: Path) -> str:
    """What two processes say that are asked to end, through their launcher, once the best weights of a step are kept."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    with log.open("w") as opened:
        launcher = subprocess.Popen([*map(str, LAUNCH), *typed], stderr=opened, stdout=opened, env=env)
    end = time.monotonic() + 120
    while not (work / "stage1_best.pt").exists() and launcher.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    # Half a minute later it ends by force those that have not heard it.
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(120)
    return log.read_text()


def test_two_launched_processes_stop_as_one_and_one_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Files are written once, by one of them, who alone tells; the processes that read pictures do not die of the signal."""
    random_checkpoint.write(tmp_path / "opt", "tiny", seed=4)
    drop_nothing(tmp_path / "opt" / "config.json")
    dataset.write_dataset(tmp_path / "data", 24, 0, 32)
    whole, work = tmp_path / "whole", tmp_path / "work"
    said = stopped(command(tmp_path, work), tmp_path / "log", work)
    assert said.count("stage1: stopped at step") == 1 and "train/own" not in said, said[-4000:]
    assert said.count("steps of about") == said.count("memory at least") == 1
    step = loop.read(work / "stage1.pt")["step"]
    assert 5 <= step < 30 and not list(work.glob("*.part"))
    rows = [json.loads(line) for line in (work / "stage1.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "itc" in row] == list(range(1, step + 1))
    assert alone(command(tmp_path, work)) == alone(command(tmp_path, whole)) == 0
    one, other = (losses(place / "stage1.jsonl") for place in (whole, work))
    torch.testing.assert_close(other, one, atol=0, rtol=LOSSES)
    for name in ("stage1.pt", "stage1_best.pt"):
        one, other = loop.read(whole / name), loop.read(work / name)
        assert one["step"] == other["step"]
        for key, value in one["model"].items():
            torch.testing.assert_close(
                other["model"][key], value, atol=WEIGHTS, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
            )
