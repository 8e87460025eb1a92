"""What a run runs on, for whoever reads its log later."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from blip2_export.train.own import together


def facts(device: torch.device) -> dict[str, Any]:
    """Of this process; the others have the like."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else _processor(),
        "processes": together.size(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
