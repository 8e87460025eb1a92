"""The Rust engine against `transformers`, as a user runs it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from blip2_export import evaluate, random_checkpoint
from blip2_export.bundle import Choices, convert
from blip2_export.parity import compare, run_engine

ROOT = Path(__file__).parents[2]
ENGINE = Path(os.environ.get("BLIP2_ENGINE", ROOT / "target" / "debug" / "blip2"))


@pytest.mark.parametrize("shape", sorted(random_checkpoint.SHAPES))
def test_the_engine_gives_the_tokens_of_the_reference(tmp_path: Path, shape: str) -> None:
    assert ENGINE.exists(), f"{ENGINE} is not there; build it first (cargo build)"
    random_checkpoint.write(tmp_path / "checkpoint", shape, seed=100 + sorted(random_checkpoint.SHAPES).index(shape))
    convert(tmp_path / "checkpoint", tmp_path / "bundle", Choices(shape))
    run_engine(ENGINE, "verify", str(tmp_path / "bundle"))
    found = compare(tmp_path / "checkpoint", tmp_path / "bundle", ENGINE, n_pictures=9, max_new_tokens=12)
    assert found.cases == 63 and not found.differences
    assert len(found.written) > 9, "the checkpoint says nearly the same whatever it sees; these weights test nothing"
    assert sum(len(set(tokens)) > 2 for tokens in found.written) > len(found.written) / 2, "it repeats itself"


def test_the_demo_tells_the_truth(capsys: pytest.CaptureFixture[str]) -> None:
    choices = {"count": 40, "seed": "test", "side": 256, "wrong": None}
    evaluate.run(argparse.Namespace(model=ROOT / "models" / "demo-opt", engine=ENGINE, **choices))
    seen, unseen = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert seen["captions_true"] >= 0.9 and seen["answers_right"] >= 0.9, seen
    assert unseen["captions_true"] >= 0.8 and unseen["answers_right"] >= 0.8, unseen
