"""MLPerf's LoadGen, unmodified, measures `blip2 serve` by way of OpenAI's client."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import Server, sample, serve

TESTS = Path(__file__).parent
MODEL, ROUTE = "vqa-opt", "/v1/chat/completions"
N_QUERIES = 70
SIDE = 48  # of pictures that are soon read
# What the other side may take for a query beside what it measures: a thread's turn, a connection, and OpenAI's client.
SLACK_MS, SLACK = 20.0, 0.5


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if importlib.util.find_spec("mlperf_loadgen") is None:
        pytest.skip("LoadGen is not there: it has no package for this system, or `make setup-export` is older than it")
    with serve(bundles=(MODEL,)) as server:
        yield server


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(6):
        Image.open(sample(n)).resize((SIDE, SIDE)).save(folder / f"{n}.png")
    return sorted(folder.iterdir())


def measured(
    server: Server, scenario: str, folder: Path, pictures: list[Path], model: str = MODEL
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What LoadGen tells, what its process measured beside it, and LoadGen's summary."""
    command = [sys.executable, TESTS / "mlperf_system.py", scenario, server.url, model, folder, *pictures]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    told = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines if line.startswith(":::MLLOG ")]
    summary = (folder / "mlperf_log_summary.txt").read_text()
    return {one["key"]: one["value"] for one in told}, json.loads(done.stdout), summary


def counted(server: Server) -> tuple[int, float]:
    """Requests that the server has answered, and the milliseconds that they took, as its metrics say."""
    text = server.ask("/metrics")[1]
    name = f'blip2_e2e_request_latency_seconds_%s{{route="{ROUTE}"}} (.*)'
    count, total = (re.search(name % kind, text) for kind in ("count", "sum"))
    return (int(count[1]), float(total[1]) * 1e3) if count and total else (0, 0.0)


@pytest.mark.parametrize("scenario", ["SingleStream", "Server"])
def test_loadgen_finds_a_run_valid(server: Server, scenario: str, tmp_path: Path, pictures: list[Path]) -> None:
    before = counted(server)
    theirs, ours, summary = measured(server, scenario, tmp_path, pictures)
    n_answered, time_ms = (after - earlier for after, earlier in zip(counted(server), before, strict=True))
    assert theirs["result_validity"] == "VALID" and "No errors encountered" in summary, summary
    assert not ours["wrong"]
    assert theirs["result_query_count"] == len(ours["times_ms"]) == n_answered == N_QUERIES
    for rank in (50, 90):
        their = theirs[f"result_{rank:.2f}_percentile_latency_ns"] / 1e6
        near(their, float(np.percentile(ours["times_ms"], rank, method="higher")), f"p{rank}")
    near(theirs["result_mean_latency_ns"] / 1e6, time_ms / n_answered, "mean")


def near(theirs: float, ours: float, what: str) -> None:
    """LoadGen's clock runs around ours."""
    assert ours * 0.98 <= theirs <= ours * (1 + SLACK) + SLACK_MS, f"{what}: {theirs} ms by LoadGen, {ours} ms here"


def test_what_goes_wrong_is_told(server: Server, tmp_path: Path, pictures: list[Path]) -> None:
    """To LoadGen an error is an answer, and soon given."""
    theirs, ours, _ = measured(server, "SingleStream", tmp_path, pictures, model="no-such-model")
    assert theirs["result_validity"] == "VALID"
    assert len(ours["wrong"]) == N_QUERIES and "no model of this name" in ours["wrong"][0]
