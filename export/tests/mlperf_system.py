"""MLPerf's LoadGen measures a server through OpenAI's form: `python mlperf_system.py SCENARIO URL MODEL FOLDER PICTURE…`.

LoadGen's logs are left in the folder. Standard output has, as JSON, the milliseconds that each request took here, sorted, and
what went wrong. A process of its own, for LoadGen's state belongs to one.
"""

from __future__ import annotations

import base64
import concurrent.futures
import json
import sys
import time
from pathlib import Path
from typing import Any

import loadgen
import mlperf_loadgen as lg
import openai

N_QUERIES = 70  # LoadGen estimates the 90th percentile from 64 on
RATE = 20  # queries a second, of Server
PATIENCE_NS = 5_000_000_000
N_AT_ONCE = 16
N_TOKENS = 8


class System:
    """What is measured. A sample is a picture, a query a question about it; all pictures are kept from the start."""

    def __init__(self, url: str, model: str, paths: list[str]) -> None:
        self.client, self.model = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), model
        self.urls = [f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" for path in paths]
        self.threads = concurrent.futures.ThreadPoolExecutor(N_AT_ONCE)
        self.times: list[float] = []
        self.wrong: list[str] = []

    def issue(self, queries: list[Any]) -> None:
        for query in queries:
            self.threads.submit(self.answer, query.id, query.index)

    def answer(self, query: int, index: int) -> None:
        """LoadGen waits for every query, so that it is told of those that fail too."""
        begun = time.perf_counter()
        try:
            self.ask(index)
        except openai.OpenAIError as error:
            self.wrong.append(str(error))
        self.times.append((time.perf_counter() - begun) * 1e3)
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query, 0, 0)])

    def ask(self, index: int) -> None:
        content: Any = [
            {"type": "image_url", "image_url": {"url": self.urls[index]}},
            {"type": "text", "text": "what is it?"},
        ]
        said = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=N_TOKENS,
            extra_body={"ignore_eos": True},
            extra_headers={"Cache-Control": "no-store"},  # LoadGen draws the same pictures many times
        )
        if not said.usage or said.usage.completion_tokens != N_TOKENS:
            self.wrong.append(f"{said.usage}")


def settings(scenario: str) -> lg.TestSettings:
    wanted = loadgen.settings(scenario, N_QUERIES)
    wanted.server_target_qps, wanted.server_target_latency_ns = RATE, PATIENCE_NS
    wanted.server_target_latency_percentile = 0.9  # of the 99th it is not sure with so few
    wanted.max_query_count = 0  # an end before the last that is scheduled would be an error
    return wanted


def main() -> None:
    scenario, url, model, folder, *paths = sys.argv[1:]
    system = System(url, model, paths)
    system.client.models.list()  # opens a connection
    tested = lg.ConstructSUT(system.issue, lambda: None)
    samples = lg.ConstructQSL(len(paths), len(paths), lambda _: None, lambda _: None)
    lg.StartTestWithLogSettings(tested, samples, settings(scenario), loadgen.logs(folder), "")
    lg.DestroyQSL(samples)
    lg.DestroySUT(tested)
    system.threads.shutdown()
    print(json.dumps({"times_ms": sorted(system.times), "wrong": system.wrong}))


if __name__ == "__main__":
    main()
