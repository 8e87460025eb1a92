"""The tensors of a `.pth` file by name, and where else tensors come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from blip2_export.read import foreign, pickled
from blip2_export.read.checkpoint import CheckpointError, Source

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]


class Reader:
    """Named PyTorch tensors; remembers which were asked for."""

    def __init__(self, where: Path, state: State) -> None:
        self.where, self.state = where, state
        self.taken: set[str] = set()

    @property
    def n_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.state.values())

    def names(self) -> list[str]:
        return list(self.state)

    def has(self, name: str) -> bool:
        return name in self.state

    def take(self, name: str) -> Tensor:
        if name not in self.state:
            raise CheckpointError(
                f"{self.where}: tensor `{name}` is missing; the file is incomplete or of another kind"
            )
        self.taken.add(name)
        return self.state[name]

    def read(self, name: str) -> np.ndarray:
        return numbers(self.where, name, self.take(name))

    def pair(self, old: str, new: str) -> State:
        return {f"{new}.{kind}": self.take(f"{old}.{kind}") for kind in ("weight", "bias")}

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        found = tuple(self.take(name).shape)
        if len(found) != rank:
            raise CheckpointError(f"{self.where}: tensor `{name}` is {list(found)}, expected {rank} dimensions")
        return found

    def count(self, prefix: str) -> int:
        """How many numbered members stand behind `prefix`."""
        numbers = {name.removeprefix(prefix).split(".")[0] for name in self.state if name.startswith(prefix)}
        return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)

    def untouched(self) -> list[str]:
        return [name for name in self.state if name not in self.taken]


class Renamed:
    """What `names` lists of a source: new names with those it has there."""

    def __init__(self, source: Source, names: dict[str, str]) -> None:
        self._source, self._names = source, names

    @property
    def n_bytes(self) -> int:
        return self._source.n_bytes

    def names(self) -> list[str]:
        return list(self._names)

    def has(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> np.ndarray:
        return self._source.read(self._names[name])


def read_state(file: Path) -> State:
    """The tensors of a `.pth` file, under `model` where training state lies beside them."""
    if not file.is_file():
        raise CheckpointError(f"{file}: not a file")
    content = _load(file)
    if said := foreign.no_model(content):
        raise CheckpointError(f"{file}: {said}")
    state = content.get("model", content)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{file}: no named tensors are in it")
    import torch

    other = next((name for name, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise CheckpointError(f"{file}: `{other}` is not a tensor")
    return dict(state)


def _load(file: Path) -> dict[str, Any]:
    try:
        content = pickled.load(file, mmap=True)
    except pickled.PickledError as error:
        raise CheckpointError(f"{file}: not a readable PyTorch file ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: no named tensors are in it")
    return content


def numbers(where: Path, name: str, value: Tensor) -> np.ndarray:
    import torch

    convert: dict[torch.dtype, Callable[[Tensor], np.ndarray]] = {
        torch.float32: lambda t: t.numpy(),
        torch.float16: lambda t: t.numpy(),
        torch.bfloat16: lambda t: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16),
    }
    if value.dtype not in convert:
        raise CheckpointError(
            f"{where}: tensor `{name}` has dtype {value.dtype}; float32, float16, bfloat16 are supported"
        )
    return convert[value.dtype](value.detach().contiguous())


def heads(file: Path, what: str, width: int, head: int) -> int:
    if width % head:
        raise CheckpointError(f"{file}: the {what}'s width {width} is no multiple of its head size {head}")
    return width // head
