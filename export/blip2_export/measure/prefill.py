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

_CAPACITY_STEP = 64  # as the engine's slots


def times(bundle: Path, n_tokens: int, n_new: int, n_threads: int, n_runs: int) -> list[float]:
    """Milliseconds of prefills of `n_tokens` behind the queries with room for `n_new`, measured in a new process."""
    package = Path(__file__).parents[2]
    numbers = [str(n) for n in (n_tokens, n_new, n_threads, n_runs)]
    command = [sys.executable, "-m", "blip2_export.measure.prefill", str(bundle.absolute()), *numbers]
    done = subprocess.run(command, cwd=package, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{bundle}: its graphs do not run alone: {done.stderr.strip()}")
    return json.loads(done.stdout)


class _Prefill:
    """The graphs of a prefill of one row in one slot, in the order in which they run."""

    def __init__(self, bundle: Path, n_tokens: int, n_new: int, n_threads: int) -> None:
        facts = json.loads((bundle / "bundle.json").read_text())
        self._graphs, cache = facts["graphs"], facts["language"]["kv_cache"]
        self._values: dict[str, ort.OrtValue] = {}
        self._written_in_place = {
            cache[f"present_{side}"].format(layer): cache[f"past_{side}"].format(layer)
            for layer in range(cache["n_layers"])
            for side in ("key", "value")
        }
        n_queries = facts["qformer"]["n_queries"]
        prompt = {"n_queries": n_queries, "n_tokens": n_tokens, "sequence": n_queries + n_tokens}
        start = {"n_tokens": 1, "sequence": 1}  # behind an encoder, the decoder reads what a text begins with
        reads = {"encoder": prompt, "decoder": start} if "encoder" in self._graphs else {"decoder": prompt}
        capacity = -(-(reads["decoder"]["sequence"] + n_new) // _CAPACITY_STEP) * _CAPACITY_STEP
        ones = dict.fromkeys(("batch", "rows", "slots", "n_logits"), 1)
        shared = {**ones, "n_encoder": prompt["sequence"], "capacity": capacity}
        options = ort.SessionOptions()
        options.intra_op_num_threads = n_threads
        self._bound = []
        for name, read in reads.items():
            session = ort.InferenceSession(bundle / self._graphs[name]["file"], options)
            self._bound.append((session, self._bind(session, name, {**shared, **read})))
            self._values.pop("input_ids")

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
            values = filled(name, shape, sizes).astype(value["dtype"])
            self._values[name] = ort.OrtValue.ortvalue_from_numpy(values)
        return self._values[name]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    for name in ("n_tokens", "n_new", "n_threads", "n_runs"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    prefill = _Prefill(args.bundle, args.n_tokens, args.n_new, args.n_threads)
    prefill.run()
    print(json.dumps([prefill.run() for _ in range(args.n_runs)]))


if __name__ == "__main__":
    main()
