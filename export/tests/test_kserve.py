"""`blip2 serve` answers Triton's own clients, over HTTP and gRPC, as it answers on its native routes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engine import ENGINE, ROOT

PYTHON = Path(os.environ.get("BLIP2_KSERVE_PYTHON", ROOT / "target" / "kserve" / "bin" / "python"))
PICTURES = [ROOT / "models" / "samples" / f"{n}.png" for n in range(2)]
BUNDLES = [ROOT / "tests" / "bundles" / name for name in ("t5", "stage1", "vqa-opt")]
QUESTIONS = ["what is it?", "which colour?"]
TEXTS = ["a red circle", "nothing", "two squares"]
OPTIONS = {"max_new_tokens": 7, "beams": 3, "repetition_penalty": 1.5, "stop": ["zz"]}
PATIENCE_S = 60
TOLERANCE = 1e-4  # pictures beside others are computed in another order


@pytest.fixture(scope="module")
def addresses() -> Iterator[tuple[str, str]]:
    """Where a server on tiny bundles speaks HTTP and gRPC."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is not there: make setup-kserve")
    assert ENGINE.exists(), f"{ENGINE} is not there; build it first (cargo build)"
    here = "127.0.0.1:0"
    command = [
        ENGINE,
        "serve",
        "--listen",
        here,
        "--grpc-listen",
        here,
        "--provider",
        "cpu",
        "--threads",
        "1",
        "--log",
        "error",
    ]
    command += [word for bundle in BUNDLES for word in ("--model", bundle)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as server:
        try:
            words = server.stderr.readline().split()
            http, grpc = (
                next(word for word in words if word.startswith(f"{scheme}://")) for scheme in ("http", "grpc")
            )
            wait_ready(http)
            yield http.removeprefix("http://"), grpc.removeprefix("grpc://")
        finally:
            server.terminate()
            server.communicate()


def wait_ready(http: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"{http}/v2/health/ready"):
                return
        except urllib.error.HTTPError as error:
            assert error.code == 503
        assert time.monotonic() < until, "it is not ready"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def clients(addresses: tuple[str, str]) -> dict[str, Any]:
    """What the clients got."""
    command = [PYTHON, Path(__file__).parent / "triton_clients.py", *addresses, *PICTURES]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def native(addresses: tuple[str, str]) -> dict[str, list[Any]]:
    """What native routes say."""
    images = [{"data": base64.b64encode(path.read_bytes()).decode()} for path in PICTURES]

    def post(path: str, **body: Any) -> dict[str, Any]:
        said = json.dumps({"images": images, **body}).encode()
        request = urllib.request.Request(f"http://{addresses[0]}{path}", said, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    matches = [one["matches"] for one in post("/match", texts=TEXTS)["results"]]
    found = {name: [[text[name] for text in one] for one in matches] for name in ("itm_probability", "itc_similarity")}
    found["embedding"] = [one["embedding"] for one in post("/embed")["images"]]
    found["written"] = [one["text"] for one in post("/caption", model="t5", options=OPTIONS)["results"]]
    found["answers"] = [one["text"] for one in post("/ask", model="vqa-opt", questions=QUESTIONS)["results"]]
    return found


def close(found: Any, wanted: Any) -> None:
    found, wanted = np.array(found), np.array(wanted)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_texts_are_those_of_native_routes(protocol: str, clients: dict[str, Any], native: dict[str, list[Any]]) -> None:
    found = clients[protocol]
    assert found["written"] == {"text": native["written"], "id": "a-1"}
    assert found["answers"] == {"text": native["answers"]} and len(native["answers"]) == 4


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_numbers_are_those_of_native_routes(
    protocol: str, clients: dict[str, Any], native: dict[str, list[Any]]
) -> None:
    found = clients[protocol]
    for name in ("itm_probability", "itc_similarity"):
        close(found["matches"][name], native[name])
    close(found["vectors"]["embedding"], native["embedding"])


def test_json_says_what_the_binary_form_says(clients: dict[str, Any], native: dict[str, list[Any]]) -> None:
    close(clients["json"]["itm_probability"], native["itm_probability"])
    assert clients["json"]["itc_similarity"] is None, "it was not wanted"


def test_both_protocols_describe_the_same(clients: dict[str, Any]) -> None:
    http, grpc = clients["http"], clients["grpc"]
    assert http["ready"] == grpc["ready"] == [True, True, True]
    assert http["server"] == grpc["server"] and http["server"]["extensions"] == ["binary_tensor_data"]
    for tensor in (*grpc["model"]["inputs"], *grpc["model"]["outputs"]):
        tensor["shape"] = [int(n) for n in tensor["shape"]]  # JSON of protobuf has 64 bits as text
    assert http["model"] == grpc["model"]
    assert [tensor["name"] for tensor in http["model"]["inputs"]] == ["image", "text", "task"]


def test_refusals_have_their_status_and_their_reason(clients: dict[str, Any]) -> None:
    reasons = [
        "no model of this name",
        "image[0]: the picture",
        "no such output",
        "sequence_",
        "one version",
        "no model",
    ]
    statuses = {
        "http": ["404", "400", "400", "400", "404", "404"],
        "grpc": [f"StatusCode.{name}" for name in ("NOT_FOUND", *["INVALID_ARGUMENT"] * 3, "NOT_FOUND", "NOT_FOUND")],
    }
    for protocol, wanted in statuses.items():
        refused = clients[protocol]["refused"]
        assert [status for status, _ in refused] == wanted
        for (_, message), reason in zip(refused, reasons, strict=True):
            assert reason in message
