"""MLPerf's LoadGen drives a system that answers each query after a time from a list: `python loadgen.py SCENARIO FOLDER`.

The list comes as JSON, in milliseconds, from standard input; LoadGen's logs are left in the folder. A process of its own, for
LoadGen's state belongs to one.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time

import mlperf_loadgen as loadgen

RATE = 300  # queries a second, of Server


def settings(scenario: str, n_queries: int) -> loadgen.TestSettings:
    wanted = loadgen.TestSettings()
    wanted.scenario, wanted.mode = getattr(loadgen.TestScenario, scenario), loadgen.TestMode.PerformanceOnly
    wanted.min_query_count = wanted.max_query_count = n_queries
    wanted.min_duration_ms, wanted.single_stream_expected_latency_ns = 0, 1_000_000
    wanted.server_target_qps, wanted.server_target_latency_ns = RATE, 1_000_000_000
    return wanted


def logs(folder: str) -> loadgen.LogSettings:
    wanted = loadgen.LogSettings()
    wanted.log_output.outdir, wanted.log_output.copy_summary_to_stdout, wanted.enable_trace = folder, False, True
    return wanted


def answer(waiting: queue.Queue[int | None], times: list[float]) -> None:
    """One query after another, each in its time."""
    left = iter(times)
    while (query := waiting.get()) is not None:
        time.sleep(next(left) / 1e3)
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query, 0, 0)])


def main() -> None:
    scenario, folder = sys.argv[1:]
    times, waiting = json.load(sys.stdin), queue.Queue()
    worker = threading.Thread(target=answer, args=(waiting, times))
    worker.start()
    system = loadgen.ConstructSUT(lambda queries: [waiting.put(query.id) for query in queries] and None, lambda: None)
    samples = loadgen.ConstructQSL(64, 64, lambda _: None, lambda _: None)
    loadgen.StartTestWithLogSettings(system, samples, settings(scenario, len(times)), logs(folder), "")
    waiting.put(None)
    worker.join()
    loadgen.DestroyQSL(samples)
    loadgen.DestroySUT(system)


if __name__ == "__main__":
    main()
