"""Runs the graphs of a stage-1 bundle with ONNX Runtime as the engine does: the queries' keys and values first in the cache."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort


class Stage1Graphs:
    """The sessions of a bundle of family `qformer`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = json.loads((folder / "bundle.json").read_text())
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {
            name: ort.InferenceSession(str(folder / g["file"]), options, providers=["CPUExecutionProvider"])
            for name, g in self.facts["graphs"].items()
        }
        for name, session in self.sessions.items():
            said = self.facts["graphs"][name]
            assert [v.name for v in session.get_inputs()] == [v["name"] for v in said["inputs"]]
            assert [v.name for v in session.get_outputs()] == [v["name"] for v in said["outputs"]]

    def run(self, graph: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        session = self.sessions[graph]
        return dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds), strict=True))

    def features(self, pixels: np.ndarray) -> np.ndarray:
        return self.run("vision", pixel_values=pixels)["image_features"]

    def write(self, features: np.ndarray, n_new: int, forced: list[int] | None = None) -> tuple[list, list]:
        """Greedy ids of all rows in one batch up to their ends, and the logits [vocab] of each step.

        With `forced`, the first call takes the start token and those ids at once; the operator does that for one row only.
        """
        cache = self.facts["language"]["kv_cache"]
        ids = self.facts["language"]["token_ids"]
        seen = self.run("qformer", image_features=features)
        rows, n_queries = len(features), self.facts["qformer"]["n_queries"]
        new = np.tile([ids["bos"], *(forced or [])], (rows, 1))
        capacity = n_queries + new.shape[1] + n_new
        past = {}
        for i in range(cache["n_layers"]):
            for part in ("key", "value"):
                buffer = np.full((rows, cache["n_heads"], capacity, cache["head_dim"]), 7.0, np.float32)
                buffer[:, :, :n_queries] = seen[f"query.{i}.{part}"]
                past[cache[f"past_{part}"].format(i)] = ort.OrtValue.ortvalue_from_numpy(buffer)
        tokens: list[list[int]] = [[] for _ in range(rows)]
        steps: list[list[np.ndarray]] = [[] for _ in range(rows)]
        done, start = np.zeros(rows, bool), 0
        for _ in range(n_new):
            logits = self._step(new, start, n_queries, past)
            start += new.shape[1]
            for row in np.flatnonzero(~done):
                steps[row].append(logits[row])
                tokens[row].append(int(logits[row].argmax()))
                done[row] = tokens[row][-1] in ids["eos"]
            if done.all():
                break
            new = logits.argmax(-1)[:, None]
        return tokens, [np.stack(s) for s in steps]

    def _step(self, ids: np.ndarray, start: int, n_queries: int, past: dict[str, ort.OrtValue]) -> np.ndarray:
        rows, length = ids.shape
        total = n_queries + start + length
        feeds = {
            "inputs_embeds": self._table()[ids].astype(np.float32),
            "position_ids": np.tile(np.arange(start, start + length), (rows, 1)),
            "seqlens_k": np.full(rows, total - 1, np.int32),
            "total_sequence_length": np.array(total, np.int32),
            "logits_at": np.full((rows, 1), length - 1),
        }
        session = self.sessions["decoder"]
        binding = session.io_binding()
        binding.bind_output("logits")
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)))
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0][:, 0]

    def _table(self) -> np.ndarray:
        where = self.facts["language"]["embedding"]
        dtype = ml_dtypes.bfloat16 if where["dtype"] == "bfloat16" else np.dtype(where["dtype"])
        count = int(np.prod(where["shape"]))
        return np.fromfile(self.folder / where["file"], dtype, count, offset=where["offset"]).reshape(where["shape"])
