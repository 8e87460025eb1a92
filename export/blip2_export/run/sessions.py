"""The graphs of a bundle as sessions of ONNX Runtime, each opened when it is first asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from blip2_export import processors

_NUMBERS = {"float32": np.float32, "float16": np.float16}


class Place:
    """The processor. Where it lacks VNNI, 8-bit products are as exact as elsewhere."""

    def __init__(self, n_threads: int = 1) -> None:
        self.n_threads = n_threads

    def session(self, path: Path) -> ort.InferenceSession:
        return ort.InferenceSession(str(path), self._options(), providers=["CPUExecutionProvider"])

    def keep(self, array: np.ndarray) -> ort.OrtValue:
        """A buffer of its own that graphs may write to."""
        return ort.OrtValue.ortvalue_from_numpy(array.copy())

    def fetch(self, kept: ort.OrtValue) -> np.ndarray:
        return kept.numpy().copy()

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.n_threads
        options.log_severity_level = 3
        if processors.saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        return options


class Session:
    """One graph, with the inputs and outputs that `bundle.json` says. 16-bit numbers become float32 on the way out."""

    def __init__(self, place: Place, path: Path, said: dict[str, Any]) -> None:
        self._session, self.outputs = _opened(place, path), [v["name"] for v in said["outputs"]]
        assert [v.name for v in self._session.get_inputs()] == [v["name"] for v in said["inputs"]]
        assert [v.name for v in self._session.get_outputs()][: len(self.outputs)] == self.outputs
        self.dtypes = {v["name"]: _NUMBERS[v["dtype"]] for v in said["inputs"] if v["dtype"] in _NUMBERS}

    def run(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        values = self._session.run(None, {name: self._given(name, value) for name, value in feeds.items()})
        return self.heard(dict(zip((v.name for v in self._session.get_outputs()), values, strict=True)))

    def run_in_place(
        self, feeds: dict[str, np.ndarray], kept: dict[str, ort.OrtValue], into: dict[str, str]
    ) -> np.ndarray:
        """The first output. `kept`: inputs that lie where the graph runs; `into`: outputs that are written over one of them."""
        binding = self._session.io_binding()
        names = [v.name for v in self._session.get_outputs() if v.name not in into]
        for name in names:
            binding.bind_output(name)
        for name, value in feeds.items():
            value = np.require(self._given(name, value), requirements="C")
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        for name, value in kept.items():
            binding.bind_ortvalue_input(name, value)
        for name, source in into.items():
            binding.bind_ortvalue_output(name, kept[source])
        self._session.run_with_iobinding(binding)
        values = binding.copy_outputs_to_cpu()[: len(names)]
        return self.heard(dict(zip(names, values, strict=True)))[names[0]]

    def heard(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What a run gave."""
        return {name: v.astype(np.float32) if v.dtype == np.float16 else v for name, v in values.items()}

    def _given(self, name: str, value: np.ndarray) -> np.ndarray:
        return value.astype(self.dtypes[name], copy=False) if name in self.dtypes else value


class UnrunnableError(Exception):
    """A graph for other devices."""


def _opened(place: Place, path: Path) -> ort.InferenceSession:
    try:
        return place.session(path)
    except Exception as error:  # of the many kinds that the runtime has
        raise UnrunnableError(f"{path.name}: {error}") from error


Open = Callable[[Place, Path, dict[str, Any]], Session]


class Bundle:
    """A bundle's facts and graphs. Those that are large are closed once they are through."""

    def __init__(self, folder: Path, place: Place | None = None, session: Open = Session) -> None:
        self.folder, self.place, self._open = folder, place or Place(), session
        self.facts: dict[str, Any] = json.loads((folder / "bundle.json").read_text())
        self._sessions: dict[str, Session] = {}

    def session(self, name: str) -> Session:
        if name not in self._sessions:
            said = self.facts["graphs"][name]
            self._sessions[name] = self._open(self.place, self.folder / said["file"], said)
        return self._sessions[name]

    def close(self, *names: str) -> None:
        """Gives back the memory of graphs."""
        for name in names:
            self._sessions.pop(name, None)

    def run(self, graph: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        return self.session(graph).run(**feeds)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        return self.run("vision", pixel_values=pixels)["image_features"]


def padded(rows: list[list[int]], pad: int) -> np.ndarray:
    """Rows of ids with padding on the right."""
    longest = max(map(len, rows))
    return np.array([row + [pad] * (longest - len(row)) for row in rows], np.int64)


def real(rows: list[list[int]]) -> np.ndarray:
    """The mask of `padded` rows: 1 where a token is real."""
    lengths = np.array(list(map(len, rows)))
    return (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)


def alone(ids: list[int]) -> dict[str, np.ndarray]:
    """One text as the Q-Former reads it."""
    return {"input_ids": np.array([ids], np.int64), "attention_mask": real([ids])}
