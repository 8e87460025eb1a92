"""`blip2 serve` on loopback and on tiny bundles, for tests that ask it."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from test_engine import ENGINE, ROOT

BUNDLES = ("t5", "stage1", "vqa-opt")
PATIENCE = 60.0


@dataclass
class Server:
    """`said`: the last lines of its log."""

    url: str
    process: subprocess.Popen[str]
    said: deque[str] = field(default_factory=lambda: deque(maxlen=50))

    def ask(self, path: str, body: Any = None) -> tuple[int, str]:
        """Status and text of what comes back."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_ready(self) -> None:
        end = time.monotonic() + PATIENCE
        while self.ask("/health/ready")[0] != 200:
            assert time.monotonic() < end and self.process.poll() is None, "\n".join(self.said)
            time.sleep(0.02)


@contextmanager
def serve(*options: str, bundles: tuple[str, ...] = BUNDLES) -> Iterator[Server]:
    assert ENGINE.exists(), f"{ENGINE} is not there; build it first (cargo build)"
    models = [word for name in bundles for word in ("--model", str(ROOT / "tests" / "bundles" / name))]
    command = [
        str(ENGINE),
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--provider",
        "cpu",
        "--threads",
        "1",
        "--max-in-hand",
        "64",  # clients that measure ask at their own pace
        *models,
        *options,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8", cwd=ROOT) as process:
        try:
            first = process.stderr.readline()
            assert "http://" in first, first
            server = Server(first.partition(" on ")[2].split()[0], process)
            threading.Thread(target=server.said.extend, args=(process.stderr,), daemon=True).start()
            server.wait_ready()
            yield server
        finally:
            process.kill()


def sample(n: int = 0) -> Path:
    return ROOT / "models" / "samples" / f"{n}.png"


def data_url(n: int = 0) -> str:
    return f"data:image/png;base64,{base64.b64encode(sample(n).read_bytes()).decode()}"
