"""`bench-serve`: servers start, are measured in turns and end, and the table says what their reports say."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_engine import ENGINE

from blip2_export.measure import bench_serve, machine, models, servers, stop, work
from blip2_export.measure.records import Files
from blip2_export.measure.servers import Server, running

FEW = ("--tokens", "5", "--queries", "4", "--duration", "0", "--warm-up", "0", "--threads", "1", "--clients", "2")
PACKAGE = Path(__file__).parents[1]
PICTURE = work.SAMPLES / "0.png"
IMAGES = ("--images", *(str(path) for path in sorted(work.SAMPLES.glob("*.png"))[:4]))

# A server of OpenAI's chat completions that knows nothing of pictures, and notes every request.
STAND_IN = """
import http.server, json, sys, time
port, log, seconds, refusal = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    def say(self, content, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content.encode())
        self.wfile.flush()
    def do_GET(self):
        self.say(json.dumps({"data": [{"id": "stand-in"}]}))
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture = body.pop("messages")
        with open(log, "a") as file:
            file.write(json.dumps([self.headers["Cache-Control"], body]) + "\\n")
        if refusal:
            return self.say("no chat template", refusal)
        if not body.get("stream"):
            return self.say(json.dumps({"choices": []}))
        self.say("")
        for i in range(body["max_tokens"]):
            time.sleep(seconds)
            self.piece({"choices": [{"delta": {"content": " a"}}]})
        self.piece({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        self.wfile.write(b"data: [DONE]\\n\\n")
    def piece(self, content):
        self.wfile.write(f"data: {json.dumps(content)}\\n\\n".encode())
        self.wfile.flush()
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(log: Path, seconds: float = 0.001, refusal: int = 0) -> tuple[str, ...]:
    script = log.with_name("stand_in.py")
    script.write_text(STAND_IN)
    return (sys.executable, "-S", str(script), "{port}", str(log), str(seconds), str(refusal))


def shell(text: str) -> Server:
    return Server(("sh", "-c", text, "sh", "{port}"))


def parsed(folder: Path, *typed: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_serve.add_arguments(parser)
    given = ("--shape", "tiny", "--work", str(folder), "--engine", str(ENGINE), "--recipes", "exact")
    return parser.parse_args([*given, *FEW, *IMAGES, *typed])


def turns(folder: Path, found: dict[str, Server], *typed: str) -> bench_serve.Turns:
    return bench_serve.Turns(found, bench_serve.Loads.of(parsed(folder, *typed)), folder / "serve")


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def rows_of(printed: str) -> dict[str, list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_the_table_says_what_was_measured_at_every_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shlex.join(stand_in(tmp_path / "asked.jsonl")) + " {checkpoint}"
    args = parsed(tmp_path, "--rounds", "1", "--also", f"stand-in={other}")
    assert bench_serve.run(args) == 0
    printed, out = capsys.readouterr().out, tmp_path / "serve"
    assert (out / "table.md").read_text() == printed and not list((out / "logs").iterdir())
    rows = rows_of(printed)
    assert rows[""] == ["transformers", "engine, exact", "times as good", "stand-in", "times as good"]

    def figures(stem: str, load: str) -> dict[str, Any]:
        return Files(out / "rounds" / f"{stem}-{load}-1").read()["figures"]

    def median(stem: str, load: str) -> float:
        return figures(stem, load)["latencies_ms"]["end_to_end"]["percentiles"][0]["value"]

    for label, load in (("1 client", "alone"), ("2 clients", "together"), ("half of the most", "at-rate")):
        rates, times = rows[f"{label}: requests/s"], rows[f"{label}: end to end p50, ms"]
        theirs, ours = (figures(stem, load)["rates"]["queries"] for stem in ("transformers", "engine-exact"))
        assert [float(rates[i].split()[0]) for i in range(3)] == pytest.approx([theirs, ours, ours / theirs], rel=1e-3)
        theirs, ours = (median(stem, load) for stem in ("transformers", "engine-exact"))
        assert [float(times[i].split()[0]) for i in range(3)] == pytest.approx([theirs, ours, theirs / ours], rel=1e-3)
    assert all(
        float(cell.split()[0]) > 0 for label, row in rows.items() if label[-1:] in "sB" and label for cell in row
    )
    assert "same texts, engine, exact: 4 of 4" in printed and "same texts, stand-in: 0 of 4" in printed
    assert "OMP_WAIT_POLICY=passive python" in printed and "whole rounds: 1" in printed


def test_every_server_has_the_same_to_do(tmp_path: Path) -> None:
    log = tmp_path / "asked.jsonl"
    measured = turns(tmp_path, {"a": Server(stand_in(log))})
    measured.run(1)
    measured.report()
    first, *asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert first[1]["max_tokens"] == 1, "the caption that tells that it is ready"
    wanted = {"max_tokens": 5, "min_tokens": 5, "ignore_eos": True, "temperature": 0, "stream": True}
    assert len(asked) >= 12 and all(body.items() >= wanted.items() for _, body in asked)
    assert {kept for kept, _ in asked} == {"no-store"}, "a server may answer from what it has seen"
    reports = {load: Files(tmp_path / "serve" / f"a-{load}").read() for load in ("alone", "together", "at-rate")}
    assert [reports[load]["work"]["concurrency"] for load in ("alone", "together")] == [1, 2]
    rate = reports["together"]["figures"]["rates"]["queries"] / 2
    assert float(reports["at-rate"]["work"]["arrivals"].split()[0]) == pytest.approx(rate, rel=1e-3)


def test_every_second_round_goes_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(bench_serve.Turns, "_measure", lambda _, name, i, what: seen.append((name, i)))
    turns(tmp_path, dict.fromkeys("abc", Server())).run(3)
    assert "".join(name for name, _ in seen) == "abccbaabc" and [i for _, i in seen] == [0] * 3 + [1] * 3 + [2] * 3


def test_a_server_that_runs_already_is_left_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(Server(stand_in(tmp_path / "asked.jsonl")), tmp_path / "log", PICTURE) as there:
        args = parsed(tmp_path, "--also", f"there={there.url}", "--rate", "50")
        found = bench_serve.servers(args, models.Models(tmp_path, "tiny"))
        measured = turns(tmp_path, {"there": found["there"]}, "--rate", "50")
        measured.run(1)
        assert is_there(there.leader)
        rows = rows_of(measured.report())
    assert not is_there(there.leader)
    assert rows["from start to first token, s"] == rows["peak memory, MB"] == ["–"]
    assert "50 a second: requests/s" in rows


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (shell("echo no such model; exit 3"), r"ended with status 3 before it answered:\nno such model"),
        (shell("echo loading; exec sleep 60"), r"has not answered within 1 s:\nloading"),
        (Server(("nowhere/server",)), "nowhere/server: No such file"),
    ],
)
def test_a_server_that_does_not_start_says_why(
    server: Server, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_STARTING_S", 1.0)
    with pytest.raises(SystemExit, match=said), running(server, tmp_path / "logs" / "log", PICTURE):
        raise AssertionError("it does not run")
    assert (tmp_path / "logs" / "log").exists()


def test_a_server_without_captions_is_given_up_at_once(tmp_path: Path) -> None:
    server = Server(stand_in(tmp_path / "asked.jsonl", refusal=500))
    with (
        pytest.raises(SystemExit, match="refuses a caption: status 500: no chat template"),
        running(server, tmp_path / "log", PICTURE),
    ):
        raise AssertionError("it does not run")


def test_nothing_of_a_server_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts another process, and neither hears SIGTERM."""
    monkeypatch.setattr(servers, "_ENDING_S", 0.5)
    deaf = tmp_path / "deaf.sh"
    inner = shlex.join(stand_in(tmp_path / "asked.jsonl")).replace("'{port}'", '"$1"')
    deaf.write_text(f"trap '' TERM\n{inner} &\necho $! > {tmp_path}/inner\nwait\nwait\n")
    with (
        pytest.raises(KeyboardInterrupt),
        running(Server(("sh", str(deaf), "{port}")), tmp_path / "log", PICTURE) as server,
    ):
        inner_process = int((tmp_path / "inner").read_text())
        assert is_there(inner_process) and is_there(server.leader)
        raise KeyboardInterrupt
    assert not is_there(server.leader)
    end = time.monotonic() + 10
    while is_there(inner_process) and time.monotonic() < end:  # who adopted it has to notice
        time.sleep(0.02)
    assert not is_there(inner_process) and (tmp_path / "log").exists()


def test_a_server_dies_with_who_measures_it(tmp_path: Path) -> None:
    script = f"""
import pathlib, time
from blip2_export.measure.servers import Server, running
command = {stand_in(tmp_path / "asked.jsonl")!r}
with running(Server(command), pathlib.Path({str(tmp_path / "log")!r}), pathlib.Path({str(PICTURE)!r})) as server:
    print(server.leader, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=PACKAGE) as process:
        leader = int(process.stdout.readline())
        assert is_there(leader)
        process.kill()
    end = time.monotonic() + 10
    while is_there(leader) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_there(leader)


def test_memory_of_a_session_is_that_of_all_its_processes() -> None:
    script = "import sys, time, {}; kept = b'x' * (64 << 20); print('there', flush=True); time.sleep(60)"
    inner = script.format("os")
    outer = script.format(f"subprocess; child = subprocess.Popen([sys.executable, '-S', '-c', {inner!r}])")
    command = [sys.executable, "-S", "-c", outer]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert [process.stdout.readline() for _ in range(2)] == [b"there\n"] * 2
            alone, both = machine.peak_memory(process.pid), machine.peak_memory_of_session(process.pid)
            assert alone < 100 << 20 and 128 << 20 < both < 200 << 20
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_measurement_that_does_not_end_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has what there was before."""
    slow = turns(tmp_path, {"a": Server(stand_in(tmp_path / "asked.jsonl", seconds=0.5))}, "--limit", "1")
    assert bench_serve._measured(slow, 1) == 1
    said = capsys.readouterr()
    assert "is not through within 1 s" in said.err and said.out == "stopped before anything was measured\n"
    assert (tmp_path / "serve" / "logs" / "a-1.log").exists()


def test_who_stops_it_gets_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "asked.jsonl"
    found = {"a": Server(stand_in(log)), "b": Server(stand_in(log, seconds=0.1))}
    leaders: list[int] = []
    usual = bench_serve.Loads.measure

    def measure(self: bench_serve.Loads, load: str, url: str, rate: float, files: Files) -> None:
        if files.stem.name == "b-together-1":
            leaders.extend(int(line) for line in of_port(url))
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        usual(self, load, url, rate, files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_serve.Loads, "measure", measure)
        assert bench_serve._measured(turns(tmp_path, found), 2) == stop.STOPPED
    rows = rows_of(capsys.readouterr().out)
    assert rows[""] == ["a", "b", "times as good"]
    assert all("–" not in cell.split()[0] for cell in rows["1 client: requests/s"])
    assert rows["half of the most: requests/s"][1] == "–"
    assert len(leaders) == 1 and not is_there(leaders[0])


def of_port(url: str) -> list[str]:
    """Processes that were started with the port of an address."""
    port = url.rpartition(":")[2].partition("/")[0]
    lines = ((path, path.joinpath("cmdline").read_bytes().split(b"\0")) for path in Path("/proc").glob("[0-9]*"))
    return [path.name for path, words in lines if port.encode() in words and b"-S" in words]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--also", "http://127.0.0.1:1/v1"), "NAME=http://HOST:PORT/v1"),
        (("--also", "a="), "NAME=http://HOST:PORT/v1"),
        (("--also", "engine exact=true"), "another server has that name"),
        (("--rate", "0"), "more than 0 a second"),
        (("--checkpoint", "nowhere"), "nowhere"),
        (("--engine", "nowhere"), "make build"),
    ],
)
def test_what_cannot_be_measured_is_told(
    typed: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_serve.run(parsed(tmp_path / "new", *typed))
    assert said in f"{stopped.value}{capsys.readouterr().err}" and not (tmp_path / "new").exists()


def test_a_checkpoint_that_is_there_is_measured_on_its_own_bundles(tmp_path: Path) -> None:
    def made(folder: Path) -> models.Models:
        return models.Models(tmp_path / "work", "medium", given=folder)

    own, other = made(tmp_path / "a" / "checkpoint"), made(tmp_path / "b" / "checkpoint")
    assert own.checkpoint == tmp_path / "a" / "checkpoint" and own.bundle("exact") != other.bundle("exact")
    models.random_checkpoint.write(own.checkpoint, "tiny", seed=1)
    own.prepare(["exact"], 4)
    assert json.loads((own.bundle("exact") / "bundle.json").read_text())["name"] == "checkpoint"
    assert own._n_parameters() == pytest.approx(models.random_checkpoint.n_parameters("tiny"), rel=0.2)
