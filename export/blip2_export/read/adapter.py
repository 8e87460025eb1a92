"""LoRA adapters merged into a checkpoint's tensors, one at a time, as `merge_and_unload()` of `peft` merges them."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blip2_export.read import hub
from blip2_export.read.checkpoint import Checkpoint, CheckpointError, read_json, weights_name
from blip2_export.read.lora import CONFIG, Lora

# Of a checkpoint in half precision the reference lifts these before it merges.
_LIFTED = {
    "blip-2": re.compile(r"qformer\.|language_model\..*\.wo\."),
    "instructblip": re.compile(r"language_model\..*\.wo\."),
}
_ROWS = 4096  # merged at once, so that no large matrix is held as a whole in float32


def open_folder(folder: Path, adapters: Sequence[Path] = ()) -> Checkpoint:
    """A checkpoint with the adapter that lies beside its weights, as the reference loads it, and then with `adapters`.

    A folder that holds an adapter alone names the checkpoint that it belongs to.
    """
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    inner = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")))
    if inner and not there & {CONFIG, "config.json"}:
        raise CheckpointError(f"{folder}: it holds adapters, each in a folder of its own: {inner}; name one of these")
    if inner:
        print(f"warning: {folder}: adapters in folders inside it are not merged: {inner}", file=sys.stderr)
    alone = CONFIG in there and weights_name(there) is None
    checkpoint = open_folder(_base(folder)) if alone else Checkpoint(folder)
    return adapted(checkpoint, [*([folder] if CONFIG in there else []), *adapters])


def adapted(checkpoint: Checkpoint, adapters: Sequence[Path]) -> Checkpoint:
    """Every adapter on top of what those before it gave."""
    for folder in adapters:
        checkpoint = Adapted(checkpoint, Lora(folder))
    return checkpoint


def _base(folder: Path) -> Path:
    said = read_json(folder / CONFIG)
    name, revision = said.get("base_model_name_or_path"), said.get("revision")
    if not isinstance(name, str) or not name or Path(name).resolve() == folder.resolve():
        raise CheckpointError(
            f"{folder}: {CONFIG} names no base model; give its folder as the checkpoint, and this one with --adapter"
        )
    try:
        found = hub.locate(name, revision if isinstance(revision, str) and not Path(name).exists() else None)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: of its base model, {error}") from error
    if not found.is_dir():
        raise CheckpointError(
            f"{folder}: its base model `{name}` is no folder here; give one as the checkpoint, and this one with --adapter"
        )
    return found


class Adapted(Checkpoint):
    """A checkpoint whose tensors are read with an adapter merged in."""

    def __init__(self, base: Checkpoint, lora: Lora) -> None:
        self.asks = base.asks
        self._hold(base.folder, base.config, [_Merged(base, lora)])
        self.tokenizer_folder, self.processor_folder = base.tokenizer_folder, base.processor_folder


class _Merged:
    """Tensors of the base in the base's precision, each with what the adapter changes of it."""

    def __init__(self, base: Checkpoint, lora: Lora) -> None:
        self._base, self._lora = base, lora
        lost = next((name for name in lora.changed() if not base.has(name)), None)
        if lost or not lora.changed():
            what = f"it changes `{lost}`, which the checkpoint has not" if lost else "it changes nothing"
            raise CheckpointError(f"{lora.folder}: {what}; it belongs to another model")
        parted = (other for name in lora.replaced if lora.breaks_tie(name) for other in base.tied(name))
        self._names = dict.fromkeys([*base.names(), *lora.replaced, *parted])
        self._touched = {*lora.changed(), *(f"{module}.bias" for module in lora.modules)}

    @property
    def n_bytes(self) -> int:
        return self._base.n_bytes

    def names(self) -> list[str]:
        return list(self._names)

    def has(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> np.ndarray:
        lora, value = self._lora, self._base.tensor(name)
        tied = [name] if lora.breaks_tie(name) else self._base.tied(name)
        one = [other for other in tied if other == name or not lora.breaks_tie(other)]
        if not any(other in self._touched for other in one):
            return value
        if value.dtype == np.float16 and _LIFTED[self._base.config["model_type"]].match(name):
            value = value.astype(np.float32)
        for other in one:
            if other in lora.replaced:
                value = self._fitting(other, lora.replacement(other), value.shape).astype(value.dtype)
        stem, _, kind = name.rpartition(".")
        if kind == "bias":
            return self._with_bias(stem, value)
        for module in (other.removesuffix(".weight") for other in one):
            value = self._with_product(module, value) if module in lora.modules else value
        return value

    def _with_bias(self, module: str, value: np.ndarray) -> np.ndarray:
        more = self._lora.bias(module)
        if more is None:
            return value
        self._fitting(f"{module}.lora_B.bias", more, value.shape)
        return (value.astype(np.float32) + more * self._lora.scale(module)).astype(value.dtype)

    def _with_product(self, module: str, value: np.ndarray) -> np.ndarray:
        """With a magnitude, every row of the sum is brought to that length."""
        left, right, is_table = self._lora.factors(module)
        scale, magnitude = self._lora.scale(module), self._lora.magnitude(module)
        flat = value.reshape(len(value), -1)
        if (len(left), right.shape[-1]) != flat.shape or left.shape[-1] != len(right):
            raise CheckpointError(
                f"{self._lora.folder}: what it adds to `{module}` is not of the shape {list(value.shape)}"
            )
        if magnitude is not None and (value.ndim > 2 or len(magnitude) != len(value)):
            raise CheckpointError(f"{self._lora.folder}: DoRA of `{module}` is not supported; merge it with peft")
        out = np.empty_like(flat)
        for start in range(0, len(flat), _ROWS):
            rows = slice(start, start + _ROWS)
            product = (left[rows] @ right) * scale
            if is_table:  # peft rounds the product of tables alone
                product = product.astype(value.dtype).astype(np.float32)
            total = flat[rows].astype(np.float32) + product
            if magnitude is not None:
                total *= (magnitude[rows] / np.linalg.norm(total, axis=1))[:, None]
            out[rows] = total.astype(value.dtype)
        return out.reshape(value.shape)

    def _fitting(self, name: str, found: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if found.shape != shape:
            where = f"{self._lora.folder}: `{name}` is {list(found.shape)}"
            raise CheckpointError(f"{where}, that of the checkpoint {list(shape)}")
        return found
