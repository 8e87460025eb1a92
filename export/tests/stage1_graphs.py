"""Runs the graphs of a stage-1 bundle with ONNX Runtime as the engine does: the queries' keys and values first in the cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from graphs import open_sessions
from place import Place
from slots import Slots


class Stage1Graphs:
    """The sessions of a bundle of family `qformer`."""

    def __init__(self, folder: Path, place: Place | None = None) -> None:
        self.folder, self.place = folder, place or Place()
        self.facts = json.loads((folder / "bundle.json").read_text())
        self.sessions = open_sessions(folder, self.facts, self.place)

    def run(self, graph: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        session = self.sessions[graph]
        return dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds), strict=True))

    def features(self, pixels: np.ndarray) -> np.ndarray:
        return self.run("vision", pixel_values=pixels)["image_features"]

    def write(self, features: np.ndarray, n_new: int, forced: list[int] | None = None) -> tuple[list, list]:
        """Greedy ids of all rows in one batch up to their ends, and the logits [vocab] of each step.

        With `forced`, the first call takes the start token and those ids at once; the operator does that for one slot only.
        """
        ids = self.facts["language"]["token_ids"]
        rows, n_queries = len(features), self.facts["qformer"]["n_queries"]
        new = np.tile([ids["bos"], *(forced or [])], (rows, 1))
        slots = self.slots(features, n_queries + new.shape[1] + n_new, 0 if forced else 2)
        tokens: list[list[int]] = [[] for _ in range(rows)]
        steps: list[list[np.ndarray]] = [[] for _ in range(rows)]
        live, start = np.arange(rows), 0
        for _ in range(n_new):
            positions = np.tile(np.arange(start, start + new.shape[1]), (len(live), 1))
            start += new.shape[1]
            lengths, last = np.full(len(live), n_queries + start), np.full((len(live), 1), new.shape[1] - 1)
            logits = slots.run(new, positions, lengths, last)[:, 0]
            picks = logits.argmax(-1)
            for row, step, pick in zip(live, logits, picks, strict=True):
                steps[row].append(step)
                tokens[row].append(int(pick))
            going = ~np.isin(picks, ids["eos"])
            if not going.any():
                break
            slots.keep(going)
            live, new = live[going], picks[going, None]
        return tokens, [np.stack(s) for s in steps]

    def slots(self, features: np.ndarray, capacity: int, n_idle: int = 2) -> Slots:
        """A row for each picture, whose queries stand in the cache."""
        cache, seen = self.facts["language"]["kv_cache"], self.run("qformer", image_features=features)
        slots = Slots(self, len(features), capacity, n_idle)
        for i in range(cache["n_layers"]):
            for part in ("key", "value"):
                slots.put(cache[f"past_{part}"].format(i), seen[f"query.{i}.{part}"])
        return slots
