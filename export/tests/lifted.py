"""A bundle of 16-bit graphs with every type and weight lifted to float32: the same nodes, for processors that have no kernels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def lift(folder: Path) -> Path:
    """Writes the lifted bundle beside the bundle."""
    out = folder.with_name(f"{folder.name}-lifted")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.onnx", "*.data", "bundle.json"))
    facts = (folder / "bundle.json").read_text()
    for narrow in ("float16", "bfloat16"):
        facts = facts.replace(f'"{narrow}"', '"float32"')
    (out / "bundle.json").write_text(facts)
    for said in json.loads(facts)["graphs"].values():
        model = onnx.load(folder / said["file"])
        _lift(model.graph)
        onnx.save(model, out / said["file"])
    return out


def _lift(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if tensor.data_type in _NARROW:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in _NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _NARROW:
                attribute.i = TensorProto.FLOAT
