"""A decoder's cache and a run over it: rows lie in slots, of which there are more, and in no order."""

from __future__ import annotations

import numpy as np

from blip2_export.run.sessions import Bundle

FILL = 7.0  # shows in the logits if anything reads what no row wrote


class Slots:
    """Buffers of `n_rows` rows and some idle slots. `seen`: what the encoder gave for each row."""

    def __init__(
        self, bundle: Bundle, n_rows: int, capacity: int, n_idle: int = 2, seen: dict[str, np.ndarray] | None = None
    ) -> None:
        self._session, self._place, self.n = bundle.session("decoder"), bundle.place, n_rows + n_idle
        self.of_rows = np.random.default_rng(n_rows).permutation(self.n)[:n_rows]
        cache, dtypes = bundle.facts["language"]["kv_cache"], self._session.dtypes
        shape = (self.n, cache["n_heads"], capacity, cache["head_dim"])
        names = [cache[f"past_{p}"].format(i) for i in range(cache["n_layers"]) for p in ("key", "value")]
        self.past = {name: self._place.keep(np.full(shape, FILL, dtypes[name])) for name in names}
        self._seen = {
            name: self._place.keep(self._spread(v.astype(dtypes.get(name, v.dtype)), 1 if v.ndim == 1 else FILL))
            for name, v in (seen or {}).items()
        }
        inputs = {said["name"]: said["shape"] for said in bundle.facts["graphs"]["decoder"]["inputs"]}
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
        into = {name.replace("past_key_values", "present"): name for name in self.past}
        return self._session.run_in_place(feeds, self._seen | self.past, into)

    def _spread(self, rows: np.ndarray, idle: float) -> np.ndarray:
        """What belongs to rows, for every slot."""
        slots = np.full((self.n, *rows.shape[1:]), idle, rows.dtype)
        slots[self.of_rows] = rows
        return slots
