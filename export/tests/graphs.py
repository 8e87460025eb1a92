"""Runs a bundle's graphs with ONNX Runtime the way the engine does: right-padded prefill, then steps with the cache in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from place import Place
from slots import Slots


def open_sessions(folder: Path, facts: dict[str, Any], place: Place) -> dict[str, ort.InferenceSession]:
    """Those of all graphs, whose inputs and outputs are the ones that `bundle.json` says."""
    sessions = {}
    for name, said in facts["graphs"].items():
        session = place.session(folder / said["file"])
        assert [v.name for v in session.get_inputs()] == [v["name"] for v in said["inputs"]]
        assert [v.name for v in session.get_outputs()] == [v["name"] for v in said["outputs"]]
        sessions[name] = session
    return sessions


def padded(rows: list[list[int]], pad: int) -> np.ndarray:
    """Rows of ids with padding on the right."""
    longest = max(map(len, rows))
    return np.array([row + [pad] * (longest - len(row)) for row in rows], np.int64)


def table_type(folder: Path) -> int:
    """How the decoder stores the embeddings of tokens."""
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    table = next(node.input[0] for node in graph.node if "input_ids" in node.input)
    return next(tensor.data_type for tensor in graph.initializer if tensor.name == table)


class Graphs:
    """The sessions of a bundle with a language model."""

    def __init__(self, folder: Path, place: Place | None = None) -> None:
        self.place = place or Place()
        self.facts = json.loads((folder / "bundle.json").read_text())
        self.sessions = open_sessions(folder, self.facts, self.place)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        return self.sessions["vision"].run(None, {"pixel_values": pixels})[0]

    def queries(self, features: np.ndarray, questions: list[list[int]] | None = None) -> np.ndarray:
        """Of all rows in one batch; questions of unequal length are padded on the right."""
        feeds = {"image_features": features}
        if questions is not None:
            feeds["question_ids"] = padded(questions, self.facts["qformer"]["text"]["pad"])
            n_tokens = np.array(list(map(len, questions)))
            feeds["question_mask"] = (np.arange(n_tokens.max()) < n_tokens[:, None]).astype(np.int64)
        return self.sessions["qformer"].run(None, feeds)[0]

    def greedy(self, queries: np.ndarray, prompts: list[list[int]], n_new: int) -> tuple[np.ndarray, list[list[int]]]:
        """First logits [rows, vocab] and up to `n_new` greedy tokens of every row; rows leave behind their end token."""
        opening: np.ndarray | None = queries
        seen: dict[str, np.ndarray] = {}
        if self.facts["family"] == "encoder_decoder":
            seen, opening = self.encode(queries, prompts), None
            prompts = [[self.facts["language"]["token_ids"]["decoder_start"]]] * len(prompts)
        ids = padded(prompts, 0)
        lengths = np.array(list(map(len, prompts))) + (0 if opening is None else opening.shape[1])
        slots = self.slots(len(prompts), int(lengths.max()) + n_new, seen=seen)
        positions = np.tile(np.arange(lengths.max()), (len(prompts), 1))
        logits = first = slots.run(ids, positions, lengths, lengths[:, None] - 1, opening)[:, 0]
        live, written = np.arange(len(prompts)), [[] for _ in prompts]
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

    def encode(self, queries: np.ndarray, prompts: list[list[int]]) -> dict[str, np.ndarray]:
        """Of every row the decoder's inputs about the encoder's side: keys and values, and how many are real."""
        session = self.sessions["encoder"]
        lengths = np.array([queries.shape[1] + len(p) for p in prompts], np.int32)
        values = session.run(None, {"queries": queries, "input_ids": padded(prompts, 0), "lengths": lengths})
        names = (output.name for output in session.get_outputs())
        return {"encoder_lengths": lengths, **dict(zip(names, values, strict=True))}

    def slots(self, n_rows: int, capacity: int, n_idle: int = 2, seen: dict[str, np.ndarray] | None = None) -> Slots:
        return Slots(self, n_rows, capacity, n_idle, seen)
