"""Bundles against `transformers`, stage by stage, on random checkpoints of many shapes; and what conversion refuses."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converted import converted

from blip2_export import bundle
from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint
from blip2_export.graphs.targets import TARGETS
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.reference.generation import Reference
from blip2_export.run.generation import Graphs
from blip2_export.scenes import drawing

TOLERANCE = 1e-4
PROMPTS = ("", "Question: what colour is the star? Answer:", "a photo of")
N_NEW = 8


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory):
    """(checkpoint, bundle) of a shape, made once."""
    shapes = sorted(random_checkpoint.SHAPES)
    return converted(
        tmp_path_factory, lambda folder, shape: random_checkpoint.write(folder, shape, seed=shapes.index(shape)), Path
    )


@pytest.fixture(scope="session")
def told(made):
    """What the reference sees and says of a shape's checkpoint, for every target the same: pictures, and texts behind prompts."""

    @functools.cache
    def of(shape: str) -> tuple[list[Any], list[Any]]:
        checkpoint, folder = made(shape)
        reference = Reference(checkpoint, json.loads((folder / "bundle.json").read_text()))
        seen = [reference.stages(p) for p in drawing.sample_pictures(8, seed=3, side=120)]
        return seen, [reference.generate(pixels, prompt, N_NEW) for pixels, _, _ in seen for prompt in PROMPTS]

    return of


def assert_close(found: np.ndarray, expected: np.ndarray, stage: str) -> None:
    assert found.shape == expected.shape, f"{stage}: {found.shape}, expected {expected.shape}"
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{stage}: relative error {error:.2e}, allowed {TOLERANCE:.0e}"


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("shape", sorted(random_checkpoint.SHAPES))
def test_every_stage_and_every_token_equal_the_reference(made, told, shape: str, target: str) -> None:
    graphs, (seen, wanted) = Graphs(made(shape, target)[1]), told(shape)
    assert np.std([q for _, _, q in seen], axis=0).max() > 1e-2, "the checkpoint does not tell pictures apart"
    pixels = np.stack([s[0] for s in seen])
    features = graphs.features(pixels)
    assert_close(features, np.stack([s[1] for s in seen]), "features")
    queries = graphs.queries(features)
    assert_close(queries, np.stack([s[2] for s in seen]), "queries")
    rows = np.repeat(queries, len(PROMPTS), axis=0)
    ids = [w[0] for w in wanted]
    logits, tokens = graphs.greedy(rows, ids, N_NEW)
    assert_close(logits, np.stack([w[1] for w in wanted]), "first logits")
    assert tokens == [w[2] for w in wanted]
    for i in (0, len(rows) - 1):
        _, alone = graphs.greedy(rows[i : i + 1], ids[i : i + 1], N_NEW)
        assert alone == tokens[i : i + 1], "a row gives other tokens alone than in a batch"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_checkpoint_keeps_its_size_and_equals_the_lifted_reference(tmp_path: Path, dtype: torch.dtype) -> None:
    random_checkpoint.write(tmp_path / "c", "odd-1", 1, dtype)
    convert(tmp_path / "c", tmp_path / "b", Choices("x", golden=False))
    stored = sum(p.stat().st_size for p in (tmp_path / "b").glob("*.data"))
    assert stored < 1.2 * (tmp_path / "c" / "model.safetensors").stat().st_size
    graphs, reference = (
        Graphs(tmp_path / "b"),
        Reference(tmp_path / "c", json.loads((tmp_path / "b" / "bundle.json").read_text())),
    )
    pixels, features, queries = reference.stages(drawing.sample_pictures(1, 0)[0])
    assert_close(graphs.features(pixels[None])[0], features, "features")
    assert_close(graphs.queries(features[None])[0], queries, "queries")
    ids, logits, tokens, _ = reference.generate(pixels, PROMPTS[1], N_NEW)
    found, written = graphs.greedy(queries[None], [ids], N_NEW)
    assert_close(found[0], logits, "first logits")
    assert written == [tokens]


def test_sharded_checkpoints_give_the_same_weights(made, tmp_path: Path) -> None:
    _, whole = made("tiny")
    random_checkpoint.write(tmp_path / "c", "tiny", sorted(random_checkpoint.SHAPES).index("tiny"), shard_bytes=50_000)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 1
    convert(tmp_path / "c", tmp_path / "b", Choices("tiny", golden=False))
    for data in whole.glob("*.data"):
        assert data.read_bytes() == (tmp_path / "b" / data.name).read_bytes()


def test_bundle_states_size_and_hash_of_every_file_and_records_goldens(made, tmp_path: Path) -> None:
    checkpoint, _ = made("tiny")
    convert(checkpoint, tmp_path / "b", Choices("tiny"))
    facts = json.loads((tmp_path / "b" / "bundle.json").read_text())
    there = {str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert there == {*facts["files"], "bundle.json"}
    for name, said in facts["files"].items():
        content = (tmp_path / "b" / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (said["bytes"], said["sha256"])
    golden = json.loads((tmp_path / "b" / "golden" / "golden.json").read_text())
    assert {c["task"] for c in golden["cases"]} == {"caption", "ask"}
    assert all(c["tokens"] for c in golden["cases"])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: shutil.rmtree(f), "not a folder"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: _edit(f, model_type="blip"), "model_type is `blip`"),
        (lambda f: _edit(f, text_config={"model_type": "gpt2"}), "language model is `gpt2`"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "not a readable safetensors"),
        (lambda f: _truncate(f / "model.safetensors"), "not a readable safetensors"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda f: _edit(f, num_query_tokens=9), "`query_tokens` is"),
    ],
)
def test_what_cannot_be_converted_gets_one_sentence_and_leaves_nothing(made, tmp_path: Path, damage, said: str) -> None:
    shutil.copytree(made("tiny")[0], tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "c", tmp_path / "b", Choices("x", golden=False))
    assert [p.name for p in tmp_path.iterdir()] in ([], ["c"])


def _edit(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_an_existing_bundle_is_replaced_only_by_force_and_only_by_a_complete_one(made, tmp_path: Path) -> None:
    checkpoint, _ = made("tiny")
    convert(checkpoint, tmp_path / "b", Choices("first", golden=False))
    with pytest.raises(CheckpointError, match="exists"):
        convert(checkpoint, tmp_path / "b", Choices("second", golden=False))
    with pytest.raises(CheckpointError, match="not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "b", Choices("second", golden=False, force=True))
    assert json.loads((tmp_path / "b" / "bundle.json").read_text())["name"] == "first"
    convert(checkpoint, tmp_path / "b", Choices("second", golden=False, force=True))
    assert json.loads((tmp_path / "b" / "bundle.json").read_text())["name"] == "second"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="left alone"):
        convert(checkpoint, tmp_path / "mine", Choices("x", golden=False, force=True))
    assert (tmp_path / "mine" / "letter.txt").exists()


def test_a_killed_conversion_leaves_no_bundle_and_the_next_one_cleans_up(made, tmp_path: Path) -> None:
    checkpoint, _ = made("tiny")
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom blip2_export import bundle\nfrom blip2_export.graphs import opt\n"
        "def slow(*a):\n    print('here', flush=True)\n    time.sleep(60)\n"
        "opt.build = slow\n"
        "bundle.convert(Path(sys.argv[1]), Path(sys.argv[2]), bundle.Choices('x', golden=False))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, checkpoint, tmp_path / "b"], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "here\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    time.sleep(0.1)
    left = [p.name for p in tmp_path.iterdir()]
    assert left and all(name.endswith(".part") for name in left), left
    convert(checkpoint, tmp_path / "b", Choices("x", golden=False))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_the_format_version_is_the_documented_one() -> None:
    text = (Path(__file__).parents[2] / "models" / "README.md").read_text()
    assert f"format version {bundle.FORMAT_VERSION}" in text
