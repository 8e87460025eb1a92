"""LangChain's clients get from `blip2 serve` what its native routes say."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import PATIENCE, ROOT, Server, data_url, sample, serve

PYTHON = Path(os.environ.get("BLIP2_LANGCHAIN_PYTHON", ROOT / "target" / "langchain" / "bin" / "python"))
N_PICTURES = 3
TEXTS = ["a red circle", "nothing", "two squares", "a blue star on the left"]
QUESTION = "what is it?"
TOLERANCE = 1e-4  # pictures beside others are computed in another order


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is not there: make setup-langchain")
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def found(server: Server) -> dict[str, Any]:
    """What the clients got."""
    pictures = [sample(n) for n in range(N_PICTURES)]
    command = [PYTHON, Path(__file__).parent / "langchain_clients.py", server.url, *pictures]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def native(server: Server, path: str, **body: Any) -> dict[str, Any]:
    status, text = server.ask(path, body)
    assert status == 200, text
    return json.loads(text)


@pytest.fixture(scope="module")
def probabilities(server: Server) -> np.ndarray:
    """Of each picture with each text."""
    images = [{"url": data_url(n)} for n in range(N_PICTURES)]
    results = native(server, "/match", model="stage1", images=images, texts=TEXTS)["results"]
    return np.array([[text["itm_probability"] for text in one["matches"]] for one in results])


def in_order(placed: list[list[Any]], wanted: np.ndarray, top_n: int) -> None:
    """The best `top_n` of `wanted`, each with its place, the best first."""
    places = np.argsort(-wanted)[:top_n]
    assert [place for place, _ in placed] == places.tolist()
    np.testing.assert_allclose([score for _, score in placed], wanted[places], atol=TOLERANCE)


def test_documents_are_ranked_by_how_well_they_match(found: dict[str, Any], probabilities: np.ndarray) -> None:
    assert np.diff(np.sort(probabilities[0])).min() > TOLERANCE, "what is as good has no order"
    in_order(found["reranked"]["texts"], probabilities[0], 3)
    assert found["reranked"]["kept"] == [TEXTS[place] for place, _ in found["reranked"]["texts"]]


def test_pictures_are_ranked_by_their_data_urls(found: dict[str, Any], probabilities: np.ndarray) -> None:
    in_order(found["reranked"]["pictures"], probabilities[:, 0], N_PICTURES)


def test_refusals_reach_the_caller(found: dict[str, Any]) -> None:
    assert found["reranked"]["refused"].startswith("400") and "a picture" in found["reranked"]["refused"]
    assert found["reranked"]["unknown"].startswith("404") and "no model" in found["reranked"]["unknown"]


def test_chats_say_what_native_routes_say(server: Server, found: dict[str, Any]) -> None:
    asked = {"images": [{"url": data_url()}], "question": QUESTION, "options": {"beams": 1, "max_new_tokens": 12}}
    wanted = native(server, "/ask", model="vqa-opt", **asked)["results"][0]
    chatted = found["chatted"]
    assert chatted["whole"] == chatted["responded"] == chatted["streamed"].strip() == wanted["text"]
    whole, streamed = chatted["usage"]
    assert whole["output_tokens"] == streamed["output_tokens"] == len(wanted["tokens"])
    assert 1 < chatted["n_pieces"] <= len(wanted["tokens"])


def test_vectors_are_those_of_native_routes(server: Server, found: dict[str, Any]) -> None:
    wanted = [one["embedding"] for one in native(server, "/embed", model="stage1", texts=TEXTS)["texts"]]
    for vectors in found["embedded"]:
        np.testing.assert_allclose(vectors, wanted, atol=TOLERANCE)
