"""A decoder's cache and a run over it: rows lie in slots, of which there are more, and in no order."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from place import Place

FILL = 7.0  # shows in the logits if anything reads what no row wrote


class Runnable(Protocol):
    """The graphs of a bundle, whatever its family."""

    facts: dict[str, Any]
    place: Place
    sessions: dict[str, ort.InferenceSession]


class Slots:
    """Buffers of `n_rows` rows and some idle slots. `seen`: what the encoder gave for each row."""

    def __init__(
        self, graphs: Runnable, n_rows: int, capacity: int, n_idle: int = 2, seen: dict[str, np.ndarray] | None = None
    ) -> None:
        facts, place = graphs.facts, graphs.place
        self._session, self._place, self.n = graphs.sessions["decoder"], place, n_rows + n_idle
        self.of_rows = np.random.default_rng(n_rows).permutation(self.n)[:n_rows]
        cache = facts["language"]["kv_cache"]
        shape = (self.n, cache["n_heads"], capacity, cache["head_dim"])
        names = [cache[f"past_{p}"].format(i) for i in range(cache["n_layers"]) for p in ("key", "value")]
        self.past = {name: place.keep(np.full(shape, FILL, np.float32)) for name in names}
        self._seen = {name: place.keep(self._spread(v, 1 if v.ndim == 1 else FILL)) for name, v in (seen or {}).items()}
        inputs = {said["name"]: said["shape"] for said in facts["graphs"]["decoder"]["inputs"]}
        self._no_queries = (0, inputs["queries"][2]) if "queries" in inputs else None

    def put(self, name: str, values: np.ndarray) -> None:
        """The first positions of every row in the cache tensor `name`."""
        whole = self._place.fetch(self.past[name])
        whole[self.of_rows, :, : values.shape[2]] = values
        self.past[name] = self._place.keep(whole)

    def keep(self, rows: np.ndarray) -> None:
        """The other rows leave, and their slots stay as they are."""
        self.of_rows = self.of_rows[rows]

    def run(
        self,
        ids: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
        at: np.ndarray,
        queries: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits [rows, n_logits, vocab] of new positions; the cache changes in place. `lengths`: of rows, afterwards."""
        n_rows = len(self.of_rows)
        if queries is None and self._no_queries:
            queries = np.zeros((n_rows, *self._no_queries), np.float32)
        feeds = {
            "input_ids": np.asarray(ids, np.int64),
            "position_ids": np.asarray(positions, np.int64),
            "seqlens_k": self._spread((lengths - 1).astype(np.int32), 0),
            "total_sequence_length": np.array(lengths.max(), np.int32),
            "slot_rows": self._spread(np.arange(n_rows), n_rows - 1),
            "row_slots": self.of_rows.astype(np.int64),
            "logits_at": np.asarray(at, np.int64),
            **({} if queries is None else {"queries": queries}),
        }
        binding = self._session.io_binding()
        binding.bind_output("logits")  # first, so that it is the first of the outputs
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(np.require(value, requirements="C")))
        for name, value in self._seen.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self.past.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    def _spread(self, rows: np.ndarray, idle: float) -> np.ndarray:
        """What belongs to rows, for every slot."""
        slots = np.full((self.n, *rows.shape[1:]), idle, rows.dtype)
        slots[self.of_rows] = rows
        return slots
