"""What there is to compute on: how many processors, and with which instructions."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_int8", "amx_bf16")  # as Linux
_ARM_SETS = ("asimddp", "i8mm", "bf16", "sve", "sve2", "sme")
_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")


def count() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set(cpuinfo: str | None = None) -> str:
    """The widest of `/proc/cpuinfo` first, and what belongs to it."""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", told() if cpuinfo is None else cpuinfo, re.MULTILINE)
    there = [name for name in (*_SETS, *_ARM_SETS) if flags and name in flags[1].split()]
    return " ".join(reversed(there)) or platform.machine()


def saturates() -> bool:
    """Whether products of bytes are added in 16 bits, where signed weights of 8 bits overflow. Where nothing is told of an
    x86 processor, it is taken to.

    ONNX Runtime's `session.x64quantprecision` is for these. With AMX, whose kernels take signed weights only, it costs
    most of the speed.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and not any(name in instruction_set().split() for name in _VNNI)


def told() -> str:
    """What Linux tells of them."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
