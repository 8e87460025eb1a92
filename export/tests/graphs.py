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

    def queries(self, features: np.ndarray, questions: list[list[int]] | None = None) -> np.ndarray:
        """Of all rows in one batch; questions of unequal length are padded on the right."""
        feeds = {"image_features": features}
        if questions is not None:
            longest = max(map(len, questions))
            pad = self.facts["qformer"]["text"]["pad"]
            feeds["question_ids"] = np.array([q + [pad] * (longest - len(q)) for q in questions], np.int64)
            feeds["question_mask"] = np.array([[i < len(q) for i in range(longest)] for q in questions], np.int64)
        return self.sessions["qformer"].run(None, feeds)[0]

    def greedy(self, queries: np.ndarray, prompts: list[list[int]], n_new: int) -> tuple[np.ndarray, list[list[int]]]:
        """First logits [rows, vocab] and `n_new` greedy tokens of every row (ended by the end token), all rows in one batch."""
        embeds, lengths = self._prefixes(queries, prompts)
        if self.facts["family"] == "encoder_decoder":
            seen = self.encode(embeds, lengths)
            start = [[self.facts["language"]["token_ids"]["decoder_start"]]] * len(prompts)
            embeds, lengths = self._prefixes(np.zeros((len(prompts), 0, queries.shape[2]), np.float32), start)
        else:
            seen = {}
        past = self.empty_cache(len(prompts), int(lengths.max()) + n_new)
        positions = np.tile(np.arange(embeds.shape[1]), (len(prompts), 1))
        first = self.decode(embeds, positions, lengths, lengths[:, None] - 1, past, seen)[:, 0]
        logits, out, done = first, [[] for _ in prompts], np.zeros(len(prompts), bool)
        for _ in range(n_new):
            tokens = logits.argmax(-1)
            for i in np.flatnonzero(~done):
                out[i].append(int(tokens[i]))
                done[i] = tokens[i] in self.facts["language"]["token_ids"]["eos"]
            if done.all():
                break
            lengths = lengths + 1
            new, at = self.table[tokens][:, None].astype(np.float32), np.zeros((len(prompts), 1))
            logits = self.decode(new, lengths[:, None] - 1, lengths, at, past, seen)[:, 0]
        return first, out

    def encode(self, embeds: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """The decoder's inputs about the encoder's side: cross-attention keys and values, and how many are real."""
        session = self.sessions["encoder"]
        values = session.run(None, {"inputs_embeds": embeds, "lengths": lengths.astype(np.int32)})
        names = (output.name for output in session.get_outputs())
        return {"encoder_lengths": lengths.astype(np.int32), **dict(zip(names, values, strict=True))}

    def empty_cache(self, rows: int, capacity: int) -> dict[str, ort.OrtValue]:
        """Buffers full of a number that would show in the logits if it were read."""
        cache = self.facts["language"]["kv_cache"]
        shape = (rows, cache["n_heads"], capacity, cache["head_dim"])
        return {
            cache[f"past_{p}"].format(i): ort.OrtValue.ortvalue_from_numpy(np.full(shape, 7.0, np.float32))
            for i in range(cache["n_layers"])
            for p in ("key", "value")
        }

    def decode(
        self,
        embeds: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        at: np.ndarray,
        past: dict[str, ort.OrtValue],
        seen: dict[str, np.ndarray],
    ) -> np.ndarray:
        """Logits [rows, n_logits, vocab] of new positions; the cache changes in place."""
        session = self.sessions["decoder"]
        binding = session.io_binding()
        feeds = {
            "inputs_embeds": np.ascontiguousarray(embeds),
            "position_ids": np.ascontiguousarray(positions, np.int64),
            "seqlens_k": (lengths - 1).astype(np.int32),
            "total_sequence_length": np.array(lengths.max(), np.int32),
            "logits_at": np.ascontiguousarray(at, np.int64),
            **seen,
        }
        binding.bind_output("logits")  # first, so that it is the first of the outputs
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    def _prefixes(self, queries: np.ndarray, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Queries and prompt embeddings of each row, padded on the right, with the real lengths."""
        n_queries = queries.shape[1]
        lengths = np.array([n_queries + len(p) for p in prompts])
        embeds = np.zeros((len(prompts), int(lengths.max()), queries.shape[2]), np.float32)
        for i, prompt in enumerate(prompts):
            embeds[i, :n_queries] = queries[i]
            embeds[i, n_queries : lengths[i]] = self.table[prompt].astype(np.float32)
        return embeds, lengths
