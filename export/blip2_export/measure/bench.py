"""The `bench` command: the engine and `transformers` in turns, on the same weights, pictures, prompts and number of tokens."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from blip2_export import bundle, graphs, read
from blip2_export.check import random_checkpoint
from blip2_export.measure import machine, prefill, samples, work
from blip2_export.measure.baseline import DTYPES
from blip2_export.measure.binary import Engine
from blip2_export.measure.peer import Peer
from blip2_export.measure.samples import Samples, median, ratio, spread
from blip2_export.measure.work import Work

_BESIDE_WEIGHTS = 1 << 30  # bytes that the two sides take beside their weights
_PREFILLS = 5  # of the graph alone in a round
_SHAPES = sorted(random_checkpoint.SHAPES | random_checkpoint.LARGE | {"t5": random_checkpoint.FAMILIES["t5"]})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=_SHAPES, default="medium", help="of the random model (default: %(default)s)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("target/bench"),
        metavar="DIR",
        help="keeps checkpoint and bundle for the next time (default: %(default)s)",
    )
    parser.add_argument("--engine", type=Path, default=Path("target/release/blip2"), help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="in which `transformers` computes (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="`transformers` with `torch.compile`")
    work.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Progress to standard error, the report to standard output."""
    if not args.engine.is_file():
        raise SystemExit(f"{args.engine}: the engine is not there; `make build` makes it")
    models = _Models(args.work, args.shape)
    models.prepare()
    peer = Peer(models.checkpoint, args.dtype, args.threads)
    wanted = work.of(args, peer.n_prompt_tokens)
    if args.compile:
        peer.compile()
    engine = Engine(args.engine, models.bundle, args.threads)
    found = _Found(wanted)
    _say("transformers: warming up")
    peer.warm_up(wanted)
    for i in range(args.rounds):
        _say(f"round {i + 1} of {args.rounds}: engine")
        samples.add(found.engine, engine.measure(wanted, i))
        _say(f"round {i + 1} of {args.rounds}: transformers")
        samples.add(found.peer, peer.measure(wanted, i))
        alone = prefill.times(models.bundle, peer.n_prompt_tokens(""), wanted.n_tokens, args.threads, _PREFILLS)
        samples.add(found.engine, {"prefill of the graphs alone": alone})
    described = {
        "command": shlex.join(["python", "-m", "blip2_export", *sys.argv[1:]]),
        "model": f"{args.shape}, transformers in {args.dtype}{', compiled' * args.compile}",
        "engine": engine.version(),
        **machine.describe(args.threads, "onnxruntime", "torch", "transformers"),
        "rounds": str(args.rounds),
        "same tokens": _agreement(engine.written, peer.written),
    }
    print(found.report(described))
    if args.json:
        found.write(args.json, described)
    return 0


@dataclass
class _Models:
    """The random checkpoint and its bundle, kept in a folder from one run to the next."""

    folder: Path
    shape: str

    @property
    def checkpoint(self) -> Path:
        return self.folder / self.shape

    @property
    def bundle(self) -> Path:
        return self.folder / f"{self.shape}-bundle"

    def prepare(self) -> None:
        """Makes what is missing, or older than the code that makes it; refuses before that where there is no room."""
        n_bytes = 4 * random_checkpoint.n_parameters(self.shape)
        config, facts = self.checkpoint / "config.json", self.bundle / "bundle.json"
        drawn = _is_current(config, _code(random_checkpoint))
        built = drawn and _is_current(facts, [config, *_code(bundle), *_code(graphs), *_code(read)])
        absent = [path for path in (self.checkpoint, self.bundle) if not path.exists()]
        machine.require_disk(self.folder, int(1.02 * n_bytes * len(absent)), self.shape)
        machine.require_memory(2 * n_bytes + _BESIDE_WEIGHTS, self.shape)
        self.folder.mkdir(parents=True, exist_ok=True)
        _keep_or_make(self.checkpoint, drawn, lambda path: random_checkpoint.write(path, self.shape, seed=0))
        choices = bundle.Choices(self.shape, golden=False)
        _keep_or_make(self.bundle, built, lambda path: bundle.convert(self.checkpoint, path, choices))


@dataclass
class _Found:
    """What was measured on both sides."""

    work: Work
    engine: Samples = field(default_factory=dict)
    peer: Samples = field(default_factory=dict)

    def report(self, described: dict[str, str]) -> str:
        lines = [f"{name}: {value}" for name, value in described.items()]
        sides = samples.table(
            ["", "engine", "quartiles", "transformers", "quartiles", "engine / transformers"], self._sides()
        )
        own = samples.table(["the engine beside itself", "", "", "ratio"], self._own())
        return "\n".join([*lines, "", sides, "", own])

    def write(self, path: Path, described: dict[str, str]) -> None:
        content = {"machine": described, "rows": self.work.rows, "engine": self.engine, "transformers": self.peer}
        path.write_text(json.dumps(content, indent=1) + "\n")

    def _sides(self) -> Iterable[list[str]]:
        for name, label in self.work.rows.items():
            one, other = self.engine[name], self.peer[name]
            ours, theirs = median(one), median(other)
            yield [label, ours, spread(one), theirs, spread(other), ratio(ours, theirs)]

    def _own(self) -> Iterable[list[str]]:
        n_beams, n = self.work.n_beams, len(self.work.questions)
        for label, over, under in (
            (f"a step of {n_beams} beams / of {n_beams} greedy rows, ms", "step of beams", "step of rows"),
            ("prefill / its graphs alone, ms", "prefill", "prefill of the graphs alone"),
            (f"{n} requests at once / one after another, tokens/s", "together", "alone"),
        ):
            a, b = median(self.engine[over]), median(self.engine[under])
            yield [label, a, b, ratio(a, b)]


def _agreement(engine: dict[str, list[int]], peer: dict[str, list[int]]) -> str:
    """Captions of both sides; with random weights scores tie more often than with trained ones, so that a few may differ."""
    same = sum(engine[name] == tokens for name, tokens in peer.items())
    return f"{same} of {len(peer)} captions"


def _code(module: ModuleType) -> list[Path]:
    """The files of a module, or of all in a package."""
    file = Path(module.__file__ or "")
    return list(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]


def _is_current(made: Path, sources: Iterable[Path]) -> bool:
    return made.is_file() and all(made.stat().st_mtime >= path.stat().st_mtime for path in sources)


def _keep_or_make(path: Path, is_current: bool, make: Callable[[Path], None]) -> None:
    """Made aside and renamed, so that a killed run leaves nothing that the next one would keep."""
    if is_current:
        _say(f"{path} is kept")
        return
    _say(f"{path} is {'made anew: the code that makes it is newer' if path.exists() else 'made'}")
    aside = path.with_name(f".{path.name}.new")
    for old in (aside, path):
        shutil.rmtree(old, ignore_errors=True)
    make(aside)
    aside.rename(path)


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
