"""Runs the engine's binary."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


def run_engine(engine: Path, *typed: str) -> list[dict[str, Any]]:
    """The JSON lines that a command of the engine prints."""
    done = subprocess.run([str(engine), *typed], capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{engine} {typed[0]} failed: {done.stderr.strip()}\n{done.stdout.strip()}")
    # `splitlines` would also cut at U+0085 and U+2028, which a model may write and JSON leaves as they are.
    return [json.loads(line) for line in done.stdout.split("\n") if line.startswith("{")]
