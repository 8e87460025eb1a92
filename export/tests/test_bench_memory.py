"""What `blip2 bench` says of memory is what the operating system counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_engine import ENGINE, ROOT

# A small process in between: a child's count begins with the memory of the process that started it.
_MEASURE = """
import os, sys
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("bundle", ["tests/bundles/t5", "models/demo-opt"])
def test_peak_memory_is_what_the_system_counts(bundle: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    few = ["--drawn", "4", "--duration", "0", "--warm-up", "0", "--queries", "4", "--json", str(report)]
    bench = [str(ENGINE), "bench", "single", "--model", str(ROOT / bundle), "--provider", "cpu", *few]
    done = subprocess.run([sys.executable, "-S", "-c", _MEASURE, *bench], capture_output=True, text=True, check=True)
    counted = int(done.stdout.splitlines()[-1])
    assert abs(json.loads(report.read_text())["peak_resident_bytes"] / counted - 1) < 0.02
