"""The `random-checkpoint` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from blip2_export.check import outliers
from blip2_export.check import random_checkpoint as generation
from blip2_export.check import random_retrieval as stage1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to write")
    shapes = sorted(generation.SHAPES | generation.FAMILIES | generation.LARGE | stage1.SHAPES | stage1.LARGE)
    parser.add_argument("--shape", choices=shapes, default="tiny", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--outliers", action="store_true", help="give the language model the outlier channels that trained ones have"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")


def run(args: argparse.Namespace) -> int:
    if args.out.exists():
        print(f"error: {args.out} exists", file=sys.stderr)
        return 2
    writer = stage1.write if args.shape in stage1.SHAPES | stage1.LARGE else generation.write
    writer(args.out, args.shape, args.seed, getattr(torch, args.dtype))
    if args.outliers:
        outliers.plant(args.out)
    return 0
