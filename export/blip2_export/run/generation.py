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
        self, queries: np.ndarray, prompts: list[list[int]], n_new: int
    ) -> tuple[Slots, np.ndarray, np.ndarray]:
        """The cache with room for `n_new` tokens a row, logits [rows, vocab] behind the prompts, and the rows' lengths."""
        seen, opening, ids = self._opening(queries, prompts)
        lengths = np.array(list(map(len, ids))) + (0 if opening is None else opening.shape[1])
        slots = self.slots(len(ids), int(lengths.max()) + n_new, seen=seen)
        positions = np.tile(np.arange(lengths.max()), (len(ids), 1))
        logits = slots.run(padded(ids, 0), positions, lengths, lengths[:, None] - 1, opening)[:, 0]
        return slots, logits, lengths

    def forced(self, queries: np.ndarray, prompt: list[int], text: list[int]) -> np.ndarray:
        """Logits [tokens, vocab] at every place of a text behind a prompt, all of it read at once."""
        seen, opening, (start,) = self._opening(queries[None], [prompt])
        first = len(start) - 1 + (0 if opening is None else opening.shape[1])
        length = first + len(text)
        slots = self.slots(1, length, 0, seen)
        at = np.arange(first, length)[None]
        return slots.run(np.array([start + text[:-1]]), np.arange(length)[None], np.array([length]), at, opening)[0]

    def _opening(
        self, queries: np.ndarray, prompts: list[list[int]]
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None, list[list[int]]]:
        """What the decoder sees of an encoder, and the queries and ids that it reads first."""
        if self.facts["family"] != "encoder_decoder":
            return {}, queries, prompts
        start = [self.facts["language"]["token_ids"]["decoder_start"]]
        return self.encode(queries, prompts), None, [start] * len(prompts)

    def encode(self, queries: np.ndarray, prompts: list[list[int]]) -> dict[str, np.ndarray]:
        """Of every row the decoder's inputs about the encoder's side: keys and values, and how many are real."""
        lengths = np.array([queries.shape[1] + len(p) for p in prompts], np.int32)
        values = self.run("encoder", queries=queries, input_ids=padded(prompts, 0), lengths=lengths)
        return {"encoder_lengths": lengths, **values}

    def slots(self, n_rows: int, capacity: int, n_idle: int = 2, seen: dict[str, np.ndarray] | None = None) -> Slots:
        return Slots(self, n_rows, capacity, n_idle, seen)
