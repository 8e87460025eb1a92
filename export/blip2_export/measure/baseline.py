"""The `baseline` command: `transformers` alone, eager and compiled, in any precision; reports as `blip2 bench` writes them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from blip2_export.measure import machine, stop, work
from blip2_export.measure.peer import Peer
from blip2_export.measure.progress import say
from blip2_export.measure.records import Files
from blip2_export.measure.scenarios import Scenario
from blip2_export.read.checkpoint import CheckpointError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = tuple(DTYPE_BYTES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a BLIP-2 with a language model")
    parser.add_argument(
        "--out",
        type=work.folder,
        default=Path("target/baseline"),
        metavar="DIR",
        help="gets records and report of every scenario (default: %(default)s)",
    )
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
    work.add_arguments(parser, beams=1, queries=20, duration=10.0, warm_up=30.0)


def run(args: argparse.Namespace) -> int:
    """Progress to standard error, the reports' tables to standard output."""
    work.require_engine(args.engine)
    wanted, command = work.of(args), ["python", "-m", "blip2_export", *sys.argv[1:]]
    try:
        with stop.like_ctrl_c():
            for label, peer in _peers(args):
                for name in args.scenarios:
                    files = Files(args.out / f"transformers-{label}-{name}")
                    say(f"{label}: {name}")
                    print(Scenario(name, peer, wanted).measure(args.engine, files, command))
                    say(f"{shlex.quote(str(files.report))} is written")
    except KeyboardInterrupt:
        say("stopped")
        return stop.STOPPED
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from error
    return 0


def _peers(args: argparse.Namespace) -> Iterator[tuple[str, Peer]]:
    """A model is let go before that of the next precision is loaded."""
    for dtype in args.dtype:
        machine.require_memory(n_bytes(args.checkpoint, dtype), str(args.checkpoint))
        machine.forget_peak_memory()
        peer = Peer(args.checkpoint, dtype, args.threads, args.device)
        yield dtype, peer
        if args.compile:
            peer.compile()
            yield f"{dtype}-compiled", peer
        del peer


def n_bytes(checkpoint: Path, dtype: str) -> int:
    """The least that the weights take in memory: the files that hold them have 4 bytes a number or fewer."""
    files = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.bin")]
    return sum(path.stat().st_size for path in files) * DTYPE_BYTES[dtype] // 4


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := next((name for name in names if name not in DTYPES), None):
        raise argparse.ArgumentTypeError(f"{unknown} is none of {', '.join(DTYPES)}")
    return names
