"""Bundles with a language model: right-padded prefill, then steps with the cache in place."""

from __future__ import annotations

import numpy as np

from blip2_export.run.sessions import Bundle, padded, real
from blip2_export.run.slots import Slots


class Graphs(Bundle):
    """The graphs of a bundle with a language model."""

    def queries(self, features: np.ndarray, questions: list[list[int]] | None = None) -> np.ndarray:
        """Of all rows in one batch; questions of unequal length are padded on the right."""
        feeds = {"image_features": features}
        if questions is not None:
            feeds["question_ids"] = padded(questions, self.facts["qformer"]["text"]["pad"])
            feeds["question_mask"] = real(questions)
        return self.run("qformer", **feeds)["queries"]

    def greedy(self, queries: np.ndarray, prompts: list[list[int]], n_new: int) -> tuple[np.ndarray, list[list[int]]]:
        """First logits [rows, vocab] and up to `n_new` greedy tokens of every row; rows leave behind their end token."""
        slots, logits, lengths = self.prefill(queries, prompts, n_new)
        first, live, written = logits, np.arange(len(prompts)), [[] for _ in prompts]
        for _ in range(n_new):
            tokens = logits.argmax(-1)
            for row, token in zip(live, tokens, strict=True):
                written[row].append(int(token))
            going = ~np.isin(tokens, self.facts["language"]["token_ids"]["eos"])
            if not going.any():
                break
            slots.keep(going)
            live, lengths, new = live[going], lengths[going] + 1, tokens[going, None]
            logits = slots.run(new, lengths[:, None] - 1, lengths, np.zeros_like(new))[:, 0]
        return first, written

    def prefill(
        self, queries: np.ndarray, prompts: list[list[int]], n_new: int, n_idle: int = 2
    ) -> tuple[Slots, np.ndarray, np.ndarray]:
        """The cache with room for `n_new` tokens a row, logits [rows, vocab] behind the prompts, and the rows' lengths."""
        opening: np.ndarray | None = queries
        seen: dict[str, np.ndarray] = {}
        if self.facts["family"] == "encoder_decoder":
            seen, opening = self.encode(queries, prompts), None
            prompts = [[self.facts["language"]["token_ids"]["decoder_start"]]] * len(prompts)
        lengths = np.array(list(map(len, prompts))) + (0 if opening is None else opening.shape[1])
        slots = self.slots(len(prompts), int(lengths.max()) + n_new, n_idle, seen)
        positions = np.tile(np.arange(lengths.max()), (len(prompts), 1))
        logits = slots.run(padded(prompts, 0), positions, lengths, lengths[:, None] - 1, opening)[:, 0]
        return slots, logits, lengths

    def encode(self, queries: np.ndarray, prompts: list[list[int]]) -> dict[str, np.ndarray]:
        """Of every row the decoder's inputs about the encoder's side: keys and values, and how many are real."""
        lengths = np.array([queries.shape[1] + len(p) for p in prompts], np.int32)
        values = self.run("encoder", queries=queries, input_ids=padded(prompts, 0), lengths=lengths)
        return {"encoder_lengths": lengths, **values}

    def slots(self, n_rows: int, capacity: int, n_idle: int = 2, seen: dict[str, np.ndarray] | None = None) -> Slots:
        return Slots(self, n_rows, capacity, n_idle, seen)
