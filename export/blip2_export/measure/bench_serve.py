"""The `bench-serve` command: servers in turns, on the same weights: `blip2 serve`, `transformers` behind FastAPI, and any other."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from blip2_export.measure import bench, binary, plain, records, stop, table, work
from blip2_export.measure.baseline import DTYPE_BYTES
from blip2_export.measure.models import Models
from blip2_export.measure.progress import say
from blip2_export.measure.recipes import RECIPES
from blip2_export.measure.records import Files, Report
from blip2_export.measure.servers import Server, running
from blip2_export.measure.table import Row, Value
from blip2_export.read.checkpoint import CheckpointError

_PLAIN = "transformers"
_ALONE, _TOGETHER, _AT_RATE, _PROCESS = "alone", "together", "at-rate", "process"
_LOADS = (_ALONE, _TOGETHER, _AT_RATE)
# The threads of libgomp wait in a loop that takes processors from those that work; where others work too, `transformers` is ten
# times as slow with them.
_WAITING = "OMP_WAIT_POLICY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench.add_sides(parser, "serve")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="folder of a BLIP-2 with a language model, instead of --shape"
    )
    parser.add_argument(
        "--also",
        type=_also,
        action="append",
        default=[],
        metavar="NAME=SERVER",
        help="a further server of OpenAI's chat completions: http://HOST:PORT/v1 of one that runs, or a command line, in "
        "which {port} and {checkpoint} are filled in; may be given several times",
    )
    parser.add_argument(
        "--clients", type=work.count(2), default=16, metavar="N", help="that ask at once (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=_rate, metavar="X", help="queries a second (default: half of what each server answers at most)"
    )
    parser.add_argument(
        "--limit", type=work.seconds, default=3600.0, metavar="S", help="of one measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--images",
        type=work.picture,
        nargs="+",
        default=[],
        metavar="FILE",
        help="default: 64 drawn ones that all differ",
    )
    work.add_amounts(parser, queries=10, duration=10.0, warm_up=10.0)


def run(args: argparse.Namespace) -> int:
    """Progress to standard error, the table to standard output, also of what there was before something went wrong."""
    work.require_engine(args.engine)
    for name in args.recipes:
        binary.Engine(args.engine, Path(), args.threads, RECIPES[name].flags).doctor()
    models = Models(args.work, args.shape, args.weights, args.checkpoint)
    out = args.out or args.work / "serve"
    turns = Turns(servers(args, models), Loads.of(args), out)
    try:
        if args.checkpoint:
            plain.opened(args.checkpoint)
        models.prepare(args.recipes, DTYPE_BYTES[args.dtype])
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from error
    return _measured(turns, args.rounds)


def _measured(turns: Turns, n_rounds: int) -> int:
    status = 0
    try:
        with stop.like_ctrl_c():
            turns.run(n_rounds)
    except KeyboardInterrupt:
        say("stopped")
        status = stop.STOPPED
    except SystemExit as error:
        say(f"error: {error}")
        status = 1
    found = turns.report()
    turns.out.mkdir(parents=True, exist_ok=True)
    (turns.out / "table.md").write_text(found)
    print(found, end="")
    return status


def servers(args: argparse.Namespace, models: Models) -> dict[str, Server]:
    """By name; the first is what the others are compared with."""
    threads, most = ("--threads", str(args.threads)), ("--max-in-hand", str(max(32, 2 * args.clients)))
    theirs = (
        "-m",
        "blip2_export",
        "baseline-server",
        str(models.checkpoint),
        "--port",
        "{port}",
        "--dtype",
        args.dtype,
    )
    waiting = ((_WAITING, os.environ.get(_WAITING, "passive")),)
    found = {_PLAIN: Server((sys.executable, *theirs, *threads), environment=waiting)}
    for name in args.recipes:
        ours = ("serve", "--model", str(models.bundle(name)), "--listen", "127.0.0.1:{port}", "--cache-bytes", "0")
        found[f"engine, {name}"] = Server((str(args.engine), *ours, *most, *threads, *RECIPES[name].flags))
    for name, said in args.also:
        if _stem(name) in map(_stem, found):
            raise SystemExit(f"--also {name}: another server has that name")
        command = shlex.split(said.replace("{checkpoint}", shlex.quote(str(models.checkpoint))))
        found[name] = Server(url=said) if said.startswith(("http://", "https://")) else Server(tuple(command))
    return found


@dataclass(frozen=True)
class Loads:
    """What every server has to do. `limit`: seconds that one of its measurements may take."""

    engine: Path
    images: tuple[Path, ...]
    n_tokens: int
    n_clients: int
    rate: float | None
    n_queries: int
    duration: float
    warm_up: float
    limit: float

    @classmethod
    def of(cls, args: argparse.Namespace) -> Loads:
        amounts = (args.queries, args.duration, args.warm_up, args.limit)
        return cls(args.engine, tuple(args.images), args.tokens, args.clients, args.rate, *amounts)

    def measure(self, load: str, url: str, rate: float, files: Files) -> None:
        """`blip2 bench` sends its requests with `Cache-Control: no-store`: no picture is known from before."""
        n = max(self.n_queries, 2 * self.n_clients) if load == _TOGETHER else self.n_queries
        how = {
            _ALONE: ("offline", "--concurrency", "1"),
            _TOGETHER: ("offline", "--concurrency", str(self.n_clients)),
            _AT_RATE: ("server", "--rate", f"{rate:.6g}"),
        }[load]
        text = ("--beams", "1", "--tokens", str(self.n_tokens))
        amounts = ("--queries", str(n), "--duration", str(self.duration), "--warm-up", str(self.warm_up))
        typed = [*how, *map(str, self.images), "--url", url, *text, *amounts]
        binary.bench(self.engine, typed, files, self.limit)


@dataclass
class Turns:
    """All servers, round after round, one at a time. `out` gets records and reports."""

    servers: dict[str, Server]
    loads: Loads
    out: Path
    _rounds: list[int] = field(default_factory=list)  # that have begun

    def run(self, n_rounds: int) -> None:
        """Every second round goes backwards. An earlier run's reports of rounds and logs are removed."""
        for old in (*(self.out / "rounds").glob("*.json*"), *(self.out / "logs").glob("*.log")):
            old.unlink()
        for i in range(n_rounds):
            self._rounds.append(i)
            for name in list(self.servers)[:: -1 if i % 2 else 1]:
                self._measure(name, i, f"round {i + 1} of {n_rounds}: {name}")

    def _measure(self, name: str, i: int, what: str) -> None:
        say(f"{what}: starts")
        with running(self.servers[name], self.out / "logs" / f"{_stem(name)}-{i + 1}.log", _picture()) as server:
            rate = self.loads.rate or 0.0
            for load in _LOADS:
                say(f"{what}: {load}")
                files = self._files(name, load, i)
                self.loads.measure(load, server.url, rate, files)
                if load == _TOGETHER and self.loads.rate is None:
                    rate = files.read()["figures"]["rates"]["queries"] / 2
            process = {"ready_s": server.ready_s, "peak_resident_bytes": server.peak_memory}
            self._files(name, _PROCESS, i).report.write_text(json.dumps(process))

    def report(self) -> str:
        """What the machine is, who was measured, the table, and what speaks against it."""
        joined = {(name, load): self._joined(name, load) for name in self.servers for load in _LOADS}
        there = [found for found in joined.values() if found]
        if not there:
            return "stopped before anything was measured\n"
        sides = {name: self._reports(name) for name in self.servers}
        compared = table.table(sides, list(rows(self.loads)), "times as good")
        lines = [*bench.machine_lines(there[0]), *self._subjects(), *self._agreements(), "", compared]
        return "\n".join([*lines, *self._objections(sides), ""])

    def _files(self, name: str, load: str, i: int) -> Files:
        return Files(self.out / "rounds" / f"{_stem(name)}-{load}-{i + 1}")

    def _there(self, name: str, load: str) -> list[Files]:
        return [files for i in self._rounds if (files := self._files(name, load, i)).is_there]

    def _reports(self, name: str) -> table.Rounds:
        return {load: [files.read() for files in self._there(name, load)] for load in (*_LOADS, _PROCESS)}

    def _joined(self, name: str, load: str) -> Report | None:
        rounds, files = self._there(name, load), Files(self.out / f"{_stem(name)}-{load}")
        return records.joined(self.loads.engine, rounds, files, ["python", "-m", "blip2_export", *sys.argv[1:]])

    def _subjects(self) -> Iterator[str]:
        for name, server in self.servers.items():
            yield f"{name}: {server}"
        yield f"versions: transformers {version('transformers')}, torch {version('torch')}"
        yield f"whole rounds: {min(len(self._there(name, _PROCESS)) for name in self.servers)}"

    def _agreements(self) -> Iterator[str]:
        """With random weights scores tie more often than with trained ones, so that a few texts may differ."""
        first, *others = self.servers
        theirs = _texts(self._there(first, _ALONE))
        for name in others:
            ours = _texts(self._there(name, _ALONE))
            both = ours.keys() & theirs.keys()
            yield f"same texts, {name}: {sum(ours[one] == theirs[one] for one in both)} of {len(both)}"

    def _objections(self, sides: dict[str, table.Rounds]) -> Iterator[str]:
        for name, rounds in sides.items():
            for load in _LOADS:
                for i, found in enumerate(rounds[load]):
                    for why in found["figures"]["objections"]:
                        yield f"not valid: {name}, {load}, {i + 1}: {why}"


def rows(loads: Loads) -> Iterator[Row]:
    """Of every load requests and latencies; then what a server takes to start and to stay."""
    rate = "half of the most" if loads.rate is None else f"{loads.rate:g} a second"
    labels = {_ALONE: "1 client", _TOGETHER: f"{loads.n_clients} clients", _AT_RATE: rate}
    for load, label in labels.items():
        yield Row(f"{label}: requests/s", load, table.rate("queries"), True)
    for load, label in labels.items():
        for rank in (50, 99):
            yield Row(f"{label}: end to end p{rank}, ms", load, table.latency("end_to_end", rank))
        for rank in (50, 99):
            yield Row(f"{label}: first token p{rank}, ms", load, table.latency("time_to_first_token", rank))
    yield Row("from start to first token, s", _PROCESS, lambda found: _value(found["ready_s"]))
    yield Row("peak memory, MB", _PROCESS, lambda found: _value(found["peak_resident_bytes"], 1e6))


def _value(found: float | None, unit: float = 1.0) -> Value | None:
    return None if found is None else Value(found / unit, None)


def _texts(runs: list[Files]) -> dict[str, str]:
    """Streams of some servers begin with a space."""
    return {record["input"]: record["output"].strip() for run in runs for record in run.logged()}


def _picture() -> Path:
    return min(work.SAMPLES.glob("*.png"))


def _stem(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def _also(text: str) -> tuple[str, str]:
    name, _, server = text.partition("=")
    if not re.fullmatch(r"[\w. -]+", name) or not server.strip():
        raise argparse.ArgumentTypeError(
            f"{text}: NAME=http://HOST:PORT/v1 or NAME='COMMAND --port {{port}}' is needed"
        )
    return name, server.strip()


def _rate(text: str) -> float:
    found = work.seconds(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: more than 0 a second are needed")
    return found
