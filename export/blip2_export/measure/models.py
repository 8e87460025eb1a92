"""The checkpoint that is measured, drawn or given, and its bundles, kept in a folder from one run to the next."""

from __future__ import annotations

import functools
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from blip2_export import bundle, graphs, read
from blip2_export.check import random_checkpoint
from blip2_export.measure import baseline, machine
from blip2_export.measure.baseline import DTYPE_BYTES
from blip2_export.measure.progress import say
from blip2_export.measure.recipes import RECIPES, Recipe, bundle_of, weight_bits

_BESIDE_WEIGHTS = 1 << 30  # bytes that the two sides take beside their weights
SHAPES = sorted(random_checkpoint.SHAPES | random_checkpoint.LARGE | {"t5": random_checkpoint.FAMILIES["t5"]})


@dataclass
class Models:
    """`dtype`: in which a drawn checkpoint is stored. `given`: one that is there, in the place of a drawn one."""

    folder: Path
    shape: str
    dtype: str = "float32"
    given: Path | None = None

    @property
    def checkpoint(self) -> Path:
        return self.given or self.folder / self._name

    def bundle(self, recipe: str) -> Path:
        return self.folder / f"{self._name}-{bundle_of(recipe)}"

    @property
    def _title(self) -> str:
        return self.shape if self.given is None else self.given.name

    @property
    def _name(self) -> str:
        if self.given is None:
            return f"{self.shape}-{self.dtype}"
        return f"{self._title}-{zlib.crc32(bytes(self.given.absolute())):08x}"  # others may have the same name

    def prepare(self, recipes: Sequence[str], peer_bytes: int) -> None:
        """Makes what is missing, or older than the code that makes it; refuses before that where there is no room.

        `peer_bytes`: what a parameter takes in `transformers`.
        """
        n, stored, config = self._n_parameters(), DTYPE_BYTES[self.dtype], self.checkpoint / "config.json"
        drawn = self.given is not None or _is_current(config, _code(random_checkpoint))
        sizes = {self.checkpoint: stored, **{self.bundle(name): min(stored, RECIPES[name].n_bytes) for name in recipes}}
        disk = sum(size for path, size in sizes.items() if not path.exists())
        machine.require_disk(self.folder, int(1.02 * n * disk), self._title)
        largest = max(RECIPES[name].n_bytes for name in recipes)
        machine.require_memory(int(n * (peer_bytes + largest)) + _BESIDE_WEIGHTS, self._title)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.given is None:
            write = functools.partial(
                random_checkpoint.write, shape=self.shape, seed=0, dtype=getattr(torch, self.dtype)
            )
            _keep_or_make(self.checkpoint, drawn, write)
        for name in dict.fromkeys(map(bundle_of, recipes)):
            facts = self.bundle(name) / "bundle.json"
            built = drawn and _is_current(facts, [config, *_code(bundle), *_code(graphs), *_code(read)])
            _keep_or_make(self.bundle(name), built, functools.partial(self._convert, recipe=RECIPES[name]))

    def _n_parameters(self) -> int:
        if self.given is None:
            return random_checkpoint.n_parameters(self.shape)
        return baseline.n_bytes(self.given, "float32") // DTYPE_BYTES["float32"]

    def _convert(self, path: Path, recipe: Recipe) -> None:
        choices = bundle.Choices(
            self._title,
            golden=False,
            loss=False,
            precisions=recipe.precisions,
            weight_bits=weight_bits(),
        )
        bundle.convert(self.checkpoint, path, choices)


def _code(module: ModuleType) -> list[Path]:
    """The files of a module, or of all in a package."""
    file = Path(module.__file__ or "")
    return list(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]


def _is_current(made: Path, sources: Iterable[Path]) -> bool:
    return made.is_file() and all(made.stat().st_mtime >= path.stat().st_mtime for path in sources)


def _keep_or_make(path: Path, is_current: bool, make: Callable[[Path], None]) -> None:
    """Made aside and renamed, so that a killed run leaves nothing that the next one would keep."""
    if is_current:
        say(f"{path} is kept")
        return
    say(f"{path} is {'made anew: the code that makes it is newer' if path.exists() else 'made'}")
    aside = path.with_name(f".{path.name}.new")
    for old in (aside, path):
        shutil.rmtree(old, ignore_errors=True)
    make(aside)
    aside.rename(path)
