"""The `baseline` command: `transformers` alone, eager and compiled, in any precision."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from blip2_export.measure import machine, samples, stop, work
from blip2_export.measure.peer import Peer
from blip2_export.measure.samples import Samples
from blip2_export.measure.work import Work
from blip2_export.read.checkpoint import CheckpointError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = tuple(DTYPE_BYTES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a BLIP-2 with a language model")
    parser.add_argument(
        "--dtype",
        type=_dtypes,
        default=["float32"],
        metavar="A,B",
        help="float32, bfloat16, float16, or several (default: float32; without AVX-512 the others are very slow)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="measure `torch.compile` too; it takes minutes to compile"
    )
    parser.add_argument("--device", default="cpu", help="where `transformers` computes, such as cuda:0 (default: cpu)")
    work.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Progress to standard error, the table to standard output."""
    described = machine.describe(args.threads, "torch", "transformers")
    found: dict[str, Samples] = {}
    wanted, status = None, 0
    try:
        with stop.like_ctrl_c():
            for wanted in _turns(args, found):
                if args.json:
                    content = {"machine": described, "rows": wanted.rows, "samples": found}
                    args.json.write_text(json.dumps(content, indent=1) + "\n")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = stop.STOPPED
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from error
    if wanted is not None:
        print("\n".join(f"{name}: {value}" for name, value in described.items()))
        print(f"\n{_table(wanted, found)}")
    return status


def _turns(args: argparse.Namespace, found: dict[str, Samples]) -> Iterator[Work]:
    """Comes back after every round, eager and perhaps compiled; a model is let go before that of the next precision is loaded."""
    for dtype in args.dtype:
        peer = Peer(args.checkpoint, dtype, args.threads, args.device)
        wanted = work.of(args, peer.n_prompt_tokens)
        yield from _rounds(peer, wanted, args.rounds, dtype, found)
        if args.compile:
            peer.compile()
            yield from _rounds(peer, wanted, args.rounds, f"{dtype}, compiled", found)
        del peer


def _rounds(peer: Peer, wanted: Work, n_rounds: int, label: str, found: dict[str, Samples]) -> Iterator[Work]:
    print(f"{label}: warming up", file=sys.stderr)
    found[label] = {"first": [peer.warm_up(wanted)]}
    for i in range(n_rounds):
        print(f"{label}: round {i + 1} of {n_rounds}", file=sys.stderr)
        samples.add(found[label], peer.measure(wanted, i))
        yield wanted


def _table(wanted: Work, found: dict[str, Samples]) -> str:
    rows = {**wanted.rows, "first": "everything once at first, compiling included, s"}
    cells = [
        [label, *(cell for one in found.values() for cell in _cells(one.get(name, [])))] for name, label in rows.items()
    ]
    return samples.table(["", *(head for name in found for head in (name, "quartiles"))], cells)


def _cells(values: list[float]) -> tuple[str, str]:
    return samples.median(values), samples.spread(values)


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := next((name for name in names if name not in DTYPES), None):
        raise argparse.ArgumentTypeError(f"{unknown} is none of {', '.join(DTYPES)}")
    return names
