"""The `webgpu` target on a WebGPU device: it runs every node, gives what the processor gives, and keeps the cache to itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from place import WebGpu, webgpu
from test_grid import rounded_checkpoint

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint, random_retrieval
from blip2_export.run.generation import Graphs
from blip2_export.run.retrieval import Stage1Graphs
from blip2_export.run.sessions import Place
from blip2_export.run.slots import FILL

TOLERANCE = 1e-5  # of the largest value; a device adds in another order
SIDE = 84  # of pictures: the image encoder has more than 32 positions
WHOLE = (
    "tiny",
    "odd-9",
    "t5",
    "t5-odd-2",
    "instruct-llama-odd-1",
    "instruct-llama-odd-2",
    "vqa-t5",
    "itg-odd-1",
)
WRITERS = ("tiny", "t5-odd-1", "instruct-llama-odd-1", "vqa-opt", "llama")
N_NEW = 6


@pytest.fixture(scope="module")
def device() -> WebGpu:
    found = webgpu()
    if isinstance(found, str):
        pytest.skip(f"no WebGPU device: {found}")
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """(bundle for the processor, bundle for the device) of a shape, made once."""
    done: dict[str, tuple[Path, Path]] = {}

    def make(shape: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        key = f"{shape}-{dtype}"
        if key not in done:
            root = tmp_path_factory.mktemp(shape)
            stage_1 = shape in random_retrieval.SHAPES
            (random_retrieval if stage_1 else random_checkpoint).write(root / "c", shape, 3, dtype)
            done[key] = bundles(root)
        return done[key]

    return make


def bundles(root: Path) -> tuple[Path, Path]:
    for target in ("cpu", "webgpu"):
        convert(root / "c", root / target, Choices("x", golden=False, image_size=SIDE, target=target))
    return root / "cpu", root / "webgpu"


def assert_close(found: np.ndarray, expected: np.ndarray, stage: str) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{stage}: relative error {error:.2e}, allowed {TOLERANCE:.0e}"


def pictures(n: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, 3, SIDE, SIDE), np.float32)


@pytest.mark.parametrize("shape", WHOLE)
def test_the_device_runs_every_node(device: WebGpu, made, shape: str) -> None:
    processors, devices = made(shape)
    assert "FusedMatMul" in device.left_over(processors / "vision.onnx"), "what the processor has to run is not seen"
    left = {path.name: device.left_over(path) for path in sorted(devices.glob("*.onnx"))}
    assert len(left) >= 3 and not any(left.values()), left


def assert_same_texts(device: WebGpu, processors: Path, devices: Path) -> None:
    """Rows of unequal length, one longer than 32 positions, of which some end early."""
    wanted, found = Graphs(processors), Graphs(devices, device)
    features = wanted.features(pictures(3))
    assert features.shape[1] > 32
    assert_close(found.features(pictures(3)), features, "features")
    rng = np.random.default_rng(2)
    n_tokens = wanted.facts["language"]["vocab_size"]
    prompts = [rng.integers(5, n_tokens, n).tolist() for n in (40, 3, 17)]
    questions = [[5, 6, 7], [8], [9] * 40] if "text" in wanted.facts["qformer"] else None
    queries = wanted.queries(features, questions)
    assert_close(found.queries(features, questions), queries, "queries")
    first, tokens = wanted.greedy(queries, prompts, N_NEW)
    logits, written = found.greedy(queries, prompts, N_NEW)
    assert_close(logits, first, "first logits")
    assert written == tokens


@pytest.mark.parametrize("shape", WRITERS)
def test_every_stage_and_every_token_are_those_of_the_processor(device: WebGpu, made, shape: str) -> None:
    assert_same_texts(device, *made(shape))


@pytest.mark.parametrize(("shape", "dtype"), [("tiny", torch.float16), ("t5", torch.bfloat16)])
def test_weights_of_16_bits_are_lifted_before_the_device_sees_them(device: WebGpu, made, shape: str, dtype) -> None:
    assert_same_texts(device, *made(shape, dtype))


def test_weights_of_8_bits_are_lifted_before_the_device_sees_them(device: WebGpu, tmp_path: Path) -> None:
    rounded_checkpoint(tmp_path / "c", "tiny")
    assert_same_texts(device, *bundles(tmp_path))


@pytest.mark.parametrize("shape", ["itg-odd-1", "itg-clip"])
def test_stage_1_is_that_of_the_processor(device: WebGpu, made, shape: str) -> None:
    processors, devices = made(shape)
    wanted, found = Stage1Graphs(processors), Stage1Graphs(devices, device)
    features = wanted.features(pictures(3))
    assert_close(found.features(pictures(3)), features, "features")
    ids = np.random.default_rng(2).integers(5, 60, (3, 40))
    text = {"input_ids": ids, "attention_mask": (np.arange(40) < np.array([[40], [3], [17]])).astype(np.int64)}
    for graph, feeds in (
        ("qformer", {"image_features": features}),
        ("qformer_text", text),
        ("qformer_itm", {"image_features": features, **text}),
    ):
        given = found.run(graph, **feeds)
        for name, value in wanted.run(graph, **feeds).items():
            real = text["attention_mask"].astype(bool) if name.startswith("text_") else ...
            assert_close(given[name][real], value[real], name)
    tokens, logits = wanted.write(features, N_NEW)
    written, given = found.write(features, N_NEW)
    assert written == tokens
    for row, expected in enumerate(logits):
        assert_close(given[row], expected, f"logits of row {row}")


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("shape", ["tiny", "instruct-llama-odd-2"])
def test_only_places_of_new_positions_are_written_and_in_place(
    request: pytest.FixtureRequest, made, shape: str, on_device: bool
) -> None:
    place = request.getfixturevalue("device") if on_device else Place()
    caches = []
    for folder, where in zip(made(shape), (Place(), place), strict=True):
        graphs, lengths = Graphs(folder, where), np.array([9, 4])
        slots, ids = graphs.slots(2, 16), np.random.default_rng(3).integers(5, 90, (2, 9))
        positions = np.tile(np.arange(9), (2, 1))
        slots.run(ids, positions, lengths, lengths[:, None] - 1)
        before = [where.fetch(buffer) for buffer in slots.past.values()]
        slots.run(ids[:, :1], lengths[:, None], lengths + 1, np.zeros((2, 1)))
        caches.append([where.fetch(buffer) for buffer in slots.past.values()])
        idle = np.setdiff1d(np.arange(slots.n), slots.of_rows)
        for old, new in zip(before, caches[-1], strict=True):
            assert (new[:, :, 10:] == FILL).all(), "places behind the new positions are written"
            assert (new[idle, :, 1:] == old[idle, :, 1:]).all(), "a step writes more than one place of an idle slot"
    for expected, found in zip(*caches, strict=True):
        for slot, length in zip(slots.of_rows, lengths + 1, strict=True):
            assert_close(found[slot, :, :length], expected[slot, :, :length], "written places")
