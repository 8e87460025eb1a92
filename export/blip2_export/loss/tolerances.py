"""How far a bundle with fewer bits may be from its recorded outputs. `blip2 verify` holds it to that.

What is measured here, with the recorded inputs themselves, is allowed twice over: products by rows are of whole numbers, which
every processor multiplies alike, and only the roundings before them differ; a kernel that overflows is many times further away. In
16 bits every device adds up in its own way, and by blocks rounds activations in its own way: there it is eight times as much. An
H200 came to seven times with random weights, and in bfloat16 to half of what is allowed where nothing can be measured.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from blip2_export.graphs.precision import Precision
from blip2_export.loss.measure import cosines, largest_error
from blip2_export.reference.golden import PIXELS
from blip2_export.run.generation import Graphs
from blip2_export.run.retrieval import Stage1Graphs
from blip2_export.run.sessions import Bundle, Place, UnrunnableError, alone

_FACTOR, _FACTORS = 8, {Precision.FLOAT32: 2, Precision.INT8: 2}
_EXACT = 1e-4  # the tolerance of float32
_MOST = 0.5  # what differs by more has nothing in common
_LEAST_ANGLE = 4e-6  # from a cosine of 1; float32 has hardly finer ones
_NO_DIRECTION = ("itm_logits", "itc")  # stages of two numbers
_SLACK = 0.05  # of the share of tokens: near ties fall either way
_UNMEASURED = {"error": 0.15, "cosine": 0.996, "agreement": 0.8}  # of graphs that cannot run where they are made


def loosen(folder: Path, place: Place) -> None:
    """Writes to a bundle's `golden.json` what may be lost where its graphs are no float32 ones."""
    path = folder / "golden" / "golden.json"
    golden, facts = (json.loads(file.read_text()) for file in (path, folder / "bundle.json"))
    try:
        allowed = _measured(folder, place, golden["cases"], facts)
    except UnrunnableError as error:
        print(f"golden: tolerances are not measured, for this processor does not run {error}", file=sys.stderr)
        allowed = _unmeasured(golden["tolerance"])
    path.write_text(json.dumps(golden | allowed, indent=1) + "\n")


def _measured(folder: Path, place: Place, cases: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    found = _Retrieval(folder, place) if facts["family"] == "qformer" else _Generation(folder, place)
    for case in cases:
        found.take(case)
    return found.allowed(max(_FACTORS.get(graph["precision"], _FACTOR) for graph in facts["graphs"].values()))


def _unmeasured(tolerance: dict[str, float]) -> dict[str, Any]:
    stages = [stage for stage in tolerance if stage != "pixels"]
    agreement = {"agreement": _UNMEASURED["agreement"]} if "first_logits" in stages else {}
    cosine = {stage: _UNMEASURED["cosine"] for stage in stages if stage not in _NO_DIRECTION}
    return {"tolerance": tolerance | dict.fromkeys(stages, _UNMEASURED["error"]), "cosine": cosine, **agreement}


class _Measured(ABC):
    """Every stage with the recorded input, and the tokens chosen from the picture on."""

    bundle: Bundle

    def __init__(self) -> None:
        self._errors: dict[str, float] = defaultdict(float)
        self._angles: dict[str, float] = defaultdict(float)
        self._chosen: list[bool] = []

    def allowed(self, factor: int) -> dict[str, Any]:
        """What `golden.json` says of a bundle with such losses."""
        tolerance = {stage: min(max(factor * e, _EXACT), _MOST) for stage, e in self._errors.items()}
        said: dict[str, Any] = {"tolerance": {"pixels": PIXELS, **{k: float(f"{v:.3e}") for k, v in tolerance.items()}}}
        lossy = [stage for stage in self._angles if tolerance[stage] > _EXACT]
        said["cosine"] = {stage: round(1 - max(factor * self._angles[stage], _LEAST_ANGLE), 7) for stage in lossy}
        if self._chosen:
            said["agreement"] = round(max(float(np.mean(self._chosen)) - _SLACK, 0), 4)
        return said

    def take(self, case: dict[str, Any]) -> None:
        seen = self.bundle.features(self.read(case["pixels"])[None])
        self.note("features", seen[0], self.read(case["features"]))
        self.behind(case, self.read(case["features"])[None], seen)

    @abstractmethod
    def behind(self, case: dict[str, Any], recorded: np.ndarray, seen: np.ndarray) -> None:
        """The other stages, with the recorded features and with those that the bundle sees itself."""

    def note(self, stage: str, found: np.ndarray, wanted: np.ndarray) -> None:
        self._errors[stage] = max(self._errors[stage], largest_error(found, wanted))
        if stage not in _NO_DIRECTION:
            self._angles[stage] = max(self._angles[stage], 1 - float(cosines(found, wanted).mean()))

    def choose(self, logits: np.ndarray, tokens: list[int]) -> None:
        self._chosen += list(logits.argmax(-1) == tokens)

    def read(self, recorded: dict[str, Any]) -> np.ndarray:
        return np.fromfile(self.bundle.folder / recorded["file"], "<f4").reshape(recorded["shape"])


class _Generation(_Measured):
    def __init__(self, folder: Path, place: Place) -> None:
        super().__init__()
        self.bundle = Graphs(folder, place)

    def behind(self, case: dict[str, Any], recorded: np.ndarray, seen: np.ndarray) -> None:
        run, prompt, tokens = self.bundle, case["prompt_ids"], case["tokens"]
        question = [case["question_ids"]] if "question_ids" in case else None
        queries = self.read(case["queries"])
        self.note("queries", run.queries(recorded, question)[0], queries)
        self.note("first_logits", run.forced(queries, prompt, tokens[:1])[0], self.read(case["first_logits"]))
        self.choose(run.forced(run.queries(seen, question)[0], prompt, tokens), tokens)


class _Retrieval(_Measured):
    def __init__(self, folder: Path, place: Place) -> None:
        super().__init__()
        self.bundle = Stage1Graphs(folder, place)

    def behind(self, case: dict[str, Any], recorded: np.ndarray, seen: np.ndarray) -> None:
        image = self.bundle.run("qformer", image_features=recorded)
        self.note("queries", image["query_states"][0], self.read(case["queries"]))
        if case["task"] == "match":
            self._match(case, recorded, seen)
        elif case["task"] == "embed":
            states = self._pair(recorded, case["input_ids"])["multimodal_states"][0]
            self.note("multimodal_states", states, self.read(case["multimodal_states"]))
            self.note("image_embeds", image["image_embeds"][0], self.read(case["image_embeds"]))
            self.note("text_embeds", self._pooled(case["input_ids"]), self.read(case["text_embeds"])[0])
        else:
            self.note("first_logits", self.bundle.forced(image, case["tokens"][:1])[0], self.read(case["first_logits"]))
            whole = self.bundle.run("qformer", image_features=seen)
            self.choose(self.bundle.forced(whole, case["tokens"]), case["tokens"])

    def _match(self, case: dict[str, Any], recorded: np.ndarray, seen: np.ndarray) -> None:
        embeds = self.bundle.run("qformer", image_features=seen)["image_embeds"][0]
        for text in case["texts"]:
            ids, wanted = text["input_ids"], np.array(text["itm_logits"])
            self.note("itm_logits", self._pair(recorded, ids)["itm_logits"][0], wanted)
            itm, itc = self._pair(seen, ids)["itm_logits"][0, 1], (embeds @ self._pooled(ids)).max()
            self.note("itc", np.array([itm, itc]), np.array([wanted[1], text["itc"]]))

    def _pair(self, features: np.ndarray, ids: list[int]) -> dict[str, np.ndarray]:
        return self.bundle.run("qformer_itm", image_features=features, **alone(ids))

    def _pooled(self, ids: list[int]) -> np.ndarray:
        return self.bundle.run("qformer_text", **alone(ids))["text_embeds"][0, 0]
