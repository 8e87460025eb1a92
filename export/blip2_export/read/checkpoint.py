"""Reads a Hugging Face BLIP-2 folder: its configuration checked, its tensors one at a time."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from blip2_export.read import foreign, ties
from blip2_export.read.pickled import PickledError, PickledFile

# In the order of the reference: where several are there, the first counts.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_OLD_KEYS = {"qformer_text_input": "use_qformer_text_input"}
RETRIEVAL = "Blip2ForImageTextRetrieval"
_KINDS = ("blip-2", "instructblip")
_LANGUAGES = ("opt", "llama", "t5")
_SUPPORTED = (
    "BLIP-2 or InstructBLIP with OPT, LLaMA or Flan-T5 (`blip-2` or `instructblip` with `opt`, `llama` or `t5`), "
    f"or `{RETRIEVAL}`"
)


class CheckpointError(ValueError):
    """The folder cannot be converted; the message says why in one sentence."""


class Source(Protocol):
    """Tensors by name."""

    @property
    def n_bytes(self) -> int: ...
    def names(self) -> Iterable[str]: ...
    def has(self, name: str) -> bool: ...
    def read(self, name: str) -> np.ndarray: ...


class Checkpoint:
    """A configuration and tensors under their Hugging Face names; here those of a folder with config.json and weights.

    Of names that the reference ties, one may stand for another: `ties.py` says which. Remembers what was asked for.
    """

    asks = "config.json asks for"

    def __init__(self, folder: Path) -> None:
        config = _config(folder)
        files = TensorFiles(folder)
        if said := foreign.quantized(config) or foreign.wrapped(files.names()):
            raise CheckpointError(f"{folder}: {said}")
        self._hold(folder, config, [files])

    def _hold(self, folder: Path, config: dict[str, Any], sources: Sequence[Source]) -> None:
        """Where several sources have a name, the first counts."""
        self.folder, self.config, self._sources = folder, config, sources
        self.tokenizer_folder: Path = folder
        self.processor_folder: Path | None = folder  # none: the reference's own preprocessing
        self._ties = ties.groups(config)
        self._taken: set[str] = set()

    @property
    def is_retrieval(self) -> bool:
        return RETRIEVAL in (self.config.get("architectures") or ())

    @property
    def n_bytes(self) -> int:
        """Size of the stored tensors, in files."""
        return sum(source.n_bytes for source in self._sources)

    def names(self) -> list[str]:
        """Of the stored tensors."""
        return list(dict.fromkeys(name for source in self._sources for name in source.names()))

    def has(self, name: str) -> bool:
        return self._stored(self._home(name))

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """One tensor in its own dtype (float32, float16 or bfloat16). With `shape`, anything else is an error."""
        home = self._home(name)
        if not self._stored(home):
            raise CheckpointError(
                f"{self.folder}: tensor `{name}` is missing; the checkpoint is incomplete or of another kind"
            )
        value = self._read(home)
        self._taken.add(home)
        if shape is not None and value.shape != shape:
            raise CheckpointError(f"{self.folder}: tensor `{name}` is {list(value.shape)}, {self.asks} {list(shape)}")
        return value

    def tied(self, name: str) -> list[str]:
        """The names of the one parameter that `name` is in the reference: what it is tied to, if equal or not stored."""
        group = next((group for group in self._ties if name in group), (name,))
        home = self._home(group[0])
        value = self._read(home) if any(self._stored(other) and other != home for other in group) else None
        one = [other for other in group if other == home or not self._stored(other) or _equal(self._read(other), value)]
        self._taken.update(one)
        return one if name in one else [name]

    def pass_over(self, *names: str) -> None:
        """Parameters that the reference has and its result does not depend on."""
        self._taken.update(names)

    def untouched(self) -> list[str]:
        """Stored names that nobody asked for."""
        return [name for name in self.names() if name not in self._taken]

    def _home(self, name: str) -> str:
        """Where the value of `name` is stored."""
        group = next((group for group in self._ties if name in group), ())
        return next((other for other in (name, *group) if self._stored(other)), name)

    def _stored(self, name: str) -> bool:
        return any(source.has(name) for source in self._sources)

    def _read(self, name: str) -> np.ndarray:
        return next(source for source in self._sources if source.has(name)).read(name)


def _equal(value: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and value.shape == other.shape and bool((value == other).all())


class TensorFiles:
    """The weights of a folder: safetensors or PyTorch's `.bin`, one file or shards; the first of `files` that is there."""

    def __init__(self, folder: Path, files: Sequence[str] = WEIGHTS) -> None:
        self.folder = folder
        self._where = _tensor_files(folder, files)
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
                self._open[file] = _opened(self.folder / file)
            value = self._open[file].get_tensor(name)
        except KeyError as error:
            raise CheckpointError(f"{self.folder / file}: has no tensor `{name}`, though the index says so") from error
        except (SafetensorError, PickledError, OSError) as error:
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
    for part in ("text_config", "vision_config", "qformer_config"):
        if not isinstance(config.get(part), dict | None):
            raise CheckpointError(f"{path}: {part} is no JSON object")
    config["architectures"] = config.get("architectures") or []
    if not isinstance(config["architectures"], list):
        raise CheckpointError(f"{path}: architectures is no list")
    language = (config.get("text_config") or {}).get("model_type", "opt")
    if language not in _LANGUAGES and RETRIEVAL not in config["architectures"]:
        raise CheckpointError(f"{folder}: the language model is `{language}`; supported is {_SUPPORTED}")
    config["qformer_config"] = {_OLD_KEYS.get(k, k): v for k, v in (config.get("qformer_config") or {}).items()}
    return config


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of syntax, encoding, numbers of thousands of digits
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def weights_name(there: Container[str], files: Sequence[str] = WEIGHTS) -> str | None:
    """The file that says where the weights lie, or holds them; `there` are the files of the checkpoint."""
    return next((name for name in files if name in there), None)


def shards(index: Path) -> dict[str, str]:
    """Tensor name → file, as a `.index.json` lists them."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index}: has no weight_map")
    stray = next(
        (file for file in where.values() if not isinstance(file, str) or Path(file).name != file or "\0" in file), None
    )
    if stray is not None:
        raise CheckpointError(f"{index}: its weight_map names {stray!r}, which is no file beside it")
    return where


def _tensor_files(folder: Path, files: Sequence[str]) -> dict[str, str]:
    there = [path.name for path in folder.iterdir()]
    name = weights_name(there, files)
    if name is None:
        said = foreign.without_weights(there) or f"neither {' nor '.join(files)} is there"
        raise CheckpointError(f"{folder}: {said}")
    if name.endswith(".index.json"):
        where = shards(folder / name)
        missing = sorted({f for f in where.values() if not (folder / f).is_file()})
        if missing:
            raise CheckpointError(f"{folder}: shard {missing[0]} is missing ({len(missing)} in all)")
        return where
    try:
        return {tensor: name for tensor in _opened(folder / name).keys()}
    except (SafetensorError, PickledError, OSError) as error:
        kind = "safetensors" if name.endswith(".safetensors") else "PyTorch"
        raise CheckpointError(f"{folder / name}: not a readable {kind} file ({error})") from error


def _opened(path: Path) -> Any:
    return safe_open(path, framework="numpy") if path.suffix == ".safetensors" else PickledFile(path)
