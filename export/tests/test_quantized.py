"""Products in 8 and 4 bits: what the operators give is what the numbers and scales say, a row at a time, outliers or not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from blip2_export import processors
from blip2_export.bundle import Choices, convert
from blip2_export.check import outliers, random_checkpoint
from blip2_export.graphs import quantized, smoothing
from blip2_export.graphs.builder import Output, UnsupportedError
from blip2_export.graphs.cpu import CpuGraph
from blip2_export.graphs.precision import Precision, Precisions
from blip2_export.graphs.statistics import Channels

N_IN, N_OUT = 256, 96
WIDE = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 512}
SHAPES = {
    "opt": {"text_config": WIDE},
    "t5": {"text_config": {"model_type": "t5", "d_model": 128, "d_ff": 256}},
    "llama": {"text_config": {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256}},
}


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(
    folder: Path, weight: np.ndarray, precision: Precision, n_bits: int = 8, channels: Channels | None = None
) -> ort.InferenceSession:
    """A graph of one linear layer, as ONNX Runtime runs it."""
    statistics = None if channels is None else {"one": [channels]}
    g = Output(folder, CpuGraph, precision, weight_bits=n_bits, statistics=statistics).graph("one")
    x = g.input("x", "float32", ["rows", weight.shape[1]])
    g.output(g.linear(x, weight, None), "y", "float32", ["rows", len(weight)])
    g.save()
    options = ort.SessionOptions()
    if processors.saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(folder / "one.onnx", options)


def error(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> float:
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    return float(np.abs(y - exact).mean() / np.abs(exact).mean())


@pytest.mark.parametrize("n_bits", [7, 8])
def test_by_rows_multiplies_whole_numbers_exactly(n_bits: int, tmp_path: Path) -> None:
    weight, rng = drawn(N_OUT, N_IN), np.random.default_rng(1)
    numbers, scales = quantized.signed(weight, n_bits)
    assert np.abs(numbers).max() == 2 ** (n_bits - 1) - 1
    rows, largest = rng.integers(-127, 128, (5, N_IN)), np.logspace(-3, 3, 5)[:, None]
    rows[:, 7], rows[3] = -127, 0
    off = np.where(
        np.abs(rows) == 127, 0, rng.uniform(-0.45, 0.45, rows.shape)
    )  # of a whole number: none in the middle
    off[3] = 0
    wanted = rows @ numbers.astype(np.float64).T * (largest / 127) * scales
    [y] = product(tmp_path, weight, Precision.INT8, n_bits).run(None, {"x": np.float32((rows + off) * largest / 127)})
    assert (np.abs(y - wanted).max(1) <= 1e-6 * np.abs(wanted).max(1)).all()


@pytest.mark.parametrize(("n_bits", "most"), [(7, 0.0167), (8, 0.0108)])
def test_by_rows_is_as_near_as_its_bits_allow(n_bits: int, most: float, tmp_path: Path) -> None:
    weight, x = drawn(N_OUT, N_IN), drawn(40, N_IN, seed=1)
    [y] = product(tmp_path, weight, Precision.INT8, n_bits).run(None, {"x": x})
    assert error(y, x, weight) < most


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT8_BLOCKS, Precision.INT4_BLOCKS])
def test_a_row_does_not_depend_on_its_company(precision: Precision, tmp_path: Path) -> None:
    session = product(tmp_path, drawn(N_OUT, N_IN), precision)
    x = drawn(37, N_IN, seed=2) * np.logspace(-3, 3, 37, dtype=np.float32)[:, None]
    [together] = session.run(None, {"x": x})
    alone = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])
    scale = np.abs(together).max(1, keepdims=True)
    assert np.abs((together - alone) / scale).max() < 1e-6


@pytest.mark.parametrize(("precision", "most"), [(Precision.INT8_BLOCKS, 0.015), (Precision.INT4_BLOCKS, 0.11)])
def test_by_blocks_is_as_near_as_its_bits_allow(precision: Precision, most: float, tmp_path: Path) -> None:
    weight, x = drawn(N_OUT, N_IN), drawn(40, N_IN, seed=1)
    weight[5, :128] = 0
    [y] = product(tmp_path, weight, precision).run(None, {"x": x})
    assert error(y, x, weight) < most


def test_a_search_for_scales_beats_keeping_the_largest() -> None:
    weight = drawn(64, 256)
    numbers, scales = quantized.blocks(weight, 4, 32)
    numbers = np.stack([numbers & 15, numbers >> 4], -1).reshape(64, 8, 32).astype(np.float32) - 8
    found = np.square(numbers * scales[..., None] - weight.reshape(64, 8, 32)).mean()
    plain = np.abs(weight.reshape(64, 8, 32)).max(-1, keepdims=True) / 7
    kept = np.square(np.rint(weight.reshape(64, 8, 32) / plain) * plain - weight.reshape(64, 8, 32)).mean()
    assert found < 0.8 * kept


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="rows of 96 weights do not divide into blocks of 128"):
        product(tmp_path, drawn(64, 96), Precision.INT8_BLOCKS)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT8_BLOCKS])
@pytest.mark.parametrize("read", [1.0, 0.125])
def test_outlier_channels_do_not_cost_the_others_their_bits(precision: Precision, read: float, tmp_path: Path) -> None:
    weight, x = drawn(N_OUT, N_IN), drawn(300, N_IN, seed=1)
    x[:, ::100] *= 40
    weight[:, ::100] *= read
    channels = Channels(np.abs(x).max(0), np.abs(x).mean(0))
    [plain] = product(tmp_path, weight, precision).run(None, {"x": x})
    [smooth] = product(tmp_path, weight, precision, channels=channels).run(None, {"x": x})
    assert error(smooth, x, weight) < 0.45 * error(plain, x, weight)
    assert error(smooth, x, weight) < 0.02


def test_even_channels_are_left_alone(tmp_path: Path) -> None:
    x = drawn(300, N_IN)
    channels = Channels(np.abs(x).max(0), np.abs(x).mean(0))
    assert smoothing.factors(channels, drawn(N_OUT, N_IN), smoothing.Rounding(127, N_IN)) is None
    silent = Channels(np.zeros(N_IN, np.float32), np.zeros(N_IN, np.float32))
    assert smoothing.factors(silent, drawn(N_OUT, N_IN), smoothing.Rounding(127, N_IN)) is None


@pytest.mark.parametrize("family", SHAPES)
def test_a_language_model_with_outliers_keeps_its_answers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint.write(tmp_path / "checkpoint", SHAPES[family], seed=3)
    outliers.plant(tmp_path / "checkpoint")
    choices = Choices("x", golden=False, precisions=Precisions(language=Precision.INT8))

    def cosine(out: Path) -> float:
        convert(tmp_path / "checkpoint", out, choices)
        loss = json.loads((out / "bundle.json").read_text())["loss"]
        return float(loss["stages"]["first_logits"]["alone"]["cosine"])

    smooth = cosine(tmp_path / "smooth")
    monkeypatch.setattr(smoothing, "factors", lambda *_, **__: None)
    assert smooth > 0.99 and 1 - smooth < 0.3 * (1 - cosine(tmp_path / "plain"))
