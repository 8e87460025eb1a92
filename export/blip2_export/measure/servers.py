"""Servers that are to be measured: started, asked until they answer, watched for what memory they take, ended whatever happens."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2_export.measure import machine
from blip2_export.measure.progress import say

_STARTING_S, _ENDING_S, _ANSWERING_S = 900.0, 20.0, 300.0
_PAUSE_S = 0.02
_BUSY = (429, 503)
_LAST_LINES = 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine's loopback


@dataclass(frozen=True)
class Server:
    """A `command` in which `{port}` stands for a port of 127.0.0.1, or the `url`, up to and with /v1, of one that runs already."""

    command: tuple[str, ...] = ()
    url: str | None = None
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if self.url is not None:
            return self.url
        program, *typed = self.command
        return " ".join([*("=".join(pair) for pair in self.environment), Path(program).name, *typed])


@dataclass(frozen=True)
class Running:
    """`ready_s`: from its start until the first token of a caption; none of a server that was there before."""

    url: str
    ready_s: float | None = None
    leader: int | None = None

    @property
    def peak_memory(self) -> int | None:
        """The most bytes resident, of all its processes; what they share counts in each."""
        return None if self.leader is None else machine.peak_memory_of_session(self.leader)


@contextmanager
def running(server: Server, log: Path, picture: Path) -> Iterator[Running]:
    """What it says goes to `log`, which is left only where something went wrong."""
    if server.url is not None:
        yield Running(server.url)
        return
    port = _free_port()
    command = [word.replace("{port}", str(port)) for word in server.command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = _start(command, server, file)
    began, url = time.perf_counter(), f"http://127.0.0.1:{port}/v1"
    try:
        _wait(process, url, picture, log)
        yield Running(url, time.perf_counter() - began, process.pid)
    except BaseException:
        say(f"what the server said is in {log}")
        raise
    else:
        log.unlink()
    finally:
        _end(process)


def _start(command: list[str], server: Server, log: Any) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C meets it when its measurement has ended, and with it all that it starts."""
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    if sys.platform == "linux":
        how["preexec_fn"] = _die_with_parent
    try:
        return subprocess.Popen(command, env=os.environ | dict(server.environment), start_new_session=True, **how)
    except OSError as error:
        raise SystemExit(f"{' '.join(command)}: {error.strerror}") from error


def _die_with_parent() -> None:
    """Nobody ends a server whose measuring process is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], url: str, picture: Path, log: Path) -> None:
    began = time.monotonic()
    while not _answers(url, picture):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode} before it answered:\n{_last(log)}")
        spent = time.monotonic() - began
        if spent > _STARTING_S:
            raise SystemExit(f"the server has not answered within {_STARTING_S:.0f} s:\n{_last(log)}")
        time.sleep(max(_PAUSE_S, spent / 100))


def _answers(url: str, picture: Path) -> bool:
    """Whether it writes one token about a picture; an error if it never will."""
    try:
        [model, *_] = _asked(f"{url}/models")["data"]
        _asked(f"{url}/chat/completions", _one_token(model["id"], picture))
    except urllib.error.HTTPError as error:
        if error.code in _BUSY:
            return False
        said = error.read().decode(errors="replace")[:200]
        raise SystemExit(f"the server refuses a caption: status {error.code}: {said}") from error
    except (OSError, ValueError):  # nobody listens yet, or nothing is served yet
        return False
    return True


def _one_token(model: str, picture: Path) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 1,
    }


def _asked(url: str, body: dict[str, Any] | None = None) -> Any:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with _OPENER.open(request, timeout=_ANSWERING_S) as reply:
        return json.load(reply)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kindly, then for sure; its session has its process id for a name."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        say(f"the server is killed: it has not ended within {_ENDING_S:.0f} s")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _last(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
