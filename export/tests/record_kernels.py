"""Writes `cuda_kernels.json`: which types ONNX Runtime's CUDA provider has kernels for, as its own registry says.

`python record_kernels.py`, with `onnxruntime-gpu` of the version in `export/runtime.txt` and the CUDA libraries that it loads. No
GPU takes part: libraries that have the symbols and do nothing will do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime

TABLE = Path(__file__).with_name("cuda_kernels.json")
_PROVIDER = "CUDAExecutionProvider"
_NAMES = {"float": "float32"}
_TYPES = {"float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"}
_OPERATORS = (
    "Add Cast Clip Concat Conv Div Equal Expand FusedMatMul Gather GatherElements GatherND Gelu GroupQueryAttention Identity "
    "LayerNormalization Less LessOrEqual MatMul MatMulNBits Max Mul MultiHeadAttention Pad QuickGelu ReduceL2 ReduceMean Relu "
    "Reshape RotaryEmbedding ScatterElements ScatterND Shape Sigmoid SimplifiedLayerNormalization Slice Softmax Split Sub "
    "Transpose Unsqueeze Where"
)
_LAST = 2**31 - 1  # the version up to which a kernel serves whose operator has no newer one


def main() -> None:
    found = [kernel for kernel in runtime.get_all_opkernel_def() if kernel.provider == _PROVIDER]
    if not found:
        raise SystemExit("this ONNX Runtime has no CUDA provider, or cannot load it")
    rows = [
        _row(kernel)
        for kernel in found
        if kernel.op_name in _OPERATORS.split() and kernel.domain in ("", "com.microsoft")
    ]
    rows.sort(key=json.dumps)
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows if all(row[-1].values()))
    source = json.dumps(f"the kernel registry of onnxruntime-gpu {onnxruntime.__version__}")
    TABLE.write_text(f'{{"source": {source},\n"kernels": [\n{lines}\n]}}\n')


def _row(kernel: Any) -> list[Any]:
    """Domain, operator, first and last version, and the types of each parameter."""
    first, last = kernel.version_range
    types = {name: sorted(set(map(_name, those)) & _TYPES) for name, those in sorted(kernel.type_constraints.items())}
    return [kernel.domain, kernel.op_name, first, None if last == _LAST else last, types]


def _name(kind: str) -> str:
    """`float32` of `tensor(float)`."""
    inner = kind.removeprefix("tensor(").removesuffix(")")
    return _NAMES.get(inner, inner)


if __name__ == "__main__":
    main()
