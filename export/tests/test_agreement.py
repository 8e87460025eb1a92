"""What `blip2 bench` says of a log is what other tools say of the same log: MLPerf's LoadGen and vLLM's client."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engine import ENGINE

TESTS = Path(__file__).parent
N_QUERIES = 700  # LoadGen estimates the 99th percentile from 662 on
STALL = 100.0


def skewed(seed: int) -> list[float]:
    """Milliseconds from a lognormal distribution of median 2, and one stall."""
    rng = random.Random(seed)
    times = [rng.lognormvariate(math.log(2), 0.4) for _ in range(N_QUERIES)]
    times[N_QUERIES // 2] = STALL
    return times


def record(index: int, scheduled: float, sent: float, done: float) -> dict[str, Any]:
    times = {"scheduled_ms": scheduled, "sent_ms": sent, "done_ms": done}
    return {"index": index, "input": str(index), "n_pictures": 1, "n_tokens": 0, "output": "", **times}


def said(records: list[dict[str, Any]], folder: Path, *typed: str) -> dict[str, Any]:
    """The report of `blip2 bench report`."""
    log, report = folder / "log.jsonl", folder / "report.json"
    log.write_text("".join(json.dumps(one) + "\n" for one in records))
    subprocess.run([ENGINE, "bench", "report", log, "--json", report, *typed], capture_output=True, check=True)
    return json.loads(report.read_text())


def of_loadgen(scenario: str, times: list[float], folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What LoadGen says, and the records of its own log of queries."""
    if importlib.util.find_spec("mlperf_loadgen") is None:
        pytest.skip("LoadGen is not there: it has no package for this system, or `make setup-export` is older than it")
    command = [sys.executable, str(TESTS / "loadgen.py"), scenario, str(folder)]
    subprocess.run(command, input=json.dumps(times), encoding="utf-8", check=True, timeout=120)
    lines = (folder / "mlperf_log_detail.txt").read_text().splitlines()
    told = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines if line.startswith(":::MLLOG ")]
    # The trace as a whole is no JSON, each of its lines is.
    lines = (folder / "mlperf_log_trace.json").read_text().splitlines()
    begun = [
        json.loads(line.rstrip(",")) for line in lines if line.startswith('{"name":"Sample"') and '"ph":"b"' in line
    ]
    begun.sort(key=lambda event: event["args"]["sample_seq"])
    return {one["key"]: one["value"] for one in told}, [_queried(i, event) for i, event in enumerate(begun)]


def _queried(index: int, event: dict[str, Any]) -> dict[str, Any]:
    """Its times count from when the query was due."""
    due, args = event["ts"] / 1e3, event["args"]
    return record(index, due, due + args["issue_start_ns"] / 1e6, due + args["complete_ns"] / 1e6)


@pytest.mark.parametrize("scenario", ["SingleStream", "Server"])
def test_loadgen_says_the_same_of_the_same_queries(scenario: str, tmp_path: Path) -> None:
    times = skewed(7)
    theirs, records = of_loadgen(scenario, times, tmp_path)
    assert len(records) == N_QUERIES and theirs["result_query_count"] == N_QUERIES
    latencies = sorted(one["done_ms"] - one["scheduled_ms"] for one in records)
    assert sum(latencies) > sum(times) and latencies[-1] > STALL, "LoadGen waited for the times that it was given"
    ours = said(records, tmp_path)["figures"]["latencies_ms"]["end_to_end"]
    assert ours["count"] == N_QUERIES
    for name in ("min", "max", "mean"):
        assert ours[name] == pytest.approx(theirs[f"result_{name}_latency_ns"] / 1e6, abs=2e-6), name
    for one in ours["percentiles"]:
        rank, their = one["rank"], theirs[f"result_{one['rank']:.2f}_percentile_latency_ns"] / 1e6
        # LoadGen takes a query's own latency, we what lies between two beside it, as numpy does.
        at = int(N_QUERIES * rank / 100)
        assert their == pytest.approx(latencies[at], abs=2e-6), rank
        assert latencies[at - 1] - 2e-6 <= one["value"] <= latencies[min(at + 1, N_QUERIES - 1)] + 2e-6, rank
        assert one["value"] == pytest.approx(np.percentile(latencies, rank), abs=2e-6), rank


def test_loadgen_estimates_what_we_call_certified(tmp_path: Path) -> None:
    theirs, records = of_loadgen("SingleStream", skewed(8), tmp_path)
    ours = {one["rank"]: one for one in said(records, tmp_path)["figures"]["latencies_ms"]["end_to_end"]["percentiles"]}
    assert ours[90.0]["certified"] == pytest.approx(theirs["early_stopping_latency_ss"] / 1e6, abs=2e-6)
    assert ours[99.0]["certified"] == pytest.approx(theirs["early_stopping_latency_ms"] / 1e6, abs=2e-6)
    assert ours[99.9]["certified"] is None and ours[90.0]["certified"] > ours[90.0]["value"]


def test_a_stall_delays_all_who_come_meanwhile_as_in_loadgen(tmp_path: Path) -> None:
    """300 a second for 100 ms: some 30 of 700 wait, more than 1 %."""
    theirs, records = of_loadgen("Server", skewed(9), tmp_path)
    p99 = said(records, tmp_path)["figures"]["latencies_ms"]["end_to_end"]["percentiles"][3]["value"]
    assert p99 > STALL / 2 and theirs["result_99.00_percentile_latency_ns"] / 1e6 > STALL / 2


def streamed(n: int) -> list[dict[str, Any]]:
    """Texts of 1 to 40 tokens that come one by one, with what an answer takes behind its last token."""
    rng, found = random.Random(11), []
    for i in range(n):
        n_tokens, sent = rng.randint(1, 40), 20.0 * i + rng.random()
        first = sent + rng.lognormvariate(3, 0.5)
        gaps = [rng.lognormvariate(1, 0.3) for _ in range(n_tokens - 1)]
        done = first + sum(gaps) + 0.3 * rng.random()
        more = {"first_token_ms": first, "gaps_ms": gaps, "n_tokens": n_tokens, "output": "a " * n_tokens}
        found.append(record(i, 20.0 * i, sent, done) | more)
    return found


def by_vllm(records: list[dict[str, Any]]) -> dict[str, float]:
    """By the formulas of its `calculate_metrics`: seconds of every request, percentiles of numpy, deviations of a population."""
    each: dict[str, list[float]] = {"ttft": [], "tpot": [], "itl": [], "e2el": []}
    for one in records:
        latency, ttft = (one[name] / 1e3 - one["sent_ms"] / 1e3 for name in ("done_ms", "first_token_ms"))
        each["ttft"].append(ttft)
        each["e2el"].append(latency)
        each["itl"] += [gap / 1e3 for gap in one["gaps_ms"]]
        if one["n_tokens"] > 1:
            each["tpot"].append((latency - ttft) / (one["n_tokens"] - 1))
    figures = {"mean": np.mean, "median": np.median, "std": np.std}
    found = {f"{kind}_{name}_ms": of(times) * 1e3 for name, times in each.items() for kind, of in figures.items()}
    ranks = itertools.product(each.items(), (50, 90, 95, 99))
    return found | {f"p{rank}_{name}_ms": np.percentile(times, rank) * 1e3 for (name, times), rank in ranks}


def test_vllm_s_formulas_give_what_format_vllm_says(tmp_path: Path) -> None:
    records = streamed(300)
    ours, theirs = said(records, tmp_path, "--format", "vllm"), by_vllm(records)
    assert len(theirs) == 28
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-9), name
    duration = (max(one["done_ms"] for one in records) - min(one["sent_ms"] for one in records)) / 1e3
    assert ours["output_throughput"] == pytest.approx(sum(one["n_tokens"] for one in records) / duration)


def test_where_our_own_figures_differ_from_vllm_s(tmp_path: Path) -> None:
    """We count from when a query was due, and a text's tokens to its last one."""
    records = streamed(300)
    latencies, theirs = said(records, tmp_path)["figures"]["latencies_ms"], by_vllm(records)
    waited = np.mean([one["sent_ms"] - one["scheduled_ms"] for one in records])
    assert latencies["end_to_end"]["mean"] == pytest.approx(theirs["mean_e2el_ms"] + waited)
    assert latencies["time_to_first_token"]["mean"] == pytest.approx(theirs["mean_ttft_ms"] + waited)
    behind = [one["done_ms"] - one["first_token_ms"] - sum(one["gaps_ms"]) for one in records]
    ends = [time / (one["n_tokens"] - 1) for time, one in zip(behind, records, strict=True) if one["n_tokens"] > 1]
    assert latencies["time_per_output_token"]["mean"] == pytest.approx(theirs["mean_tpot_ms"] - np.mean(ends))
    assert latencies["inter_token"]["mean"] == pytest.approx(theirs["mean_itl_ms"])
