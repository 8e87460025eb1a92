"""The `floor` command: what every stage of a bundle must take at least on this machine, beside what the engine takes.

The least time of a node is that of its multiplications at the fastest rate of ONNX Runtime's kernels, or of reading its weights,
whichever is longer; of a stage it is the sum over its nodes. What attends to the cache or has no weights counts as nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip2_export import processors
from blip2_export.engine import run_engine
from blip2_export.measure import kernels, machine, samples
from blip2_export.measure.work import SAMPLES, count

_CAPACITY = 64
_PRODUCTS = (
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulNBits",
)


@dataclass(frozen=True)
class Node:
    """What one node of a graph computes and reads."""

    n_operations: float
    n_bytes: float
    is_int8: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", help="without one: the machine's limits and every precision")
    parser.add_argument("--engine", type=Path, default=Path("target/release/blip2"), help="default: %(default)s")
    parser.add_argument(
        "--threads", type=count(1), default=processors.count(), metavar="N", help="default: one a processor"
    )
    parser.add_argument("--tokens", type=count(2), default=20, metavar="N", help="to write (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    described = machine.describe(args.threads, "onnxruntime")
    limits = kernels.limits(args.threads)
    described["float32"] = f"{limits.float32 / 1e9:.0f} G operations/s"
    described["int8"] = f"{limits.int8 / 1e9:.0f} G operations/s"
    described["memory"] = f"{limits.bytes_read / 1e9:.1f} GB/s"
    print("\n".join(f"{name}: {value}" for name, value in described.items()) + "\n")
    print(_precisions(args.threads) if args.bundle is None else _stages(args, limits))
    return 0


def _precisions(n_threads: int) -> str:
    """Milliseconds, and times as fast as float32."""
    found = kernels.by_precision(n_threads)
    exact = next(iter(found.values()))
    head = ["1024×4096, ms (float32's / its)", *(f"{rows} rows" for rows in kernels.ROWS)]
    cells = [
        [name, *(f"{1e3 * one:.3f} ({of / one:.2f})" for one, of in zip(times, exact, strict=True))]
        for name, times in found.items()
    ]
    return samples.table(head, cells)


def _stages(args: argparse.Namespace, limits: kernels.Limits) -> str:
    facts = json.loads((args.bundle / "bundle.json").read_text())
    measured = _measured(args) if "caption" in facts["tasks"] else {}
    rows = []
    for stage, nodes in stages(args.bundle, facts):
        floor = 1e3 * sum(limits.seconds(node.n_operations, node.n_bytes, node.is_int8) for node in nodes)
        n_operations, n_bytes = (
            sum(values) for values in zip(*((n.n_operations, n.n_bytes) for n in nodes), strict=True)
        )
        taken = [f"{measured[stage]:.2f}", f"{measured[stage] / floor:.2f}"] if stage in measured else ["–", "–"]
        rows.append([stage, f"{n_operations / 1e9:.2f}", f"{n_bytes / 1e6:.1f}", f"{floor:.2f}", *taken])
    return samples.table(["", "G operations", "MB of weights", "floor, ms", "engine, ms", "engine / floor"], rows)


def stages(bundle: Path, facts: dict[str, Any]) -> Iterator[tuple[str, list[Node]]]:
    """The nodes of every stage of a caption of one picture without a prompt of words."""
    n_queries, language = facts["qformer"]["n_queries"], facts.get("language")
    one = dict.fromkeys(("batch", "rows", "slots", "n_logits", "n_tokens", "question"), 1)
    sizes = {
        **one,
        "n_queries": n_queries,
        "sequence": n_queries + 1,
        "n_encoder": n_queries + 1,
        "capacity": _CAPACITY,
    }
    sizes["capacity"] += n_queries
    step = {**sizes, "n_queries": 0, "sequence": 1}
    graphs = facts["graphs"]
    yield "vision", list(nodes(bundle, graphs["vision"], sizes))
    yield "qformer", list(nodes(bundle, graphs["qformer"], sizes))
    if language and "encoder" in graphs:
        yield "prefill", [*nodes(bundle, graphs["encoder"], sizes), *nodes(bundle, graphs["decoder"], step)]
    elif language and facts["family"] == "decoder_only":
        yield "prefill", list(nodes(bundle, graphs["decoder"], sizes))
    if language:
        yield "step", list(nodes(bundle, graphs["decoder"], step))


def nodes(bundle: Path, graph: dict[str, Any], sizes: dict[str, int]) -> Iterator[Node]:
    """Of a run of one graph, as ONNX Runtime's profile tells of it."""
    shapes = {value["name"]: [sizes.get(axis, axis) for axis in value["shape"]] for value in graph["inputs"]}
    types = {value["name"]: value["dtype"] for value in graph["inputs"]}
    with tempfile.TemporaryDirectory() as folder:
        opened = kernels.session(str(bundle / graph["file"]), 1, str(Path(folder) / "profile"))
        opened.run(None, {name: filled(name, shape, sizes).astype(types[name]) for name, shape in shapes.items()})
        events = json.loads(Path(opened.end_profiling()).read_text())
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            yield _node(event["args"])


def filled(name: str, shape: list[int], sizes: dict[str, int]) -> np.ndarray:
    """An input of a prefill of one row; what is not known by name is a buffer of zeros."""
    match name:
        case "queries":
            return np.random.default_rng(0).standard_normal(shape)
        case "input_ids" | "position_ids":
            return np.arange(shape[1])[None]
        case "seqlens_k" | "logits_at":
            return np.full(shape, sizes["sequence"] - 1)
        case "total_sequence_length":
            return np.full(shape, sizes["sequence"])
        case "lengths" | "encoder_lengths":
            return np.full(shape, sizes["n_encoder"])
    return np.zeros(shape)


def _node(said: dict[str, Any]) -> Node:
    kind, inputs = (
        said["op_name"],
        [(dtype, shape) for value in said["input_type_shape"] for dtype, shape in value.items()],
    )
    n_outputs = math.prod(next(iter(said["output_type_shape"][0].values()))) if said["output_type_shape"] else 0
    is_int8 = kind == "MatMulNBits" or any("int8" in dtype for dtype, _ in inputs)
    n_bytes = 0 if kind == "Gather" else int(said["parameter_size"])  # it reads the rows that are chosen
    if kind in _PRODUCTS:
        return Node(2 * n_outputs * inputs[0][1][-1], n_bytes, is_int8)
    if kind == "Conv":
        return Node(2 * n_outputs * math.prod(inputs[1][1][1:]), n_bytes, is_int8)
    if kind == "MultiHeadAttention":
        (_, query), (_, key) = inputs[:2]
        return Node(4 * math.prod(query) * key[-2], n_bytes, False)
    return Node(0, n_bytes, False)


def _measured(args: argparse.Namespace) -> dict[str, float]:
    """Medians of the engine's own times, of every sample picture but the first, which warms up."""
    pictures = [str(path) for path in sorted(SAMPLES.glob("*.png"))]
    n = str(args.tokens)
    typed = (
        "--json",
        "--model",
        str(args.bundle),
        "--provider",
        "cpu",
        "--threads",
        str(args.threads),
        "--beams",
        "1",
        "--batch",
        "1",
    )
    _, *lines = run_engine(args.engine, "caption", *typed, "--max-new-tokens", n, "--min-new-tokens", n, *pictures)
    found = {stage: [line["timings_ms"][stage] for line in lines] for stage in ("vision", "qformer", "prefill")}
    found["step"] = [gap for line in lines for gap in line["token_gaps_ms"]]
    return {stage: statistics.median(values) for stage, values in found.items()}
