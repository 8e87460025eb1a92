"""Reads the files that `torch.save` wrote: `pytorch_model.bin` and its shards one tensor at a time, others as a whole.

Only tensors and plain values are unpickled: a file that asks for anything else is refused. What `PickledFile` reads of a file
is one tensor, not the file: its place is looked up without loading anything, its bytes are mapped and let go with the array,
where `torch.load` with `mmap` keeps all that was read in memory.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (makes bfloat16 known to numpy)
import numpy as np


class PickledError(ValueError):
    """The file cannot be read; the message says why, without the file's name."""


class PickledFile:
    """The tensors of one file; the methods are called as those of an open safetensors file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = _tensors(path)

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        dtype = _dtype(tensor)
        start = tensor.untyped_storage()._checkpoint_offset
        if start is None:  # the format before PyTorch 1.6, which is in memory as a whole
            return _bits(tensor.detach()).numpy().view(dtype)
        first = start + tensor.storage_offset() * dtype.itemsize
        steps = [step * dtype.itemsize for step in tensor.stride()]
        size = dtype.itemsize + sum(step * (n - 1) for step, n in zip(steps, tensor.shape, strict=True))
        try:
            held = np.memmap(self._path, np.uint8, "r", first, (size,))
        except ValueError as error:
            raise PickledError(f"it ends before tensor `{name}` does") from error
        return np.ndarray(tuple(tensor.shape), dtype, held, strides=tuple(steps))


def load(path: Path, mmap: bool = False) -> Any:
    """The content of a file. `mmap`: bytes of tensors are read when they are used, which files of the old format do not offer."""
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for `{found[1]}`" if found else "is damaged or asks for more"
        raise PickledError(f"its pickle {what}; only files of plain tensors are read") from error
    except Exception as error:  # a damaged file may raise anything
        raise PickledError(_first_line(error)) from error


def _tensors(path: Path) -> dict[str, Any]:
    """Name, shape and place of every tensor; of a file in the old format the tensors themselves."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = _only_tensors(load(path))
    if any(tensor.untyped_storage()._checkpoint_offset is None for tensor in found.values()):
        found = _only_tensors(load(path))
    return found


def _only_tensors(found: Any) -> dict[str, Any]:
    import torch

    if not isinstance(found, dict):
        raise PickledError(f"it holds a {type(found).__name__}, not a dictionary of tensors")
    return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _dtype(tensor: Any) -> np.dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return np.dtype(name)
    except TypeError as error:
        raise PickledError(f"it holds values of dtype {name}") from error


def _bits(tensor: Any) -> Any:
    """The same bytes in a dtype that numpy knows by itself."""
    import torch

    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
