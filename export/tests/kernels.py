"""Finds the nodes of a graph that CUDA has no kernel for, by a table of its kernels and the types that flow through the graph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

_TABLE = Path(__file__).with_name("cuda_kernels.json")
_NAMES = {"float": "float32", "double": "float64"}


def without_kernel(path: Path) -> list[str]:
    """Of nodes that CUDA would leave to the processor: operator and types of what goes in and out."""
    model = onnx.load(path, load_external_data=False)
    opsets = {used.domain: used.version for used in model.opset_import}
    types = {value.name: _named(value.type.tensor_type.elem_type) for value in model.graph.input}
    types |= {tensor.name: _named(tensor.data_type) for tensor in model.graph.initializer}
    missing = []
    for node in model.graph.node:
        schema = _schemas()[node.domain, node.op_type]
        schema = next(one for one in schema if one.since_version <= opsets[node.domain])
        bound = dict(_bound(node, schema, types))
        if not any(_fits(row, schema.since_version, bound) for row in _kernels(node.domain, node.op_type)):
            missing.append(f"{node.op_type} {bound}")
    for value in model.graph.output:
        assert types[value.name] == _named(value.type.tensor_type.elem_type), f"{value.name} is {types[value.name]}"
    return sorted(missing)


def readers_of_shapes(path: Path) -> set[str]:
    """Operators that take a shape, which the processor holds: those that compute with it would run there."""
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {name for node in graph.node if node.op_type == "Shape" for name in node.output}
    return {node.op_type for node in graph.node if shapes & set(node.input)}


def _bound(node: onnx.NodeProto, schema: Any, types: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The type of every parameter of the schema, by the parameter's name and its type's; those of outputs are found on the way."""
    known: dict[str, str] = {}
    for name, formal in zip(node.input, _formal(schema.inputs, len(node.input)), strict=True):
        if name:
            known[formal.typeStr] = known[formal.name] = types[name]
    for name, formal in zip(node.output, _formal(schema.outputs, len(node.output)), strict=True):
        if node.op_type == "Cast":
            [to] = [a.i for a in node.attribute if a.name == "to"]
            known[formal.typeStr] = _named(to)
        elif formal.typeStr.startswith("tensor("):
            known[formal.typeStr] = _plain(formal.typeStr)
        elif node.op_type in ("Shape", "Less", "LessOrEqual", "Equal"):
            known[formal.typeStr] = "int64" if node.op_type == "Shape" else "bool"
        types[name] = known[formal.typeStr]
    yield from known.items()


def _formal(parameters: Any, n: int) -> list[Any]:
    """The last one of a variadic operator stands for all that follow."""
    return [parameters[min(i, len(parameters) - 1)] for i in range(n)]


def _fits(row: list[Any], version: int, bound: dict[str, str]) -> bool:
    """As ONNX Runtime's `KernelRegistry`: an open range is for the operator's version at its beginning only."""
    _, _, first, last, types = row
    serves = first == version or (last is not None and first <= version <= last)
    return serves and all(bound[name] in those for name, those in types.items() if name in bound)


@cache
def _schemas() -> dict[tuple[str, str], list[Any]]:
    """Every version of every operator, the newest first."""
    found: dict[tuple[str, str], list[Any]] = {}
    for schema in sorted(runtime.get_all_operator_schema(), key=lambda s: -s.since_version):
        found.setdefault((schema.domain, schema.name), []).append(schema)
    return found


@cache
def _kernels(domain: str, operator: str) -> list[list[Any]]:
    return [row for row in json.loads(_TABLE.read_text())["kernels"] if row[:2] == [domain, operator]]


def _named(code: int) -> str:
    return "bfloat16" if code == TensorProto.BFLOAT16 else str(helper.tensor_dtype_to_np_dtype(code).name)


def _plain(kind: str) -> str:
    inner = kind.removeprefix("tensor(").removesuffix(")")
    return _NAMES.get(inner, inner)
