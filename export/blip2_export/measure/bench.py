"""The `bench` command: the engine and `transformers` in turns, on the same weights, pictures, prompts and number of tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from blip2_export.measure import machine, records, stop, table, work
from blip2_export.measure.baseline import DTYPE_BYTES, DTYPES
from blip2_export.measure.binary import Engine
from blip2_export.measure.models import SHAPES, Models
from blip2_export.measure.peer import Peer
from blip2_export.measure.progress import say
from blip2_export.measure.recipes import RECIPES
from blip2_export.measure.records import Files, Report
from blip2_export.measure.scenarios import Scenario
from blip2_export.measure.work import Work

_PEER = "transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sides(parser, "reports")
    parser.add_argument("--compile", action="store_true", help="`transformers` with `torch.compile`")
    work.add_arguments(parser, beams=5, queries=10, duration=0.0, warm_up=10.0)


def add_sides(parser: argparse.ArgumentParser, out: str) -> None:
    """What stands beside each other, and where: files go to `out` in the folder of models."""
    parser.add_argument("--shape", choices=SHAPES, default="medium", help="of the random model (default: %(default)s)")
    parser.add_argument(
        "--work",
        type=work.folder,
        default=Path("target/bench"),
        metavar="DIR",
        help="keeps checkpoint and bundle for the next time (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=work.folder,
        metavar="DIR",
        help=f"gets the table and every report, of rounds and of all together (default: {out} in --work)",
    )
    parser.add_argument(
        "--recipes",
        type=_recipes,
        default=["exact", "fast"],
        metavar="A,B",
        help=f"how the engine computes: {', '.join(RECIPES)}; `faithful` needs an Intel processor with bfloat16 and the "
        "OpenVINO plugin (default: exact,fast)",
    )
    parser.add_argument("--rounds", type=work.count(1), default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--weights", choices=DTYPES, default="float32", help="how the checkpoint is stored (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="in which `transformers` computes (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Progress to standard error, the table to standard output."""
    work.require_engine(args.engine)
    models = Models(args.work, args.shape, args.weights)
    engines = {
        name: Engine(args.engine, models.bundle(name), args.threads, RECIPES[name].flags) for name in args.recipes
    }
    for engine in engines.values():
        engine.doctor()
    models.prepare(args.recipes, DTYPE_BYTES[args.dtype])  # on all processors: --threads holds from `Peer` on
    machine.forget_peak_memory()
    peer = Peer(models.checkpoint, args.dtype, args.threads)
    if args.compile:
        peer.compile()
    out = args.out or args.work / "reports"
    turns = Turns(args.engine, engines, peer, jobs(args.scenarios, work.of(args)), out)
    status = 0
    try:
        with stop.like_ctrl_c():
            turns.run(args.rounds)
    except KeyboardInterrupt:
        say("stopped")
        status = stop.STOPPED
    found = turns.report()
    (out / "table.md").write_text(found)
    print(found, end="")
    return status


@dataclass(frozen=True)
class Job:
    """A scenario with what it has to do."""

    scenario: str
    work: Work
    label: str


def jobs(scenarios: list[str], wanted: Work) -> dict[str, Job]:
    """Greedy texts in all of them, and `single` with beams too."""
    greedy, n = replace(wanted, n_beams=1), wanted.n_tokens
    text = {"caption": "caption", "ask": "answer"}[wanted.task]
    together = replace(greedy, n_queries=max(wanted.n_queries, 2 * wanted.n_pictures))
    found = {
        "stage": Job("stage", greedy, "stages alone"),
        "single": Job("single", greedy, f"{text} of {n} tokens, greedy"),
        "beams": Job("single", wanted, f"{text} of {n} tokens, {wanted.n_beams} beams"),
        "offline": Job("offline", together, f"{wanted.n_pictures} at once"),
    }
    return {
        name: job
        for name, job in found.items()
        if job.scenario in scenarios and (name != "beams" or wanted.n_beams > 1)
    }


@dataclass
class Turns:
    """Both sides, job after job, round after round. `out` gets records and reports."""

    binary: Path
    engines: dict[str, Engine]
    peer: Peer
    jobs: dict[str, Job]
    out: Path
    _rounds: list[int] = field(default_factory=list)  # that have begun

    def run(self, n_rounds: int) -> None:
        """An earlier run's reports of rounds are removed."""
        for old in (self.out / "rounds").glob("*.json*"):
            old.unlink()
        for i in range(n_rounds):
            self._rounds.append(i)
            for name, job in self.jobs.items():
                for side in self.sides:
                    say(f"round {i + 1} of {n_rounds}: {name}, {side}")
                    self._measure(side, job, self._files(side, name, i))

    @property
    def sides(self) -> list[str]:
        return [_PEER, *self.engines]

    def report(self) -> str:
        """What the machine is, who was measured, the table, and how many texts have the same tokens on both sides."""
        joined = {
            side: {name: found for name in self.jobs if (found := self._joined(side, name))} for side in self.sides
        }
        there = [found for reports in joined.values() for found in reports.values()]
        if not there:
            return "stopped before anything was measured\n"
        rounds = {side: {name: self._reports(side, name) for name in self.jobs} for side in self.sides}
        sides = {_PEER: rounds[_PEER], **{f"engine, {name}": rounds[name] for name in self.engines}}
        rows = list(table.rows({name: job.label for name, job in self.jobs.items()}, self._stages(joined)))
        lines = [*machine_lines(there[0]), *self._subjects(joined), *self._agreements()]
        return "\n".join([*lines, "", table.table(sides, rows), ""])

    def _measure(self, side: str, job: Job, files: Files) -> None:
        if side == _PEER:
            Scenario(job.scenario, self.peer, job.work).measure(self.binary, files, _command())
        else:
            self.engines[side].measure(job.scenario, job.work, files)

    def _files(self, side: str, job: str, i: int) -> Files:
        return Files(self.out / "rounds" / f"{side}-{job}-{i + 1}")

    def _there(self, side: str, job: str) -> list[Files]:
        return [files for i in self._rounds if (files := self._files(side, job, i)).is_there]

    def _reports(self, side: str, job: str) -> list[Report]:
        return [files.read() for files in self._there(side, job)]

    def _joined(self, side: str, job: str) -> Report | None:
        rounds = [self._files(side, job, i) for i in self._rounds]
        return records.joined(self.binary, rounds, Files(self.out / f"{side}-{job}"), _command())

    def _stages(self, joined: dict[str, dict[str, Report]]) -> list[str]:
        """Those that every side has, in the order of the first."""
        names = [
            [name for name, _ in reports["stage"]["figures"]["stages_ms"]]
            for reports in joined.values()
            if "stage" in reports
        ]
        return [name for name in names[0] if all(name in other for other in names)] if names else []

    def _subjects(self, joined: dict[str, dict[str, Report]]) -> Iterator[str]:
        for side, reports in joined.items():
            for subject in (found["subject"] for found in list(reports.values())[:1]):
                of = sorted({precision for _, precision in subject["precisions"]})
                runtime = subject["runtime"] if side == _PEER else f"ONNX Runtime {subject['runtime']}"
                who = f"{subject['engine']}, {runtime}, {subject['provider']}, {subject['threads']} threads"
                yield f"{side}: {subject['model']} in {' and '.join(of)}; {who}"
        yield f"whole rounds: {self._n_whole()}"

    def _n_whole(self) -> int:
        each = [self._files(side, job, i) for side in self.sides for job in self.jobs for i in self._rounds]
        n_missing = len({files.stem.name.rpartition("-")[2] for files in each if not _is_complete(files)})
        return len(self._rounds) - n_missing

    def _agreements(self) -> Iterator[str]:
        """With random weights scores tie more often than with trained ones, so that a few texts may differ."""
        for job in (name for name in ("single", "beams") if name in self.jobs):
            theirs = _tokens(self._there(_PEER, job))
            for name in self.engines:
                ours = _tokens(self._there(name, job))
                both = ours.keys() & theirs.keys()
                same = sum(ours[one] == theirs[one] for one in both)
                yield f"same tokens, {name}, {self.jobs[job].label}: {same} of {len(both)}"


def machine_lines(found: Report) -> Iterator[str]:
    told = found["machine"]
    yield f"processor: {told['processor'] or 'unknown'}"
    yield f"instruction set: {told['instruction_set']}"
    yield f"processors: {told['usable_processors']} of {told['processors']}"
    yield from (f"GPU: {name}" for name in told["gpus"])


def _tokens(runs: list[Files]) -> dict[str, list[list[int]]]:
    return {record["input"]: record["tokens"] for run in runs for record in run.logged() if "tokens" in record}


def _is_complete(files: Files) -> bool:
    return files.is_there and files.read()["is_complete"]


def _command() -> list[str]:
    return ["python", "-m", "blip2_export", *sys.argv[1:]]


def _recipes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := next((name for name in names if name not in RECIPES), None):
        raise argparse.ArgumentTypeError(f"{unknown} is none of {', '.join(RECIPES)}")
    return names
