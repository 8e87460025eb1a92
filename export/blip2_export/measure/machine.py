"""The machine while something is measured on it, and whether there is room."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Load:
    """The machine at a moment; `told` as a report has it."""

    told: dict[str, Any]
    _ticks: (
        tuple[int, int, int] | None
    )  # processor time: used by anyone here or beside here, all there was, this process's

    @classmethod
    def now(cls) -> Load:
        last_minute = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return cls({"last_minute": last_minute}, _ticks())

    def since(self, earlier: Load) -> dict[str, Any]:
        """With the share of processor time that others took."""
        if self._ticks is None or earlier._ticks is None:
            return self.told
        used, there, own = (after - before for before, after in zip(earlier._ticks, self._ticks, strict=True))
        return self.told | {"taken_by_others": max(used - own, 0) / there if there else None}


def _ticks() -> tuple[int, int, int] | None:
    """Of what Linux tells since it started."""
    everyone, own = _read("/proc/stat").splitlines()[:1], _read("/proc/self/stat")
    if not everyone or not own:
        return None
    user, nice, system, idle, waiting, interrupts, soft, stolen, *_ = map(int, everyone[0].split()[1:])
    used = user + nice + system + interrupts + soft + stolen
    fields = own.rpartition(")")[2].split()  # behind the name, which may have spaces
    return used, used + idle + waiting, int(fields[11]) + int(fields[12])


def forget_peak_memory() -> None:
    """From now on a new peak is looked for, where the system does that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(process: int | str = "self") -> int | None:
    """The most bytes that a process had resident."""
    peak = _value(_read(f"/proc/{process}/status"), "VmHWM:")
    return peak and peak * 1024


def peak_memory_of_session(leader: int) -> int | None:
    """Of all the processes that are in it now, together."""
    processes = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _session(path.name) == leader]
    return sum(peak_memory(process) or 0 for process in processes) or None


def _session(process: str) -> int | None:
    fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()  # behind the name, which may have spaces
    return int(fields[3]) if fields else None


def free_memory() -> int | None:
    """Bytes that may still be taken: of the machine, or of the control group where that is less."""
    machine = _value(_read("/proc/meminfo"), "MemAvailable:")
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    files = _value(_read("/sys/fs/cgroup/memory.stat"), "inactive_file") or 0
    group = int(limit) - max(int(used) - files, 0) if limit.isdecimal() and used.isdecimal() else None
    return min((n for n in (machine and machine * 1024, group) if n is not None), default=None)


def require_memory(needed: int, what: str) -> None:
    free = free_memory()
    if free is not None and free < needed:
        raise SystemExit(
            f"{what} needs about {_gigabytes(needed)} of memory, {_gigabytes(free)} are free; end what else is running, or "
            "measure a smaller shape"
        )


def require_disk(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    if free < needed:
        raise SystemExit(
            f"{what} needs {_gigabytes(needed)} under {folder}, {_gigabytes(free)} are free; choose another folder (--work), "
            "or measure a smaller shape"
        )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _value(text: str, key: str) -> int | None:
    found = re.search(rf"^{re.escape(key)}\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
