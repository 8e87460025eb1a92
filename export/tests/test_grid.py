"""Weights of 8 bits: what is rounded is recognised, is stored small, and computes as if it had been stored in float32."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint, random_retrieval
from blip2_export.graphs import builder
from blip2_export.graphs.grid import on_grid, round_to_grid
from blip2_export.run.generation import Graphs
from blip2_export.run.retrieval import Stage1Graphs

TABLES = ("embed_tokens.weight", "shared.weight", "word_embeddings.weight")


def reconstructed(array: np.ndarray) -> np.ndarray:
    found = on_grid(array)
    assert found is not None, "not recognised"
    numbers, scales = found
    assert (numbers.dtype, scales.dtype, numbers.shape) == (np.int8, np.float16, array.shape)
    return numbers.astype(np.float32) * scales.astype(np.float32).reshape(-1, *[1] * (array.ndim - 1))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Rows whose sizes differ by a factor of up to e²⁰."""
    random = np.random.default_rng(seed)
    sizes = np.exp(random.uniform(-12, 8, (shape[0], *[1] * (len(shape) - 1))))
    return (random.standard_normal(shape) * sizes).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (500, 33), (130, 3, 4, 4), (300, 1)])
def test_what_was_rounded_is_recognised_bit_for_bit(shape: tuple[int, ...]) -> None:
    for seed in range(5):
        rounded = round_to_grid(drawn(*shape, seed=seed))
        assert rounded.shape == shape and same_bits(reconstructed(rounded), rounded)
        assert same_bits(round_to_grid(rounded), rounded)


@pytest.mark.parametrize("largest", [0.0, 1e-30, 1e-7, 6e-5, 0.005, 0.0078, 1.0, 8e6, 1e30])
def test_rows_of_any_size_are_recognised(largest: float) -> None:
    array = np.linspace(-largest, largest, 402, dtype=np.float32).reshape(2, 201)
    rounded = round_to_grid(array)
    assert same_bits(reconstructed(rounded), rounded)
    if 0.01 <= largest <= 8e6:
        assert np.abs(rounded - array).max() <= largest / 127 * 0.51


def test_rounding_is_to_the_nearest_number_of_a_row() -> None:
    array = np.array([[0.0, 1.27, -1.27, 0.016, -0.0149], [0.0, 0.0, 0.0, 0.0, -0.0]], np.float32)
    scale = np.float32(np.float16(1.27 / 127))
    assert same_bits(round_to_grid(array), np.array([[0, 127, -127, 2, -1], [0] * 5], np.float32) * scale + 0)


def test_parts_and_padding_of_a_rounded_matrix_are_recognised() -> None:
    rounded = round_to_grid(drawn(96, 40))
    assert same_bits(reconstructed(rounded[32:64]), rounded[32:64])
    padded = np.pad(rounded, [(3, 70), (2, 5)])
    assert same_bits(reconstructed(padded), padded)
    for n in range(1, 40):
        assert same_bits(reconstructed(rounded[:, :n]), rounded[:, :n])
    turned = np.ascontiguousarray(rounded.T).T
    assert same_bits(reconstructed(turned), rounded)


def test_what_lies_beside_the_grid_is_refused() -> None:
    rounded = round_to_grid(drawn(200, 30))
    for row in (0, 63, 64, 199):
        for other in (np.nextafter(rounded[row, 4], np.float32(np.inf)), np.float32(np.nan), np.float32(np.inf)):
            moved = rounded.copy()
            moved[row, 4] = other
            assert on_grid(moved) is None
    signed = rounded.copy()
    signed[5] = -0.0
    assert on_grid(signed) is None
    for other in (drawn(200, 30), rounded.astype(np.float16), rounded.astype(np.float64), rounded[0], rounded[:0]):
        assert on_grid(other) is None
    assert on_grid(drawn(200, 30).astype(np.float16).astype(np.float32)) is None


def rounded_checkpoint(folder: Path, shape: str) -> None:
    """All but token embeddings and what has one axis is rounded."""
    (random_retrieval if shape in random_retrieval.SHAPES else random_checkpoint).write(folder, shape, seed=3)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if value.ndim >= 2 and not name.endswith(TABLES):
            weights[name] = torch.from_numpy(round_to_grid(value.numpy()))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def initialisers(path: Path) -> list[onnx.TensorProto]:
    return list(onnx.load(path, load_external_data=False).graph.initializer)


def loaded(path: Path, dump: Path) -> Counter[str]:
    """The nodes that are left when the runtime has loaded a graph as the engine asks for it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # the dump would warn that it is for this machine
    options.optimized_model_filepath = str(dump)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(dump, load_external_data=False).graph.node)


@pytest.fixture(params=["tiny", "odd-1", "t5-odd-1", "instruct-llama-odd-1", "itg-odd-1"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Bundles of one rounded checkpoint: in 8 bits, and in float32."""
    rounded_checkpoint(tmp_path / "c", request.param)
    convert(tmp_path / "c", tmp_path / "small", Choices("x", golden=False))
    monkeypatch.setattr(builder, "on_grid", lambda array: None)
    convert(tmp_path / "c", tmp_path / "large", Choices("x", golden=False))
    return tmp_path / "small", tmp_path / "large"


def test_a_rounded_checkpoint_makes_a_small_bundle_that_computes_the_same_bits(pair, tmp_path: Path) -> None:
    small, large = pair
    for path in large.glob("*.onnx"):
        assert loaded(small / path.name, tmp_path / "s.onnx") == loaded(path, tmp_path / "l.onnx")
        stored = [t for t in initialisers(small / path.name) if t.data_type == onnx.TensorProto.INT8]
        assert stored, path.name
        wide = [t for t in initialisers(path) if len(t.dims) >= 2 and t.data_type == onnx.TensorProto.FLOAT]
        assert {tuple(t.dims) for t in stored} <= {tuple(t.dims) for t in wide}
    size = {b: (b / "vision.onnx.data").stat().st_size for b in pair}
    assert size[small] < 0.4 * size[large], size
    answers = [everything(folder) for folder in pair]
    assert len(answers[0]) > 3 and all(same_bits(a, b) for a, b in zip(*answers, strict=True))


def everything(folder: Path) -> list[np.ndarray]:
    """What the graphs give for noise."""
    graphs = (Stage1Graphs if (folder / "qformer_text.onnx").exists() else Graphs)(folder)
    side = graphs.facts["image"]["size"]
    features = graphs.features(np.random.default_rng(0).standard_normal((2, 3, side, side), np.float32))
    if isinstance(graphs, Graphs):
        asks = "text" in graphs.facts["qformer"]
        queries = graphs.queries(features, [[5, 6], [7]] if asks else None)
        logits, tokens = graphs.greedy(queries, [[5, 6, 7], [8]], 4)
        return [features, queries, logits, np.concatenate(tokens)]
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    text = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    runs = [graphs.run("qformer", image_features=features), graphs.run("qformer_text", **text)]
    runs.append(graphs.run("qformer_itm", image_features=features, **text))
    tokens, logits = graphs.write(features, 4)
    return [features, *(v for run in runs for v in run.values()), *logits, np.concatenate(tokens)]
