"""Pictures that cannot be read, told once each, and how many of them are too many."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from blip2_export.train.own import together
from blip2_export.train.own.sources import DataError

FEW = 10  # so many are never too many


class Bad:
    """Those of a phase, by key with the reason, in a file of the work folder that all its processes write and a resumed run reads.

    `share`: of `total` pictures, how many may be bad.
    """

    def __init__(self, file: Path, total: int, share: float = 0.05) -> None:
        self.file, self.total, self.most = file, total, max(FEW, share * total)
        self.known = self._read()

    def note(self, part: Any) -> dict[str, str]:
        """Those of a part that were not known; a `DataError` if they have become too many."""
        new = {key: why for key, why in part.bad.items() if key not in self.known}
        if new:
            self._write(new)
            self.known = {**self._read(), **self.known, **new}
        if len(self.known) > self.most:
            raise DataError(
                f"{self}, more than {self.most:.0f}; mend the data, or let more be bad, and remove the file"
            )
        return new

    def tell(self, part: Any) -> None:
        """Notes those of a part, for whoever has no place to show them."""
        new = self.note(part)
        if together.tells():
            for key, why in new.items():
                print(f"warning: {key} cannot be read ({why}); another takes its place", file=sys.stderr)

    def end(self) -> None:
        """What there was to say, once more, whichever process met it."""
        self.known = {**self._read(), **self.known}
        if self.known:
            print(f"warning: {self}; others took their places", file=sys.stderr)

    def __str__(self) -> str:
        first, why = next(iter(self.known.items()))
        return f"{len(self.known)} of {self.total} pictures cannot be read, such as {first} ({why}); all are in {self.file}"

    def _read(self) -> dict[str, str]:
        try:
            lines = self.file.read_text().splitlines()
        except OSError:
            return {}
        found = dict[str, str]()
        for line in lines:
            with suppress(ValueError, TypeError, KeyError):  # half of it, where the disk was full
                row = json.loads(line)
                found[row["picture"]] = row["why"]
        return found

    def _write(self, new: dict[str, str]) -> None:
        """In one piece, so that processes do not write into each other's lines."""
        lines = "".join(json.dumps({"picture": key, "why": why}) + "\n" for key, why in new.items())
        try:
            with self.file.open("a") as log:
                log.write(lines)
        except OSError as error:
            raise DataError(f"{self.file}: it cannot be written ({error})") from error
