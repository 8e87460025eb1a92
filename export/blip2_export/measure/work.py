"""What is measured: the same for the engine and for `transformers`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blip2_export import processors

SAMPLES = Path(__file__).parents[3] / "models" / "samples"
TEMPLATE = "Question: {} Answer:"
_PARTS = (
    ("what colour is", "how large is", "where is", "who owns", "what stands behind", "how old is"),
    ("the", "a", "this", "that"),
    ("dog", "star", "ball", "house", "tree", "car", "boat", "ring", "shirt", "table"),
)


@dataclass(frozen=True)
class Work:
    """Captions of every image, and questions asked one after another and all at once. Every text has exactly `n_tokens` tokens."""

    images: tuple[Path, ...]
    questions: tuple[str, ...]
    n_tokens: int
    n_beams: int
    n_pictures: int

    @property
    def prompts(self) -> list[str]:
        return [TEMPLATE.format(question) for question in self.questions]

    @property
    def batch(self) -> list[Path]:
        """The pictures of one batch; there may be fewer different ones."""
        return list(itertools.islice(itertools.cycle(self.images), self.n_pictures))

    @property
    def rates(self) -> tuple[str, ...]:
        """What is better when it is more."""
        return ("alone", "together")

    @property
    def rows(self) -> dict[str, str]:
        """What both sides measure → how a table calls it."""
        return {
            "preprocess": "preprocess: file → pixels, ms",
            "vision": "vision, ms",
            "qformer": "Q-Former and projection, ms",
            "prefill": "prefill, ms",
            "step": "decode step, ms",
            "caption": f"caption of {self.n_tokens} tokens, greedy, ms",
            "beams": f"caption, {self.n_beams} beams, ms",
            "batch": f"{self.n_pictures} captions at once, ms",
            "alone": "requests one after another, tokens/s",
            "together": f"{len(self.questions)} requests at once, tokens/s",
        }


def of(args: argparse.Namespace, n_prompt_tokens: Callable[[str], int]) -> Work:
    """The questions that are asked have prompts of one length, so that no side gains by how it pads."""
    asked = [" ".join(words) + "?" for words in itertools.product(*_PARTS)]
    by_length: dict[int, list[str]] = {}
    for question in asked:
        by_length.setdefault(n_prompt_tokens(TEMPLATE.format(question)), []).append(question)
    most = max(by_length.values(), key=len)
    if len(most) < args.requests:
        raise SystemExit(f"--requests {args.requests}: at most {len(most)} questions of one length are at hand")
    return Work(tuple(args.images), tuple(most[: args.requests]), args.tokens, args.beams, args.pictures)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=_picture,
        nargs="+",
        default=sorted(SAMPLES.glob("*.png")),
        metavar="FILE",
        help="default: models/samples/*.png",
    )
    parser.add_argument("--rounds", type=count(1), default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--tokens", type=count(2), default=20, metavar="N", help="of every text (default: %(default)s)")
    parser.add_argument("--beams", type=count(2), default=5, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--pictures", type=count(2), default=8, metavar="N", help="captions at once (default: %(default)s)"
    )
    parser.add_argument(
        "--requests", type=count(2), default=16, metavar="N", help="questions at once (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=count(1),
        default=processors.count(),
        metavar="N",
        help="on both sides (default: one a processor)",
    )
    parser.add_argument("--json", type=_report, metavar="FILE", help="every single value, with machine and versions")


def _picture(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such picture")
    return Path(text)


def _report(text: str) -> Path:
    """A file that can be written once everything is measured."""
    if not Path(text).absolute().parent.is_dir() or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no file can be written there; choose one in a folder that exists")
    return Path(text)


def count(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
        return int(text)

    return read
