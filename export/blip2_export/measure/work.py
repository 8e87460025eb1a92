"""What is measured: the same for the engine and for `transformers`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blip2_export import processors

SAMPLES = Path(__file__).parents[3] / "models" / "samples"
SCENARIOS = ("stage", "single", "offline")
QUESTION = "what is in the picture?"  # as `blip2 bench`


@dataclass(frozen=True)
class Input:
    """A picture and what is asked about it; `name` as the engine's records have it."""

    name: str
    picture: Path
    question: str | None


@dataclass(frozen=True)
class Work:
    """Every text has exactly `n_tokens` tokens. `past`: rows and past lengths of the steps that are timed alone."""

    images: tuple[Path, ...]
    task: str
    questions: tuple[str, ...]
    n_tokens: int
    n_beams: int
    n_pictures: int
    n_queries: int
    duration: float  # seconds that are measured at least
    warm_up: float  # seconds at most
    past: tuple[tuple[int, int], ...]

    @property
    def inputs(self) -> list[Input]:
        """Pictures in turn, each with every question once, as `blip2 bench` pairs them."""
        if self.task == "caption":
            return [Input(str(path), path, None) for path in self.images]
        asked, found = self.questions or (QUESTION,), []
        for turn in range(len(asked)):
            for i, path in enumerate(self.images):
                question = asked[(i + turn) % len(asked)]
                found.append(Input(f"{path}: {question}", path, question))
        return found

    @property
    def search(self) -> str:
        """As the engine's reports call it."""
        return f"{self.n_beams} beams, {self.n_tokens} tokens"


def of(args: argparse.Namespace) -> Work:
    """`args` of `add_arguments`."""
    if args.text and args.task == "caption":
        raise SystemExit("--text is not for --task caption")
    return Work(
        images=tuple(args.images),
        task=args.task,
        questions=tuple(args.text),
        n_tokens=args.tokens,
        n_beams=args.beams,
        n_pictures=args.pictures,
        n_queries=args.queries,
        duration=args.duration,
        warm_up=args.warm_up,
        past=tuple((rows, past) for past in sorted(set(args.past)) for rows in sorted(set(args.rows))),
    )


def add_arguments(parser: argparse.ArgumentParser, beams: int, queries: int, duration: float, warm_up: float) -> None:
    """Names and meanings are those of `blip2 bench`; what follows the parser are defaults."""
    parser.add_argument(
        "--images",
        type=picture,
        nargs="+",
        default=sorted(SAMPLES.glob("*.png")),
        metavar="FILE",
        help="default: models/samples/*.png",
    )
    parser.add_argument("--task", choices=("caption", "ask"), default="caption", help="default: %(default)s")
    parser.add_argument(
        "--text", action="append", default=[], metavar="TEXT", help="a question of `ask`; may be given several times"
    )
    parser.add_argument("--beams", type=count(1), default=beams, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--pictures", type=count(1), default=8, metavar="N", help="of `offline`, at once (default: %(default)s)"
    )
    _add_scenarios(parser)
    add_amounts(parser, queries, duration, warm_up)


def add_amounts(parser: argparse.ArgumentParser, queries: int, duration: float, warm_up: float) -> None:
    """How much is measured, and by whom."""
    parser.add_argument("--tokens", type=count(2), default=20, metavar="N", help="of every text (default: %(default)s)")
    parser.add_argument(
        "--queries", type=count(1), default=queries, metavar="N", help="to measure at least (default: %(default)s)"
    )
    parser.add_argument(
        "--duration", type=seconds, default=duration, metavar="S", help="to measure at least (default: %(default)s)"
    )
    parser.add_argument("--warm-up", type=seconds, default=warm_up, metavar="S", help="at most (default: %(default)s)")
    parser.add_argument(
        "--threads", type=count(1), default=processors.count(), metavar="N", help="default: one a processor"
    )
    parser.add_argument(
        "--engine",
        type=Path,
        default=Path("target/release/blip2"),
        help="the program that makes the reports (default: %(default)s)",
    )


def _add_scenarios(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scenarios",
        type=scenarios,
        default=list(SCENARIOS),
        metavar="A,B",
        help=f"of {', '.join(SCENARIOS)} (default: all)",
    )
    parser.add_argument(
        "--rows", type=counts, default=[1], metavar="A,B", help="of the steps that `stage` times (default: 1)"
    )
    parser.add_argument(
        "--past", type=counts, default=[48], metavar="A,B", help="positions before those steps (default: 48)"
    )


def require_engine(path: Path) -> None:
    if not path.is_file():
        raise SystemExit(f"{path}: the engine is not there; `make build` makes it")


def folder(text: str) -> Path:
    """One that is there or can be made."""
    path = Path(text)
    if any(parent.exists() and not parent.is_dir() for parent in (path, *path.absolute().parents)):
        raise argparse.ArgumentTypeError(f"{text}: no folder can be there")
    return path


def scenarios(text: str) -> list[str]:
    names = text.split(",")
    if unknown := next((name for name in names if name not in SCENARIOS), None):
        raise argparse.ArgumentTypeError(f"{unknown} is none of {', '.join(SCENARIOS)}")
    return names


def counts(text: str) -> list[int]:
    return [count(1)(part) for part in text.split(",")]


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number of seconds from 0 is needed")
    return found


def count(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
        return int(text)

    return read


def picture(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such picture")
    return Path(text)
