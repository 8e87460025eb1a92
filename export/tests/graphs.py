"""Runs a bundle's graphs with ONNX Runtime the way the engine does: right-padded prefill, then steps with the cache in place."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort


class Graphs:
    """The sessions of a bundle."""

    def __init__(self, folder: Path) -> None:
        self.facts = json.loads((folder / "bundle.json").read_text())
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {
            name: ort.InferenceSession(str(folder / g["file"]), options, providers=["CPUExecutionProvider"])
            for name, g in self.facts["graphs"].items()
        }
        language = self.facts["language"]
        where = language["embedding"]
        dtype = ml_dtypes.bfloat16 if where["dtype"] == "bfloat16" else np.dtype(where["dtype"])
        self.table = np.fromfile(
            folder / where["file"], dtype, int(np.prod(where["shape"])), offset=where["offset"]
        ).reshape(where["shape"])

    def features(self, pixels: np.ndarray) -> np.ndarray:
        return self.sessions["vision"].run(None, {"pixel_values": pixels})[0]

    def queries(self, features: np.ndarray) -> np.ndarray:
        return self.sessions["qformer"].run(None, {"image_features": features})[0]

    def greedy(self, queries: np.ndarray, prompts: list[list[int]], n_new: int) -> tuple[np.ndarray, list[list[int]]]:
        """First logits [rows, vocab] and `n_new` greedy tokens of every row (ended by the end token), all rows in one batch."""
        cache = self.facts["language"]["kv_cache"]
        rows, n_queries = len(prompts), queries.shape[1]
        lengths = np.array([n_queries + len(p) for p in prompts])
        longest = int(lengths.max())
        embeds = np.zeros((rows, longest, queries.shape[2]), np.float32)
        for i, prompt in enumerate(prompts):
            embeds[i, :n_queries] = queries[i]
            embeds[i, n_queries : lengths[i]] = self.table[prompt].astype(np.float32)
        shape = (rows, cache["n_heads"], longest + n_new, cache["head_dim"])
        past = {
            cache[f"past_{p}"].format(i): ort.OrtValue.ortvalue_from_numpy(np.full(shape, 7.0, np.float32))
            for i in range(cache["n_layers"])
            for p in ("key", "value")
        }
        positions = np.tile(np.arange(longest), (rows, 1))
        first = self._run(embeds, positions, lengths, lengths - 1, past)
        logits, out, done = first, [[] for _ in prompts], np.zeros(rows, bool)
        for _ in range(n_new):
            tokens = logits.argmax(-1)
            for i in np.flatnonzero(~done):
                out[i].append(int(tokens[i]))
                done[i] = tokens[i] in self.facts["language"]["token_ids"]["eos"]
            if done.all():
                break
            lengths = lengths + 1
            logits = self._run(
                self.table[tokens][:, None].astype(np.float32), lengths[:, None] - 1, lengths, np.zeros(rows), past
            )
        return first, out

    def _run(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        at: np.ndarray,
        past: dict[str, ort.OrtValue],
    ) -> np.ndarray:
        session = self.sessions["decoder"]
        binding = session.io_binding()
        feeds = {
            "inputs_embeds": np.ascontiguousarray(embeds),
            "position_ids": np.ascontiguousarray(positions, np.int64),
            "seqlens_k": (lengths - 1).astype(np.int32),
            "total_sequence_length": np.array(lengths.max(), np.int32),
            "logits_at": np.ascontiguousarray(at[:, None], np.int64),
        }
        binding.bind_output("logits")  # first, so that it is the first of the outputs
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0][:, 0]
