"""The same model in float32 beside a bundle that has fewer bits: it is calibrated on, and measured against."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blip2_export import processors
from blip2_export.graphs.builder import Graph
from blip2_export.graphs.statistics import Statistics
from blip2_export.loss import calibration, measure
from blip2_export.loss.inputs import Inputs, inputs
from blip2_export.loss.samples import Sample, samples
from blip2_export.reference import pictures
from blip2_export.run.generation import Graphs
from blip2_export.run.retrieval import Stage1Graphs
from blip2_export.run.sessions import Place, UnrunnableError

Build = Callable[[Path], list[Graph]]  # writes a whole bundle to a folder


@dataclass(frozen=True)
class Yardstick:
    """`build` writes the float32 bundle to `folder` when it is first needed. `processor`: the image processor's folder."""

    folder: Path
    build: Build
    processor: Path | None
    given: Path | None  # pictures and texts

    def statistics(self) -> Statistics:
        chosen = samples(self.given, held_out=False)  # refused before anything is built
        graphs = self._graphs
        print(f"calibration: {len(chosen)} pictures", file=sys.stderr)
        return calibration.statistics(self._open(self.folder), graphs, self._inputs(chosen))

    def loss(self, bundle: Path) -> dict[str, Any] | None:
        """The `loss` entry of `bundle.json`; none of graphs that do not run here."""
        chosen = samples(self.given, held_out=True)
        assert self._graphs, "a model has graphs"
        print(f"loss: {len(chosen)} pictures through both bundles", file=sys.stderr)
        try:
            return measure.loss(self._open(self.folder), self._open(bundle), self._inputs(chosen))
        except UnrunnableError as error:
            print(f"loss: not measured, for this processor does not run {error}", file=sys.stderr)
            return None

    @cached_property
    def _graphs(self) -> list[Graph]:
        print("float32: building what is measured against", file=sys.stderr)
        return self.build(self.folder)

    def _open(self, folder: Path) -> Graphs | Stage1Graphs:
        retrieval = any(graph.name == "qformer_text" for graph in self._graphs)
        return (Stage1Graphs if retrieval else Graphs)(folder, place())

    def _inputs(self, chosen: list[Sample]) -> Inputs:
        exact = self._open(self.folder)
        return inputs(exact, chosen, pictures.preparation(self.processor, exact.facts["image"]))


def place() -> Place:
    """All processors that this process may use."""
    return Place(processors.count())


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder next to one that is being written; it goes when that is done."""
    stem, process, ending = folder.name.rsplit(".", 2)
    made = folder.with_name(f"{stem}.float32.{process}.{ending}")
    made.mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
