"""`python -m blip2_export`: convert checkpoints, train, draw scenes, evaluate bundles."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

_COMMANDS = {
    "convert": ("blip2_export.convert", "write a bundle from a Hugging Face BLIP-2 folder"),
    "random-checkpoint": (
        "blip2_export.check.random_command",
        "write a small checkpoint with random weights, for tests",
    ),
    "train": ("blip2_export.train.cli", "train the demo"),
    "scenes": ("blip2_export.scenes.dataset", "draw scenes with captions and questions"),
    "parity": ("blip2_export.check.parity", "compare a bundle in the engine with its checkpoint in transformers"),
    "emulate": ("blip2_export.check.emulate", "verify bundles on an emulated processor"),
    "baseline": ("blip2_export.measure.baseline", "measure `transformers` as `blip2 bench` measures the engine"),
    "baseline-server": (
        "blip2_export.measure.plain_server",
        "serve `transformers` as a plain server does, to measure it",
    ),
    "bench": ("blip2_export.measure.bench", "measure the engine and `transformers` in turns and print the ratios"),
    "bench-serve": ("blip2_export.measure.bench_serve", "measure servers in turns: the engine's and `transformers`'"),
    "evaluate": ("blip2_export.scenes.evaluate", "measure on held-out scenes how often a bundle is right"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m blip2_export", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = next((word for word in sys.argv[1:] if word in _COMMANDS), None)
    for name, (module, summary) in _COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:  # the others may need packages that this command does not
            importlib.import_module(module).add_arguments(sub)
    args = parser.parse_args()
    return int(importlib.import_module(_COMMANDS[args.command][0]).run(args))


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    sys.exit(main())
