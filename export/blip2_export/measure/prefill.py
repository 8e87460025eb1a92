"""What a bundle's prefill takes at least: its graphs alone in ONNX Runtime, every input and output bound before the clock starts.

A process of its own (`python -m blip2_export.measure.prefill`), so that no other pool of threads spins beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

_CAPACITY_STEP = 64  # as the engine's buffers


def times(bundle: Path, n_positions: int, n_new: int, n_threads: int, n_runs: int) -> list[float]:
    """Milliseconds of prefills of `n_positions` with room for `n_new` tokens, measured in a new process."""
    package = Path(__file__).parents[2]
    numbers = [str(n) for n in (n_positions, n_new, n_threads, n_runs)]
    command = [sys.executable, "-m", "blip2_export.measure.prefill", str(bundle.absolute()), *numbers]
    done = subprocess.run(command, cwd=package, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{bundle}: its graphs do not run alone: {done.stderr.strip()}")
    return json.loads(done.stdout)


class _Prefill:
    """The graphs of a prefill with one row, in the order in which they run."""

    def __init__(self, bundle: Path, n_positions: int, n_new: int, n_threads: int) -> None:
        facts = json.loads((bundle / "bundle.json").read_text())
        self._graphs, cache = facts["graphs"], facts["language"]["kv_cache"]
        encodes = "encoder" in self._graphs
        self._values: dict[str, ort.OrtValue] = {}
        self._written_in_place = {
            cache[f"present_{side}"].format(layer): cache[f"past_{side}"].format(layer)
            for layer in range(cache["n_layers"])
            for side in ("key", "value")
        }
        n_read = 1 if encodes else n_positions
        capacity = -(-(n_read + n_new) // _CAPACITY_STEP) * _CAPACITY_STEP
        sizes = {"batch": 1, "n_logits": 1, "n_encoder": n_positions, "capacity": capacity}
        options = ort.SessionOptions()
        options.intra_op_num_threads = n_threads
        lengths = [("encoder", n_positions)] * encodes + [("decoder", n_read)]
        self._bound = []
        for name, length in lengths:
            session = ort.InferenceSession(bundle / self._graphs[name]["file"], options)
            self._bound.append((session, self._bind(session, name, {**sizes, "sequence": length})))
            self._values.pop("inputs_embeds")

    def run(self) -> float:
        start = time.perf_counter()
        for session, binding in self._bound:
            session.run_with_iobinding(binding)
        return (time.perf_counter() - start) * 1e3

    def _bind(self, session: ort.InferenceSession, graph: str, sizes: dict[str, int]) -> ort.IOBinding:
        """What one graph gives and another one takes under the same name, or the cache in place, is the same buffer."""
        binding = session.io_binding()
        for value in self._graphs[graph]["inputs"]:
            binding.bind_ortvalue_input(value["name"], self._buffer(value["name"], value, sizes))
        for value in self._graphs[graph]["outputs"]:
            name = self._written_in_place.get(value["name"], value["name"])
            binding.bind_ortvalue_output(value["name"], self._buffer(name, value, sizes))
        return binding

    def _buffer(self, name: str, value: dict[str, Any], sizes: dict[str, int]) -> ort.OrtValue:
        if name not in self._values:
            shape = [sizes.get(axis, axis) for axis in value["shape"]]
            filled = _filled(name, shape, sizes).astype(value["dtype"])
            self._values[name] = ort.OrtValue.ortvalue_from_numpy(filled)
        return self._values[name]


def _filled(name: str, shape: list[int], sizes: dict[str, int]) -> np.ndarray:
    """An input of a prefill of one row; what is not known by name is a buffer of zeros."""
    length = sizes["sequence"]
    match name:
        case "inputs_embeds":
            return np.random.default_rng(0).standard_normal(shape)
        case "position_ids":
            return np.arange(length)[None]
        case "seqlens_k" | "logits_at":
            return np.full(shape, length - 1)
        case "total_sequence_length":
            return np.full(shape, length)
        case "lengths" | "encoder_lengths":
            return np.full(shape, sizes["n_encoder"])
    return np.zeros(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    for name in ("n_positions", "n_new", "n_threads", "n_runs"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    prefill = _Prefill(args.bundle, args.n_positions, args.n_new, args.n_threads)
    prefill.run()
    print(json.dumps([prefill.run() for _ in range(args.n_runs)]))


if __name__ == "__main__":
    main()
