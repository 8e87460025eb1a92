"""Reads a Hugging Face BLIP-2 folder: its configuration checked, its tensors one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

RETRIEVAL = "Blip2ForImageTextRetrieval"
_KINDS = ("blip-2", "instructblip")
_LANGUAGES = ("opt", "llama", "t5")
_SUPPORTED = (
    "BLIP-2 or InstructBLIP with OPT, LLaMA or Flan-T5 (`blip-2` or `instructblip` with `opt`, `llama` or `t5`), "
    f"or `{RETRIEVAL}`"
)


class CheckpointError(ValueError):
    """The folder cannot be converted; the message says why in one sentence."""


class Checkpoint:
    """A configuration and tensors under their Hugging Face names; here those of a folder with config.json and safetensors."""

    asks = "config.json asks for"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _config(folder)
        self.tokenizer_folder: Path = folder
        self.processor_folder: Path | None = folder  # none: the reference's own preprocessing
        self._files = TensorFiles(folder)

    @property
    def is_retrieval(self) -> bool:
        return RETRIEVAL in (self.config.get("architectures") or ())

    @property
    def n_bytes(self) -> int:
        """Size of the stored tensors, in files."""
        return self._files.n_bytes

    def has(self, name: str) -> bool:
        return self._files.has(name)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """One tensor in its own dtype (float32, float16 or bfloat16). With `shape`, anything else is an error."""
        if not self.has(name):
            raise CheckpointError(
                f"{self.folder}: tensor `{name}` is missing; the checkpoint is incomplete or of another kind"
            )
        value = self._read(name)
        if shape is not None and value.shape != shape:
            raise CheckpointError(f"{self.folder}: tensor `{name}` is {list(value.shape)}, {self.asks} {list(shape)}")
        return value

    def optional(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray | None:
        return self.tensor(name, shape) if self.has(name) else None

    def _read(self, name: str) -> np.ndarray:
        return self._files.read(name)


class TensorFiles:
    """The safetensors of a folder, one file or shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where = _tensor_files(folder)
        self._open: dict[str, Any] = {}

    @property
    def n_bytes(self) -> int:
        return sum((self.folder / file).stat().st_size for file in set(self._where.values()))

    def names(self) -> list[str]:
        return list(self._where)

    def has(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> np.ndarray:
        file = self._where[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="numpy")
            value = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot be read ({error})") from error
        if value.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise CheckpointError(
                f"{self.folder}: tensor `{name}` has dtype {value.dtype}; float32, float16 and bfloat16 are supported"
            )
        return value


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; expected a Hugging Face checkpoint folder with config.json")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: config.json is missing; expected a Hugging Face checkpoint folder")
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise CheckpointError(f"{folder}: model_type is `{kind}`; supported is {_SUPPORTED}")
    language = config.get("text_config", {}).get("model_type", "opt")
    if language not in _LANGUAGES and RETRIEVAL not in (config.get("architectures") or ()):
        raise CheckpointError(f"{folder}: the language model is `{language}`; supported is {_SUPPORTED}")
    return config


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def _tensor_files(folder: Path) -> dict[str, str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = dict(read_json(index).get("weight_map", {}))
        missing = sorted({f for f in where.values() if not (folder / f).is_file()})
        if missing:
            raise CheckpointError(f"{folder}: shard {missing[0]} is missing ({len(missing)} in all)")
        return where
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    try:
        with safe_open(single, framework="numpy") as file:
            return {name: single.name for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{single}: not a readable safetensors file ({error})") from error
