"""The Rust engine against `transformers`, as a user runs it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint, random_retrieval
from blip2_export.check.comparison import Comparison
from blip2_export.check.parity import Plan, compare
from blip2_export.engine import run_engine
from blip2_export.scenes import evaluate

ROOT = Path(__file__).parents[2]
ENGINE = Path(os.environ.get("BLIP2_ENGINE", ROOT / "target" / "debug" / "blip2"))
WRITING = random_checkpoint.SHAPES | random_checkpoint.FAMILIES
PLAN = Plan(n_pictures=6, max_new_tokens=12)


def compared(folder: Path) -> Comparison:
    assert ENGINE.exists(), f"{ENGINE} is not there; build it first (cargo build)"
    convert(folder / "checkpoint", folder / "bundle", Choices(folder.name))
    run_engine(ENGINE, "verify", str(folder / "bundle"))
    return compare(folder / "checkpoint", folder / "bundle", ENGINE, PLAN)


@pytest.mark.parametrize("shape", sorted(WRITING))
def test_the_engine_gives_the_tokens_of_the_reference(tmp_path: Path, shape: str) -> None:
    seed = {"instruct-opt": 300}.get(
        shape, 100 + sorted(WRITING).index(shape)
    )  # with most seeds this one repeats itself
    random_checkpoint.write(tmp_path / "checkpoint", shape, seed=seed)
    found = compared(tmp_path)
    assert found.cases == 48 and not found.differences and not found.ties
    assert len(found.written) > 9, "the checkpoint says nearly the same whatever it sees; these weights test nothing"
    assert sum(len(set(tokens)) > 2 for tokens in found.written) > len(found.written) / 2, "it repeats itself"


@pytest.mark.parametrize("shape", sorted(random_retrieval.SHAPES))
def test_the_engine_matches_embeds_and_captions_as_the_reference(tmp_path: Path, shape: str) -> None:
    random_retrieval.write(tmp_path / "checkpoint", shape, seed=100 + sorted(random_retrieval.SHAPES).index(shape))
    found = compared(tmp_path)
    writes = shape.startswith("itg")
    assert found.cases == 18 + 4 + 6 * writes and not found.differences
    sees = writes and shape != "itg-one-layer"  # the first layer's keys and values know no picture
    assert len(found.written) >= 3 or not sees, "it says the same whatever it sees"


@pytest.mark.parametrize(
    ("name", "least", "least_unseen"),
    [
        ("demo-opt", {"captions_true": 0.9, "answers_right": 0.9}, {"captions_true": 0.8, "answers_right": 0.8}),
        ("demo-t5", {"captions_true": 0.85, "answers_right": 0.9}, {"captions_true": 0.7, "answers_right": 0.9}),
        ("demo-vqa", {"captions_true": 0.85, "answers_right": 0.9}, {"captions_true": 0.6, "answers_right": 0.85}),
        (
            "demo-itm",
            {"itg_true": 0.85, "itm_edit_told": 0.95, "itc_recall_at_1": 0.9, "itm_recall_at_1": 0.9},
            {"itm_edit_told": 0.9},
        ),
    ],
)
def test_a_demo_tells_the_truth(
    name: str, least: dict[str, float], least_unseen: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    choices = {"tasks": None, "count": 40, "seed": "test", "side": 256, "group": 40, "wrong": None, "against": None}
    evaluate.run(argparse.Namespace(model=ROOT / "models" / name, engine=ENGINE, **choices))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for found, wanted in zip(lines, (least, least_unseen), strict=True):
        assert all(found[figure] >= share for figure, share in wanted.items()), found


def test_every_shipped_bundle_is_what_its_reference_gave() -> None:
    bundles = [facts.parent for facts in (ROOT / "models").glob("*/bundle.json")]
    assert len(bundles) >= 4
    for bundle in bundles:
        run_engine(ENGINE, "verify", str(bundle))
    files = [file for bundle in bundles for file in bundle.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 24e6


def test_a_line_of_json_may_hold_other_line_ends(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    engine.write_text('#!/bin/sh\nprintf \'{"text": "a\\302\\205b\\342\\200\\250c"}\\n{"text": "d"}\\n\'\n')
    engine.chmod(0o755)
    assert [row["text"] for row in run_engine(engine, "caption")] == ["a\x85b\u2028c", "d"]
