"""How a bundle stores the embeddings of tokens."""

from __future__ import annotations

from pathlib import Path

import onnx


def table_type(folder: Path) -> int:
    """The type of the decoder's table."""
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    table = next(node.input[0] for node in graph.node if "input_ids" in node.input)
    return next(tensor.data_type for tensor in graph.initializer if tensor.name == table)
