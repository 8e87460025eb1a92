"""The `bench` command: the engine and `transformers` in turns, on the same weights, pictures, prompts and number of tokens."""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from blip2_export import bundle, graphs, read
from blip2_export.check import random_checkpoint
from blip2_export.measure import machine, prefill, samples, stop, work
from blip2_export.measure.baseline import DTYPE_BYTES, DTYPES
from blip2_export.measure.binary import Engine
from blip2_export.measure.peer import Peer
from blip2_export.measure.recipes import RECIPES, Recipe, bundle_of, weight_bits
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
    parser.add_argument(
        "--recipes",
        type=_recipes,
        default=["exact", "fast"],
        metavar="A,B",
        help=f"how the engine computes: {', '.join(RECIPES)}; `faithful` needs an Intel processor with bfloat16 and the "
        "OpenVINO plugin (default: exact,fast)",
    )
    parser.add_argument(
        "--weights",
        choices=DTYPES,
        default="float32",
        help="in which the checkpoint is stored (default: %(default)s)",
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
    models = _Models(args.work, args.shape, args.weights)
    engines = {
        name: Engine(args.engine, models.bundle(name), args.threads, RECIPES[name].flags) for name in args.recipes
    }
    for engine in engines.values():
        engine.doctor()
    models.prepare(args.recipes, DTYPE_BYTES[args.dtype])  # on all processors: --threads holds from `Peer` on
    peer = Peer(models.checkpoint, args.dtype, args.threads)
    wanted = work.of(args, peer.n_prompt_tokens)
    if args.compile:
        peer.compile()
    sides = _Sides(engines, peer, _described(args, engines, peer))
    found = _Found(wanted, {name: {} for name in engines})
    status = 0
    try:
        with stop.like_ctrl_c():
            for _ in sides.turns(found, args.rounds):
                if args.json:
                    found.write(args.json, sides.described(found))
    except KeyboardInterrupt:
        _say("stopped")
        status = stop.STOPPED
    print(found.report(sides.described(found)))
    return status


def _described(args: argparse.Namespace, engines: dict[str, Engine], peer: Peer) -> dict[str, str]:
    return {
        "command": shlex.join(["python", "-m", "blip2_export", *sys.argv[1:]]),
        "model": f"{args.shape}, transformers in {args.dtype}{', compiled' * args.compile}",
        **next(iter(engines.values())).describe(),
        **peer.describe(),
        **machine.describe(args.threads, "onnxruntime", "torch", "transformers"),
    }


@dataclass
class _Sides:
    """What is measured in turns. `about`: what holds for all rounds."""

    engines: dict[str, Engine]
    peer: Peer
    about: dict[str, str]

    def turns(self, found: _Found, n: int) -> Iterator[None]:
        """`n` rounds; comes back after every side's turn."""
        _say("transformers: warming up")
        self.peer.warm_up(found.work)
        for i in range(n):
            for name in self.engines:
                _say(f"round {i + 1} of {n}: engine, {name}")
                samples.add(found.engines[name], self._engine(name, found.work, i))
                yield
            _say(f"round {i + 1} of {n}: transformers")
            samples.add(found.peer, self.peer.measure(found.work, i))
            found.n_rounds += 1
            yield

    def described(self, found: _Found) -> dict[str, str]:
        agreements = {name: _agreement(engine.written, self.peer.written) for name, engine in self.engines.items()}
        return {
            **self.about,
            "whole rounds": str(found.n_rounds),
            **{f"same tokens, {name}": agreement for name, agreement in agreements.items()},
        }

    def _engine(self, name: str, work: Work, i: int) -> Samples:
        engine = self.engines[name]
        measured = engine.measure(work, i)
        if RECIPES[name].is_on_processor:
            n_prompt = self.peer.n_prompt_tokens("")
            alone = prefill.times(engine.bundle, n_prompt, work.n_tokens, engine.n_threads, _PREFILLS)
            measured["prefill of the graphs alone"] = alone
        return measured


@dataclass
class _Models:
    """The random checkpoint and its bundles, kept in a folder from one run to the next."""

    folder: Path
    shape: str
    dtype: str = "float32"

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.shape}-{self.dtype}"

    def bundle(self, recipe: str) -> Path:
        return self.folder / f"{self.shape}-{self.dtype}-{bundle_of(recipe)}"

    def prepare(self, recipes: Sequence[str], peer_bytes: int) -> None:
        """Makes what is missing, or older than the code that makes it; refuses before that where there is no room.

        `peer_bytes`: what a parameter takes in `transformers`.
        """
        n, stored = random_checkpoint.n_parameters(self.shape), DTYPE_BYTES[self.dtype]
        config, drawn = (
            self.checkpoint / "config.json",
            _is_current(self.checkpoint / "config.json", _code(random_checkpoint)),
        )
        sizes = {self.checkpoint: stored, **{self.bundle(name): min(stored, RECIPES[name].n_bytes) for name in recipes}}
        disk = sum(size for path, size in sizes.items() if not path.exists())
        machine.require_disk(self.folder, int(1.02 * n * disk), self.shape)
        largest = max(RECIPES[name].n_bytes for name in recipes)
        machine.require_memory(int(n * (peer_bytes + largest)) + _BESIDE_WEIGHTS, self.shape)
        self.folder.mkdir(parents=True, exist_ok=True)
        write = functools.partial(random_checkpoint.write, shape=self.shape, seed=0, dtype=getattr(torch, self.dtype))
        _keep_or_make(self.checkpoint, drawn, write)
        for name in dict.fromkeys(map(bundle_of, recipes)):
            facts = self.bundle(name) / "bundle.json"
            built = drawn and _is_current(facts, [config, *_code(bundle), *_code(graphs), *_code(read)])
            _keep_or_make(self.bundle(name), built, functools.partial(self._convert, recipe=RECIPES[name]))

    def _convert(self, path: Path, recipe: Recipe) -> None:
        choices = bundle.Choices(
            self.shape,
            golden=False,
            loss=False,
            precisions=recipe.precisions,
            weight_bits=weight_bits(),
        )
        bundle.convert(self.checkpoint, path, choices)


@dataclass
class _Found:
    """What was measured on both sides."""

    work: Work
    engines: dict[str, Samples]  # of each recipe
    peer: Samples = field(default_factory=dict)
    n_rounds: int = 0  # that are whole

    def report(self, described: dict[str, str]) -> str:
        lines = [f"{name}: {value}" for name, value in described.items()]
        heads = (head for name in self.engines for head in (f"engine, {name}", "quartiles", "times as fast"))
        sides = samples.table(["", "transformers", "quartiles", *heads], self._sides())
        own = [
            samples.table([f"the engine, {name}, beside itself", "", "", "ratio"], self._own(name))
            for name in self.engines
        ]
        return "\n".join([*lines, "", sides, *(line for table in own for line in ("", table))])

    def write(self, path: Path, described: dict[str, str]) -> None:
        content = {"machine": described, "rows": self.work.rows, "engine": self.engines, "transformers": self.peer}
        path.write_text(json.dumps(content, indent=1) + "\n")

    def _sides(self) -> Iterable[list[str]]:
        for name, label in self.work.rows.items():
            other = self.peer.get(name, [])
            theirs, cells = median(other), []
            for one in (engine.get(name, []) for engine in self.engines.values()):
                ours = median(one)
                cells += [ours, spread(one), ratio(ours, theirs) if name in self.work.rates else ratio(theirs, ours)]
            yield [label, theirs, spread(other), *cells]

    def _own(self, recipe: str) -> Iterable[list[str]]:
        n_beams, n, engine = self.work.n_beams, len(self.work.questions), self.engines[recipe]
        for label, over, under in (
            (f"a step of {n_beams} beams / of {n_beams} greedy rows, ms", "step of beams", "step of rows"),
            ("prefill / its graphs alone, ms", "prefill", "prefill of the graphs alone"),
            (f"{n} requests at once / one after another, tokens/s", "together", "alone"),
        ):
            if over in engine and under in engine:
                a, b = median(engine[over]), median(engine[under])
                yield [label, a, b, ratio(a, b)]


def _recipes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := next((name for name in names if name not in RECIPES), None):
        raise argparse.ArgumentTypeError(f"{unknown} is none of {', '.join(RECIPES)}")
    return names


def _agreement(engine: dict[str, list[int]], peer: dict[str, list[int]]) -> str:
    """Captions of both sides; with random weights scores tie more often than with trained ones, so that a few may differ."""
    both = engine.keys() & peer.keys()
    return f"{sum(engine[name] == peer[name] for name in both)} of {len(both)} captions"


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
