"""Other processors, emulated by QEMU: right and slow."""

from __future__ import annotations

import shutil
from pathlib import Path

_ROOT = Path(__file__).parents[3]
# AVX2 and no VNNI. What QEMU does not emulate of it is left out, or every process warns of it.
_HASWELL = "Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-rtm,-invpcid"
MISSING = "QEMU is not there; `make setup-qemu` unpacks it"


def avx2() -> list[str] | None:
    """What stands before a command that shall run on a processor with AVX2 and nothing later, where QEMU is there."""
    qemu = emulator("x86_64")
    return [qemu, "-cpu", _HASWELL] if qemu else None


def arm64() -> list[str] | None:
    """The same for arm64, with the libraries that `tests/arm64.sh` puts together."""
    qemu = emulator("aarch64")
    return [qemu, "-cpu", "neoverse-n1", "-L", str(_ROOT / "target" / "arm64" / "root")] if qemu else None


def emulator(machine: str) -> str | None:
    """QEMU for programs of another machine: installed, or unpacked in the tree."""
    names = (f"qemu-{machine}", f"qemu-{machine}-static")
    return next((path for name in names for path in (_unpacked(name), shutil.which(name)) if path), None)


def _unpacked(name: str) -> str | None:
    path = _ROOT / "target" / "qemu" / name
    return str(path) if path.is_file() else None
