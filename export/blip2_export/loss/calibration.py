"""Runs float32 graphs and notes, of every value that weights are multiplied with, how large its channels are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from blip2_export.graphs.builder import Graph
from blip2_export.graphs.statistics import Channels, Statistics
from blip2_export.loss import stages
from blip2_export.loss.inputs import Inputs
from blip2_export.run.generation import Graphs
from blip2_export.run.retrieval import Stage1Graphs
from blip2_export.run.sessions import Place, Session

_KINDS = ("largest", "sum", "rows")


@dataclass
class Sums:
    """What was seen of a value so far."""

    largest: np.ndarray | float = 0.0
    sum: np.ndarray | float = 0.0
    rows: int = 0

    def add(self, found: dict[str, np.ndarray]) -> None:
        self.largest = np.maximum(self.largest, found["largest"])
        self.sum = self.sum + found["sum"].astype(np.float64)
        self.rows += int(found["rows"][0])

    def channels(self) -> Channels:
        return Channels(np.float32(self.largest), np.float32(self.sum / max(self.rows, 1)))


@dataclass
class Taps:
    """The values of each graph that are looked at, and what was seen of them."""

    values: dict[str, list[str]]
    sums: dict[str, list[Sums]] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = {name: [Sums() for _ in values] for name, values in self.values.items()}

    def statistics(self) -> Statistics:
        return {name: [found.channels() for found in sums] for name, sums in self.sums.items()}


class Tapped(Session):
    """A graph that gives besides its outputs the magnitudes of its linear layers' inputs."""

    def __init__(self, taps: Taps, place: Place, path: Path, said: dict[str, Any]) -> None:
        self._taps, self._sums = taps.values[path.stem], taps.sums[path.stem]
        super().__init__(place, _with_taps(path, self._taps), said)

    def heard(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for tap, sums in zip(self._taps, self._sums, strict=True):
            sums.add({kind: values.pop(f"{kind} {tap}") for kind in _KINDS})
        return super().heard(values)


def statistics(plain: Graphs | Stage1Graphs, graphs: Iterable[Graph], given: Inputs) -> Statistics:
    """Of a float32 bundle and its graphs. A row at a time, so that no padding is seen."""
    taps = Taps({graph.name: graph.linear_inputs for graph in graphs})
    tapped = type(plain)(plain.folder, plain.place, lambda *about: Tapped(taps, *about))
    features = stages.features(tapped, given)
    tapped.close("vision")
    model = stages.behind(tapped, given)
    seen = model.seen(features)
    if isinstance(model, stages.Retrieval):
        model.read()
        model.compared(features)
    tapped.close("qformer", "qformer_text", "qformer_itm")
    if given.asked:
        written = stages.behind(plain, given).write(seen)
        plain.close("encoder", "decoder")
        for texts in (written, [asked.text for asked in given.asked]):
            model.logits(seen, texts)
    return taps.statistics()


def _with_taps(path: Path, values: list[str]) -> Path:
    """The graph with three outputs more for each value: largest and summed magnitude of each channel, and the number of rows."""
    model = onnx.load(path, load_external_data=False)
    graph, wanted = model.graph, {}
    graph.initializer.append(helper.make_tensor("tapped axes", onnx.TensorProto.INT64, [1], [0]))
    for value in values:
        flat, size = f"flat {value}", f"magnitude {value}"
        graph.node.extend(
            [
                helper.make_node("Flatten", [value], [flat], axis=-1),
                helper.make_node("Abs", [flat], [size]),
                helper.make_node("ReduceMax", [size, "tapped axes"], [f"largest {value}"], keepdims=0),
                helper.make_node("ReduceSum", [size, "tapped axes"], [f"sum {value}"], keepdims=0),
                helper.make_node("Shape", [flat], [f"rows {value}"], start=0, end=1),
            ]
        )
        wanted |= {f"{kind} {value}": onnx.TensorProto.FLOAT for kind in _KINDS[:2]}
        wanted[f"rows {value}"] = onnx.TensorProto.INT64
    graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in wanted.items())
    tapped = path.with_suffix(".tapped.onnx")
    onnx.save(model, tapped)
    return tapped
