"""Features of the frozen image encoder, kept on disk: what is computed once need not be computed again.

An entry is a file of its own, named by the picture's bytes, in a folder named by everything else that features follow from: the
encoder's weights and shape, how pixels are made, precision. So processes and runs can share it, and nothing in it grows old.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from blip2_export.train.own import together
from blip2_export.train.own.aside import beside, sweep
from blip2_export.train.own.batches import Part
from blip2_export.train.own.pictures import Look
from blip2_export.train.own.sources import DataError

TYPES = ("float16", "float32")
_GIB = 1 << 30
_SPARE = 2 * _GIB  # of the disk, for checkpoints


class Shelf:
    """A folder of features [positions, width], of `kind`, one of `TYPES`; read where they lie, written whole or not at all."""

    def __init__(self, folder: Path, eye: nn.Module, look: Look, precision: str, kind: str = "float16") -> None:
        if kind not in TYPES:
            raise DataError(f"features are kept as {' or '.join(TYPES)}, not {kind}")
        config = eye.config
        self.shape = ((look.side // int(config.patch_size)) ** 2 + 1, int(config.hidden_size))
        self.type = np.dtype(kind)
        self.folder = folder / f"{_name(eye, look, precision)}-{look.side}-{precision}-{kind}"
        self._full = False

    @property
    def entry_bytes(self) -> int:
        """Of one picture, about."""
        return int(np.prod(self.shape)) * self.type.itemsize + 128

    def begin(self, n_pictures: int, most_gib: float) -> None:
        """Says what it will take, and refuses what is more than allowed or than there is."""
        needed, there = n_pictures * self.entry_bytes, self._n_entries() * self.entry_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder.glob("??/.*.part"))
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise DataError(f"{self.folder}: it cannot be written ({error})") from error
        said = f"features of {n_pictures} pictures take at most {needed / _GIB:.2f} GiB as {self.type} in {self.folder}"
        if needed > most_gib * _GIB:
            raise DataError(f"{said}, more than the {most_gib:g} GiB of --cache-most; allow more, or do without")
        if needed - there > free - _SPARE:
            raise DataError(f"{said}, but {free / _GIB:.1f} GiB are free and {_SPARE // _GIB} of them stay so")
        if together.is_first():
            print(f"{said}, {free / _GIB:.0f} GiB are free", file=sys.stderr)

    def get(self, digest: str) -> Tensor | None:
        """Nothing of an entry that is not there or not whole."""
        try:
            found = np.load(self._file(digest), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        if found.shape != self.shape or found.dtype != self.type:
            return None
        return torch.from_numpy(found.astype(np.float32))

    def stacked(self, rows: Sequence[Tensor]) -> Tensor:
        """[rows, positions, width]."""
        return torch.stack(list(rows)) if rows else torch.empty(0, *self.shape)

    def put(self, digest: str, row: Tensor) -> Tensor:
        """The row as it will be read from now on. A disk that is full is told once; then nothing more is kept."""
        with np.errstate(over="ignore"):
            kept = row.detach().float().cpu().numpy().astype(self.type)
        if np.isinf(kept).any():
            raise DataError(f"features of a picture are beyond what {self.type} holds; take --cache-type float32")
        file = self._file(digest)
        if not self._full and not file.exists():
            aside = beside(file)
            try:
                file.parent.mkdir(exist_ok=True)
                with aside.open("wb") as out:
                    np.save(out, kept)
                os.replace(aside, file)
            except OSError as error:
                aside.unlink(missing_ok=True)
                self._full = True
                print(f"warning: {file}: it cannot be written ({error}); no more features are kept", file=sys.stderr)
        return torch.from_numpy(kept.astype(np.float32))

    def _file(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.npy"

    def _n_entries(self) -> int:
        return sum(1 for _ in self.folder.glob("??/*.npy"))


class Eye:
    """The frozen encoder: features of a part, [rows, positions, width], those that are kept from there."""

    def __init__(self, model: nn.Module, device: torch.device, shelf: Shelf | None = None) -> None:
        self.model, self.device, self.shelf = model.to(device), device, shelf

    def __call__(self, part: Part) -> Tensor:
        if part.kept is None or self.shelf is None:
            return self._see(part.pixels)
        kept, n = part.kept, len(part.kept.digests)
        whole = torch.empty(n, *self.shelf.shape)
        known = sorted(set(range(n)) - set(kept.fresh))
        whole[known] = kept.rows
        if kept.fresh:
            # In a batch of the same size as all others: products round by their shapes, not by where a row stands.
            empty = part.pixels.new_zeros(n - len(kept.fresh), *part.pixels.shape[1:])
            for place, row in zip(kept.fresh, self._see(torch.cat([part.pixels, empty])), strict=False):
                whole[place] = self.shelf.put(kept.digests[place], row)
        return whole.to(self.device)

    def _see(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model(pixels.to(self.device)).last_hidden_state
        return found


def _name(eye: nn.Module, look: Look, precision: str) -> str:
    """Of everything but the picture that features follow from."""
    digest = hashlib.sha256(
        json.dumps([eye.config.to_dict(), repr(look), precision], sort_keys=True, default=str).encode()
    )
    for name, tensor in sorted(eye.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
