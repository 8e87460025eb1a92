"""Of the values that a graph computes the runtime knows every axis, so that they can share memory, and loading is not slow."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from blip2_export.bundle import Choices, convert
from blip2_export.check import random_checkpoint, random_retrieval

LAYERS = (
    "FusedMatMul",
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "MultiHeadAttention",
    "GroupQueryAttention",
)


def axes_known(path: Path) -> dict[str, bool]:
    """Of what layers give, by name, whether every axis has a size or a name."""
    model = onnx.load(path, load_external_data=False)
    given = {node.output[0] for node in model.graph.node if node.op_type in LAYERS}
    wanted = given - {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
    probe = path.with_suffix(".probe.onnx")
    onnx.save(model, probe)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(probe, options, providers=["CPUExecutionProvider"])
    return {value.name: None not in value.shape for value in session.get_outputs() if value.name in wanted}


@pytest.mark.parametrize("shape", ["tiny", "t5", "instruct-llama-odd-1", "vqa-opt", "itg-odd-1"])
def test_every_layer_gives_known_axes(shape: str, tmp_path: Path) -> None:
    stage_1 = shape in random_retrieval.SHAPES
    (random_retrieval if stage_1 else random_checkpoint).write(tmp_path / "checkpoint", shape, seed=1)
    convert(tmp_path / "checkpoint", tmp_path / "bundle", Choices(shape, golden=False))
    found = {path.stem: axes_known(path) for path in (tmp_path / "bundle").glob("*.onnx")}
    assert all(found.values()), "every graph has layers"
    unknown = {name: [value for value, known in values.items() if not known] for name, values in found.items()}
    assert not any(unknown.values()), unknown
