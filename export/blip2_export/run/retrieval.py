"""Stage-1 bundles: the queries' keys and values stand first in the cache of what writes."""

from __future__ import annotations

import numpy as np

from blip2_export.run.sessions import Bundle
from blip2_export.run.slots import Slots


class Stage1Graphs(Bundle):
    """The graphs of a bundle of family `qformer`."""

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

    def written(self, seen: dict[str, np.ndarray], n_new: int) -> list[int]:
        """Greedy ids of one picture up to their end. `seen`: what `qformer` gave."""
        ids, n_queries = self.facts["language"]["token_ids"], self.facts["qformer"]["n_queries"]
        slots, tokens, new = self.slots_behind(seen, n_queries + n_new, 0), [], ids["bos"]
        while len(tokens) < n_new and new not in ids["eos"]:
            place = np.array([[len(tokens)]])
            new = int(
                slots.run(np.array([[new]]), place, n_queries + 1 + place[0], np.zeros_like(place))[0, 0].argmax()
            )
            tokens.append(new)
        return tokens

    def forced(self, seen: dict[str, np.ndarray], text: list[int]) -> np.ndarray:
        """Logits [tokens, vocab] at every place of a text, all of it read at once."""
        n_queries, at = self.facts["qformer"]["n_queries"], np.arange(len(text))[None]
        slots = self.slots_behind(seen, n_queries + len(text), 0)
        ids = np.array([[self.facts["language"]["token_ids"]["bos"], *text[:-1]]])
        return slots.run(ids, at, np.array([n_queries + len(text)]), at)[0]

    def slots(self, features: np.ndarray, capacity: int, n_idle: int = 2) -> Slots:
        """A row for each picture, whose queries stand in the cache."""
        return self.slots_behind(self.run("qformer", image_features=features), capacity, n_idle)

    def slots_behind(self, seen: dict[str, np.ndarray], capacity: int, n_idle: int = 2) -> Slots:
        """`seen`: what `qformer` gave for each row."""
        cache, slots = self.facts["language"]["kv_cache"], Slots(self, len(seen["query_states"]), capacity, n_idle)
        for i in range(cache["n_layers"]):
            for part in ("key", "value"):
                slots.put(cache[f"past_{part}"].format(i), seen[f"query.{i}.{part}"])
        return slots
