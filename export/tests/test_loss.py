"""What calibration sees, what a conversion to fewer bits says that it loses, and what `verify` makes of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from test_engine import ENGINE

from blip2_export.bundle import Choices, convert, open_checkpoint, yardstick
from blip2_export.check import random_checkpoint, random_retrieval
from blip2_export.graphs.precision import EXACT, FLOATS, Precision, Precisions
from blip2_export.graphs.statistics import Statistics
from blip2_export.graphs.targets import TARGETS
from blip2_export.loss import measure
from blip2_export.loss.inputs import inputs
from blip2_export.loss.samples import N_DRAWN, samples
from blip2_export.loss.yardstick import Yardstick
from blip2_export.read.checkpoint import CheckpointError
from blip2_export.read.lavis import Parts
from blip2_export.reference import pictures
from blip2_export.reference.generation import Reference
from blip2_export.run.generation import Graphs
from blip2_export.run.retrieval import Stage1Graphs
from blip2_export.run.sessions import Place

INT8 = Precisions(*[Precision.INT8] * 3)
BLOCKS = Precisions(*[Precision.INT8_BLOCKS] * 3)
Made = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(checkpoint, bundle) of a shape in some precisions, made once."""
    done: dict[tuple[str, Precisions], tuple[Path, Path]] = {}

    def make(shape: str, precisions: Precisions = INT8) -> tuple[Path, Path]:
        if (shape, precisions) not in done:
            root = tmp_path_factory.mktemp(shape)
            writer = random_retrieval if shape in random_retrieval.SHAPES else random_checkpoint
            writer.write(root / "c", shape, seed=5)
            convert(root / "c", root / "b", Choices(shape, precisions=precisions))
            done[shape, precisions] = root / "c", root / "b"
        return done[shape, precisions]

    return make


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bundle.json").read_text())


def golden_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "golden" / "golden.json").read_text())


# Calibration


def statistics(checkpoint: Path, folder: Path, given: Path | None = None) -> Statistics:
    folder.mkdir()
    opened = open_checkpoint(checkpoint, Parts())
    return yardstick(opened, folder, Choices("x", precisions=INT8, calibration=given)).statistics()


def test_calibration_sees_what_the_linear_layers_of_the_reference_read(made: Made, tmp_path: Path) -> None:
    checkpoint, folder = made("tiny")
    found = statistics(checkpoint, tmp_path / "f")["vision"]
    reference = Reference(checkpoint, facts_of(folder))
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in reference.model.vision_model.encoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0][0].abs()))
    for sample in samples(None, held_out=False):
        reference.features(reference.prepare(sample.picture))
    order = sorted(seen, key=list(seen).index)
    assert len(order) == len(found) == 8 and order[0].endswith("qkv"), order
    for name, channels in zip(order, found, strict=True):
        rows = torch.cat(seen[name])
        np.testing.assert_allclose(channels.largest, rows.amax(0), rtol=1e-3, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(channels.mean, rows.mean(0), rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shape", ["vqa-opt", "t5", "llama", "itg-tiny", "itm-tiny"])
def test_every_value_that_a_weight_is_multiplied_with_is_seen(shape: str, tmp_path: Path) -> None:
    writer = random_retrieval if shape in random_retrieval.SHAPES else random_checkpoint
    writer.write(tmp_path / "c", shape, seed=5)
    found = statistics(tmp_path / "c", tmp_path / "f")
    assert set(found) == set(facts_of(tmp_path / "f")["graphs"])
    for graph, values in found.items():
        assert values, graph
        for channels in values:
            assert channels.largest.dtype == channels.mean.dtype == np.float32 and channels.largest.ndim == 1
            assert (channels.largest >= channels.mean).all() and np.isfinite(channels.largest).all()
            assert channels.mean.max() > 0, f"{graph}: nothing was seen"


def test_given_pictures_are_calibrated_on_but_for_every_fourth(made: Made, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for i in range(8):
        Image.new("RGBA" if i % 2 else "L", (40, 30), 20 * i if i % 2 == 0 else (20 * i, 0, 0, 99)).save(
            given / f"{i}.png"
        )
    (given / "captions.txt").write_text("0.png: one\n1.png: a tie: no\nelse\n")
    (given / "1.txt").write_text("a text of its own\n")
    (given / "notes.md").write_text("no picture")
    used, kept = (samples(given, held_out) for held_out in (False, True))
    assert (len(used), len(kept)) == (6, 2) and [s.text for s in used[:2]] == ["one", "a text of its own"]
    assert all(s.text and s.question and s.picture.mode == "RGB" for s in (*used, *kept))
    drawn, others = (samples(None, held_out) for held_out in (False, True))
    assert len(drawn) == len(others) == N_DRAWN
    assert not {s.picture.tobytes() for s in drawn} & {s.picture.tobytes() for s in others}
    plain = statistics(made("tiny")[0], tmp_path / "f")["vision"][0]
    other = statistics(made("tiny")[0], tmp_path / "g", given)["vision"][0]
    assert np.abs(plain.mean - other.mean).max() > 1e-3, "the given pictures change nothing"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", "not a folder; --calibration takes one with pictures"),
        ("empty", "no pictures"),
        ("broken", "not a picture that can be read"),
        ("latin", "not UTF-8"),
    ],
)
def test_a_folder_that_is_no_use_is_refused(what: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / what
    if what != "nothing":
        folder.mkdir()
    if what == "broken":
        (folder / "0.png").write_bytes(b"\x89PNG and no more")
    if what == "latin":
        Image.new("RGB", (8, 8)).save(folder / "0.png")
        (folder / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CheckpointError, match=said):
        samples(folder, held_out=False)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (Choices("x"), "all parts are float32"),
        (Choices("x", target="cuda", precisions=EXACT), "all parts are float32"),
        (Choices("x", target="cuda", loss=False), "graphs for cuda are fitted to no pictures in these precisions"),
        (
            Choices("x", target="tensorrt", precisions=BLOCKS, loss=False),
            "graphs for tensorrt are fitted to no pictures",
        ),
    ],
)
def test_pictures_that_nothing_would_read_are_refused(choices: Choices, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path, tmp_path / "b", replace(choices, calibration=tmp_path))


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_calibration_runs_where_graphs_are_made_with_what_it_sees(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(Yardstick, "statistics", lambda _: ran.append(target))
    wide = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 128}
    random_checkpoint.write(tmp_path / "c", {"text_config": wide}, seed=0)
    for precision in TARGETS[target].precisions:
        choices = Choices("x", golden=False, loss=False, target=target, precisions=replace(EXACT, language=precision))
        convert(tmp_path / "c", tmp_path / precision, choices)
        assert len(ran) == (target == "cpu" and precision not in FLOATS), precision
        ran.clear()


# Loss


@pytest.mark.parametrize("shape", ["tiny", "t5", "vqa-opt", "itg-tiny"])
def test_a_text_read_at_once_has_the_logits_of_the_steps_that_wrote_it(made: Made, shape: str) -> None:
    checkpoint, folder = made(shape)
    kind = Stage1Graphs if shape.startswith("itg") else Graphs
    graphs = kind(folder)
    given = inputs(graphs, samples(None, held_out=True)[:3], prepared(checkpoint, graphs.facts))
    features = np.stack([graphs.features(pixels[None])[0] for pixels in given.pixels])
    if isinstance(graphs, Stage1Graphs):
        tokens, logits = graphs.write(features, 8)
        for one, written, steps in zip(features, tokens, logits, strict=True):
            seen = graphs.run("qformer", image_features=one[None])
            np.testing.assert_allclose(graphs.forced(seen, written), steps, atol=2e-4)
            assert graphs.written(seen, 8) == written
        return
    for asked in given.asked:
        question = None if asked.question is None else [asked.question]
        queries = graphs.queries(features[asked.picture][None], question)
        first, (written,) = graphs.greedy(queries, [asked.prompt], 8)
        forced = graphs.forced(queries[0], asked.prompt, written)
        np.testing.assert_allclose(forced[0], first[0], atol=2e-4)
        assert list(forced.argmax(-1)) == written


def prepared(checkpoint: Path, facts: dict[str, Any]) -> pictures.Prepare:
    return pictures.preparation(open_checkpoint(checkpoint, Parts()).processor_folder, facts["image"])


@pytest.mark.parametrize("shape", ["tiny", "itg-tiny"])
def test_a_bundle_loses_nothing_against_itself_and_little_in_8_bits(made: Made, shape: str) -> None:
    checkpoint, folder = made(shape)
    graphs = (Stage1Graphs if shape.startswith("itg") else Graphs)(folder)
    given = inputs(graphs, samples(None, held_out=True)[:4], prepared(checkpoint, graphs.facts))
    itself, found = measure.loss(graphs, graphs, given), facts_of(folder)["loss"]
    nothing = {"error": 0, "cosine": 1, "least_cosine": 1}
    assert all(stage == {"alone": nothing, "end_to_end": nothing} for stage in itself["stages"].values())
    assert itself["tokens"]["agree"] == 1 and len(set(itself["perplexity"].values())) == 1
    assert set(found["stages"]) == set(itself["stages"]) and found["pictures"] == N_DRAWN
    for stage in found["stages"].values():
        for way in stage.values():
            assert 0 < way["error"] < 0.3 and 0.97 < way["least_cosine"] < way["cosine"] < 1, found["stages"]
    assert found["stages"]["queries"]["alone"] != found["stages"]["queries"]["end_to_end"]
    assert 0.8 < found["tokens"]["agree"] <= 1 and found["tokens"]["compared"] > 100
    assert found["perplexity"]["bundle"] == pytest.approx(found["perplexity"]["float32"], rel=0.1)


def test_what_is_compared_is_what_it_says() -> None:
    wanted = [np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[0.0, 10.0]])]
    found = [np.array([[3.0, 4.0], [0.0, 1.0]]), np.array([[0.0, 9.0]])]
    assert measure.compared(found, wanted) == {"error": 0.25, "cosine": round(2 / 3, 7), "least_cosine": 0.0}
    rows = [np.array([[0.0, 1.0], [2.0, 1.0]]), np.array([[0.0, 3.0]])]
    assert measure.agreeing(rows, [[1, 1], [1]]) == pytest.approx(2 / 3)


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not numbers"):
        measure.compared([np.array([[np.nan, 1.0]])], [np.array([[1.0, 1.0]])])


def test_parts_that_stay_float32_lose_nothing_and_keep_their_tolerance(made: Made) -> None:
    _, folder = made("tiny", Precisions(language=Precision.INT8))
    facts, golden = facts_of(folder), golden_of(folder)
    assert {name: g["precision"] for name, g in facts["graphs"].items()} == {
        "vision": "float32",
        "qformer": "float32",
        "decoder": "int8",
    }
    assert facts["graphs"]["decoder"]["weight_bits"] == 8 and "weight_bits" not in facts["graphs"]["vision"]
    assert (
        facts["loss"]["stages"]["features"]["alone"]["error"]
        == facts["loss"]["stages"]["queries"]["alone"]["error"]
        == 0
    )
    assert (
        golden["tolerance"]["features"] == golden["tolerance"]["queries"] == 1e-4 < golden["tolerance"]["first_logits"]
    )
    assert list(golden["cosine"]) == ["first_logits"] and 0.5 < golden["agreement"] <= 0.95


def test_float32_has_no_loss_and_without_measuring_there_is_none(tmp_path: Path) -> None:
    random_checkpoint.write(tmp_path / "c", "tiny", seed=5)
    convert(tmp_path / "c", tmp_path / "exact", Choices("x"))
    assert "loss" not in facts_of(tmp_path / "exact")
    assert set(golden_of(tmp_path / "exact")) == {"format_version", "reference", "tolerance", "cases"}
    convert(tmp_path / "c", tmp_path / "b", Choices("x", precisions=INT8, loss=False))
    assert "loss" not in facts_of(tmp_path / "b") and golden_of(tmp_path / "b")["agreement"] > 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c", "exact"], "the float32 bundle is left behind"


def test_graphs_that_do_not_run_here_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random_checkpoint.write(tmp_path / "c", "tiny", seed=5)
    plain = Place.session

    def session(place: Place, path: Path) -> Any:
        if "float32" not in path.parent.name:
            raise RuntimeError("no kernel")
        return plain(place, path)

    monkeypatch.setattr(Place, "session", session)
    convert(tmp_path / "c", tmp_path / "b", Choices("x", precisions=INT8))
    golden, said = golden_of(tmp_path / "b"), capsys.readouterr().err
    assert "loss: not measured" in said and "tolerances are not measured" in said
    assert "loss" not in facts_of(tmp_path / "b")
    assert (
        golden["tolerance"]["features"] == 0.15 and golden["tolerance"]["pixels"] == 1e-6 and golden["agreement"] == 0.8
    )


# Verify


@pytest.mark.parametrize("shape", ["tiny", "t5", "itg-tiny"])
def test_verify_holds_and_a_kernel_that_overflows_or_a_wrong_scale_turns_it_red(made: Made, shape: str) -> None:
    _, folder = made(shape)
    assert wrong(folder) == []
    facts = facts_of(folder)
    for damage in (_overflow, _scale):
        for graph in ("vision", "qformer"):
            kept = _damage(folder, facts, graph, damage)
            try:
                found = wrong(folder)
            finally:
                _put_back(folder, facts, kept)
            assert found, f"{graph}: {damage.__name__} goes unnoticed"
            assert ("features" in found[0]) == (graph == "vision"), f"{graph}: another stage is blamed: {found}"
    assert wrong(folder) == []


def wrong(folder: Path) -> list[str]:
    """The comparisons that do not hold."""
    assert ENGINE.exists(), f"{ENGINE} is not there; build it first (cargo build)"
    typed = [str(ENGINE), "verify", str(folder), "--provider", "cpu", "--threads", "1"]
    done = subprocess.run(typed, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode in (0, 4) and "tokens" in done.stdout, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("WRONG")]


def _overflow(numbers: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As if sums of two large products were cut."""
    return np.clip(numbers, -64, 64), scales


def _scale(numbers: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sixteenth of the output channels is twice as large."""
    scales = scales.copy()
    scales[::16] *= 2
    return numbers, scales


def _damage(folder: Path, facts: dict[str, Any], graph: str, damage: Callable[..., Any]) -> dict[str, bytes]:
    """Changes the first layer of a graph; gives the files as they were."""
    path = folder / f"{graph}.onnx"
    model = onnx.load(path)
    kept = {name: (folder / name).read_bytes() for name in (path.name, "bundle.json")}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat")
    tensors = [weights[node.input[i]] for i in (1, 3)]
    changed = damage(*(numpy_helper.to_array(tensor) for tensor in tensors))
    for tensor, array in zip(tensors, changed, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    onnx.save(model, path)
    content = path.read_bytes()
    files = {**facts["files"], path.name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    (folder / "bundle.json").write_text(json.dumps({**facts, "files": files}))
    return kept


def _put_back(folder: Path, facts: dict[str, Any], kept: dict[str, bytes]) -> None:
    for name, content in kept.items():
        (folder / name).write_bytes(content)
