"""vLLM's own client (`vllm bench serve`), unmodified, measures `blip2 serve` as it measures vLLM."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import ROOT, Server, serve

CLIENT = Path(os.environ.get("BLIP2_VLLM_CLIENT", ROOT / "target" / "vllm" / "vllm" / "vllm-rs"))
# Random tokens of a byte-level vocabulary are seldom the tokens of a text, and the client gives up looking; T5's are.
MODEL = ROOT / "models" / "demo-t5"
TEXTS = ROOT / "tests" / "bundles" / "stage1"
N_PROMPTS, N_TOKENS = 24, 8
BEFORE_TOKENS = ("decode_image", "preprocess", "vision", "qformer")
SLACK_MS, SLACK = 20.0, 0.5  # what a request may take beside what the server counts


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not CLIENT.exists():
        pytest.skip(f"no vLLM here ({CLIENT}): make setup-vllm")
    with serve("--model", str(MODEL), bundles=("stage1",)) as server:
        yield server


def measured(server: Server, folder: Path, *options: str) -> dict[str, Any]:
    """The client's report, every request in it."""
    command = [CLIENT, "bench", "serve", "--base-url", server.url, "--num-prompts", str(N_PROMPTS), "--disable-tqdm"]
    command += ["--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "report.json"]
    done = subprocess.run([*command, *options], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "report.json").read_text())


def counted(server: Server) -> dict[str, float]:
    """What the server has counted so far."""
    lines = re.findall(r"^(blip2_[^ ]*) ([^ ]+)$", server.ask("/metrics")[1], re.MULTILINE)
    return {name: float(value) for name, value in lines}


def stage(name: str) -> str:
    return f'blip2_stage_seconds_sum{{model="demo-t5",stage="{name}"}}'


def route(path: str, figure: str) -> str:
    return f'blip2_e2e_request_latency_seconds_{figure}{{route="{path}"}}'


def complete(found: dict[str, Any]) -> None:
    assert (found["completed"], found["failed"]) == (N_PROMPTS, 0) and not any(found["errors"]), found["errors"]


@pytest.mark.parametrize("load", [("--max-concurrency", "2"), ("--request-rate", "20")], ids=["closed", "open"])
def test_what_vllm_measures_is_what_the_server_counts(server: Server, load: tuple[str, ...], tmp_path: Path) -> None:
    before = counted(server)
    pictures = ("--random-mm-bucket-config", "{(64, 64, 1): 0.5, (96, 128, 1): 0.5}", "--random-input-len", "6")
    asked = ("--backend", "openai-chat", "--model", MODEL.name, "--tokenizer", str(MODEL), "--temperature", "0")
    more = ("--dataset-name", "random-mm", "--random-output-len", str(N_TOKENS), "--ignore-eos", *pictures)
    found = measured(server, tmp_path, *asked, *more, *load)
    complete(found)
    assert found["output_lens"] == [N_TOKENS] * N_PROMPTS and found["total_output_tokens"] == N_TOKENS * N_PROMPTS
    counts = {name: value - before.get(name, 0.0) for name, value in counted(server).items()}
    assert counts[route("/v1/chat/completions", "count")] == N_PROMPTS
    served_ms = counts[route("/v1/chat/completions", "sum")] * 1e3 / N_PROMPTS
    assert served_ms <= found["mean_e2el_ms"] <= served_ms * (1 + SLACK) + SLACK_MS
    looked_ms = sum(counts[stage(name)] for name in BEFORE_TOKENS) * 1e3 / N_PROMPTS
    assert 0 < looked_ms <= found["mean_ttft_ms"] < found["mean_e2el_ms"], (
        "no token is there before the picture is seen"
    )
    for latency, first, gaps in zip(found["latencies"], found["ttfts"], found["itls"], strict=True):
        assert 0 < first < latency and 0 < len(gaps) <= N_TOKENS, "a token may wait for the next, to make a character"
    assert found["mean_tpot_ms"] == pytest.approx((found["mean_e2el_ms"] - found["mean_ttft_ms"]) / (N_TOKENS - 1))


def test_vllm_measures_vectors(server: Server, tmp_path: Path) -> None:
    before = counted(server)
    shutil.copy(TEXTS / "qformer_tokenizer.json", tmp_path / "tokenizer.json")
    asked = ("--backend", "openai-embeddings", "--model", TEXTS.name, "--tokenizer", str(tmp_path))
    found = measured(server, tmp_path, *asked, "--dataset-name", "random", "--random-input-len", "5")
    complete(found)
    name = route("/v1/embeddings", "count")
    assert counted(server)[name] - before.get(name, 0.0) == N_PROMPTS and found["mean_e2el_ms"] > 0


def test_what_fails_is_told(server: Server, tmp_path: Path) -> None:
    """A question without a picture is none to BLIP-2."""
    asked = ("--backend", "openai-chat", "--model", MODEL.name, "--tokenizer", str(MODEL), "--random-input-len", "6")
    found = measured(server, tmp_path, *asked)
    assert (found["completed"], found["failed"]) == (0, N_PROMPTS) and "one picture; there are 0" in found["errors"][0]
